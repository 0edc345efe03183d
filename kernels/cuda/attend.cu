#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/attend_any.cuh"
#include "kernels/cuda/attend_sections.cuh"
#include "kernels/cuda/attend_task.cuh"
#include "kernels/cuda/attend_tensor.cuh"

namespace kvern {
namespace {

using namespace cuda;

using Kernel = void (*)(Task);

/// Pieces are multiples of this many entries, as tiles of sections are, and have at least what the warps of a block do
/// in one turn.
constexpr std::uint32_t kPieceStep = tensor::kSectionTile;
constexpr std::uint32_t kSmallestPiece = 128;
/// Large caches are cut into pieces of about this many entries: blocks that take long do not end together. On an H200
/// 64 heads of 131072 entries took 0.99 ms with 2048, 1.00 ms with 8192 and 1.32 ms with one wave of blocks; one
/// sequence took 0.142 ms with 4096, 0.148 ms with 2048.
constexpr std::uint32_t kLargePiece = 4096;
/// The parts of a plan in device memory begin at multiples of it.
constexpr std::size_t kAlignment = 256;

/// A kernel, and the queries that a block of it works on.
struct Choice {
  Kernel kernel = any::attend_pieces;
  unsigned warps = any::kWarps;
  unsigned queries = any::kQueries;
  /// Of dynamic shared memory.
  std::size_t warp_bytes = 0;
};

template <class E, unsigned kBlocks>
Choice tensor_kernel(std::uint32_t bits) {
  if (bits == 0) return {tensor::attend_pieces<E, kBlocks>, tensor::kWarps<kBlocks>, tensor::kQueries, 0};
  return {tensor::attend_sections<E, kBlocks>, tensor::kWarps<kBlocks>, tensor::kQueries,
          tensor::warp_bytes<kBlocks>(bits)};
}

template <class E>
Choice tensor_kernel(std::uint32_t dim, std::uint32_t bits) {
  switch ((dim + tensor::kBlock - 1) / tensor::kBlock) {
    case 1:
      return tensor_kernel<E, 1>(bits);
    case 2:
      return tensor_kernel<E, 2>(bits);
    case 3:
      return tensor_kernel<E, 3>(bits);
    default:
      return tensor_kernel<E, 4>(bits);
  }
}

bool rows_fit_tensor_cores(const AttendRows& rows, DType dtype) {
  return rows.dtype == dtype && (reinterpret_cast<std::uintptr_t>(rows.data) | rows.stride_bytes) % 16 == 0;
}

/// Bits of a section's codes, 0 for rows. kRefused, with the reason, for sections that kernels do not take.
Result<std::uint32_t> bits_of(const AttendRows& rows, bool keys, std::uint32_t entries, std::uint32_t dim,
                              DType dtype) {
  const auto refused = [](const char* reason) {
    return failure(Code::kRefused, std::string("attend: ") + reason + "; decode the section first");
  };
  if (rows.section.index() == 0) return 0U;
  if (rows.index != nullptr) return refused("the rows of a section cannot be picked by an index");
  if (dtype_bytes(dtype) != 2 || dim % tensor::kBlock != 0) {
    return refused("sections have to be of fp16 or bf16 and of 64, 128, 192 or 256 dimensions");
  }
  if (reinterpret_cast<std::uintptr_t>(rows.data) % quantise::Form::kAlignment != 0) {
    return refused("the section is not aligned to 64 bytes");
  }
  const auto fits = [&](const auto& form) {
    return form.dtype == dtype && form.per_channel == keys && form.dim == dim && form.tokens >= entries &&
           form.group % (keys ? tensor::kSectionTile : quantise::Form::kDimStep) == 0 && form.group >= 32;
  };
  const auto* form = std::get_if<quantise::Form>(&rows.section);
  if (form != nullptr && form->kind != quantise::Kind::kInt4) return refused("the form is not int4 or int8");
  if (form != nullptr ? !fits(*form) : !fits(std::get<int8::Form>(rows.section))) {
    return refused(
        "the section is not of the problem's dtype, dimension and entries, or its groups are smaller than 32");
  }
  return form != nullptr ? 4U : 8U;
}

/// The bits of the segments' codes in order, and what to run for them.
struct Survey {
  std::vector<std::uint32_t> bits;
  Choice choice;
};

Result<Survey> survey(const AttendProblem& problem) {
  const HeadRows& queries = problem.queries;
  Survey found;
  bool fits = dtype_bytes(queries.dtype) == 2 && queries.dim % 8 == 0 && problem.value_dim % 8 == 0;
  std::uint32_t most_bits = 0;
  for (const auto& segments : problem.heads) {
    for (const AttendSegment& segment : segments) {
      if (segment.entries == 0) continue;
      if (segment.keys.reader != nullptr || segment.values.reader != nullptr) {
        return failure(Code::kRefused, "attend: the GPU has no readers; give it rows or a section");
      }
      const auto keys = bits_of(segment.keys, true, segment.entries, queries.dim, queries.dtype);
      if (!keys) return failure(keys.error());
      const auto values = bits_of(segment.values, false, segment.entries, problem.value_dim, queries.dtype);
      if (!values) return failure(values.error());
      if (*keys != *values || (*keys != 0 && queries.dim != problem.value_dim)) {
        return failure(Code::kRefused,
                       "attend: keys and values of a segment have to be of one form; decode them first");
      }
      found.bits.push_back(*keys);
      most_bits = std::max(most_bits, *keys);
      fits = fits && (*keys != 0 || (rows_fit_tensor_cores(segment.keys, queries.dtype) &&
                                     rows_fit_tensor_cores(segment.values, queries.dtype)));
    }
  }
  if (!fits && most_bits != 0) {
    return failure(Code::kRefused,
                   "attend: beside sections, rows have to be of the queries' dtype and aligned to 16 bytes");
  }
  const std::uint32_t dim = std::max(queries.dim, problem.value_dim);
  if (fits && queries.dtype == DType::kBFloat16) found.choice = tensor_kernel<BFloat16Pairs>(dim, most_bits);
  if (fits && queries.dtype == DType::kFloat16) found.choice = tensor_kernel<Float16Pairs>(dim, most_bits);
  return found;
}

Rows device_rows(const AttendRows& rows, std::uint32_t dim) {
  const std::size_t row_bytes = dim * dtype_bytes(rows.dtype);
  const bool aligned = (reinterpret_cast<std::uintptr_t>(rows.data) | rows.stride_bytes | row_bytes) % 16 == 0;
  return {rows.data, rows.stride_bytes, rows.index, rows.lengths, rows.dtype, aligned};
}

Codes device_codes(const AttendRows& rows) {
  const auto* scales = reinterpret_cast<const std::uint16_t*>(rows.data);
  if (const auto* form = std::get_if<quantise::Form>(&rows.section)) {
    return {rows.data + form->first_at(), scales, form->has_offsets() ? rows.data + form->offsets_at() : nullptr,
            form->group};
  }
  const auto& form = std::get<int8::Form>(rows.section);
  return {rows.data + form.codes_offset(), scales, nullptr, form.group};
}

Segment device_segment(const AttendSegment& segment, std::uint32_t dim, std::uint32_t value_dim, std::uint32_t bits) {
  Segment device{device_rows(segment.keys, dim),
                 device_rows(segment.values, value_dim),
                 segment.bias,
                 segment.positions,
                 bits,
                 0,
                 {},
                 {}};
  if (bits == 0) return device;
  device.key_codes = device_codes(segment.keys);
  device.value_codes = device_codes(segment.values);
  device.centre = tensor::kCodeBase;
  if (device.key_codes.offsets == nullptr) device.centre += quantise::half_span(quantise::Kind::kInt4);
  return device;
}

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
constexpr std::uint64_t parts_of(std::uint64_t whole, std::uint64_t part) { return (whole + part - 1) / part; }

/// What the current device can do for a kernel.
struct DeviceFit {
  std::uint32_t blocks = 0;  ///< that it runs at a time
  /// Has programmatic dependent launch.
  bool overlaps = false;
};

Result<DeviceFit> fit_device(const Choice& choice) {
  int device = 0;
  int processors = 0;
  int blocks = 0;
  int major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(choice.warps * choice.warp_bytes));
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks, choice.kernel, static_cast<int>(choice.warps * kWarp), choice.warps * choice.warp_bytes);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return failure(Code::kInternal, std::string("attend: ") + cudaGetErrorString(error));
  }
  return DeviceFit{static_cast<std::uint32_t>(std::max(processors * blocks, 1)), major >= 9};
}

}  // namespace

Status CudaAttendOptions::validate() const { return Status::ok(); }

struct CudaAttendPlan::Plan {
  Task task{};
  Choice choice{};
  std::uint32_t blocks = 0;
  /// Blocks may begin before the kernel in front has ended.
  bool overlaps = false;
  /// Pieces and counters as they go to the device, and the bytes with the results behind them.
  std::vector<std::byte> uploaded;
  std::size_t device_bytes = 0;
  /// Where the parts begin.
  std::size_t done_at = 0, sums_at = 0, weights_at = 0;
  bool put = false;
};

CudaAttendPlan::CudaAttendPlan(std::unique_ptr<Plan> plan) : plan_(std::move(plan)) {}
CudaAttendPlan::CudaAttendPlan(CudaAttendPlan&&) noexcept = default;
CudaAttendPlan& CudaAttendPlan::operator=(CudaAttendPlan&&) noexcept = default;
CudaAttendPlan::~CudaAttendPlan() = default;

Result<CudaAttendPlan> CudaAttendPlan::make(const AttendProblem& problem, const CudaAttendOptions& options) {
  if (Status status = problem.validate(); !status) return failure(status);
  const auto found = survey(problem);
  if (!found) return failure(found.error());
  auto plan = std::make_unique<Plan>();
  plan->choice = found->choice;
  const auto fit = fit_device(plan->choice);
  if (!fit) return failure(fit.error());
  plan->overlaps = fit->overlaps;

  const HeadRows& queries = problem.queries;
  const auto heads = static_cast<std::uint32_t>(problem.heads.size());
  Task& task = plan->task;
  task.query_head_stride = queries.head_stride_bytes;
  task.query_row_stride = queries.token_stride_bytes;
  task.query_dtype = queries.dtype;
  task.scale = kLog2E * (problem.scale != 0 ? problem.scale
                                            : static_cast<float>(1.0 / std::sqrt(static_cast<double>(queries.dim))));
  task.rows = queries.tokens;
  task.count = queries.heads / heads * queries.tokens;
  task.query_blocks = static_cast<std::uint32_t>(parts_of(task.count, plan->choice.queries));
  task.dim = queries.dim;
  task.value_dim = problem.value_dim;
  task.warp_bytes = static_cast<std::uint32_t>(plan->choice.warp_bytes);

  std::uint64_t entries = 0;
  for (const auto& segments : problem.heads) {
    for (const AttendSegment& segment : segments) entries += segment.entries;
  }
  const std::uint64_t even = parts_of(entries * task.query_blocks, fit->blocks);
  const std::uint64_t wanted =
      options.piece_entries != 0 ? options.piece_entries : std::min<std::uint64_t>(even, kLargePiece);
  const std::uint64_t piece = std::max<std::uint64_t>(wanted, kSmallestPiece);

  std::vector<Piece> pieces;
  auto bits = found->bits.begin();
  for (std::uint32_t head = 0; head < heads; ++head) {
    const auto first = static_cast<std::uint32_t>(pieces.size());
    for (const AttendSegment& segment : problem.heads[head]) {
      if (segment.entries == 0) continue;
      const Segment device = device_segment(segment, queries.dim, problem.value_dim, *bits++);
      // The nearest number of even pieces.
      const std::uint64_t count = std::max<std::uint64_t>((segment.entries + piece / 2) / piece, 1);
      const auto length =
          static_cast<std::uint32_t>(parts_of(parts_of(segment.entries, count), kPieceStep) * kPieceStep);
      for (std::uint32_t begin = 0; begin < segment.entries;) {
        const std::uint32_t end = begin + std::min(length, segment.entries - begin);
        pieces.push_back({device, head, begin, end, first, 0});
        begin = end;
      }
    }
    // A head without entries has an output too.
    if (first == pieces.size()) pieces.push_back({{}, head, 0, 0, first, 0});
    const auto of_head = static_cast<std::uint32_t>(pieces.size()) - first;
    for (std::uint32_t i = first; i < pieces.size(); ++i) pieces[i].of_head = of_head;
  }
  const std::uint64_t blocks = std::uint64_t{pieces.size()} * task.query_blocks;
  if (blocks > INT32_MAX) return failure(Code::kInvalid, "attend: too many pieces for one launch");
  plan->blocks = static_cast<std::uint32_t>(blocks);

  plan->done_at = aligned(pieces.size() * sizeof(Piece));
  plan->sums_at = plan->done_at + aligned(std::size_t{heads} * task.query_blocks * sizeof(std::uint32_t));
  const std::size_t results = pieces.size() * task.count;
  plan->weights_at = plan->sums_at + aligned(results * task.value_dim * sizeof(float));
  plan->device_bytes = plan->weights_at + aligned(results * sizeof(PieceWeights));
  plan->uploaded.resize(plan->sums_at);
  std::memcpy(plan->uploaded.data(), pieces.data(), pieces.size() * sizeof(Piece));
  return CudaAttendPlan(std::move(plan));
}

std::size_t CudaAttendPlan::device_bytes() const { return plan_->device_bytes; }

Status CudaAttendPlan::put(std::byte* memory, CUstream_st* stream) {
  if (memory == nullptr || reinterpret_cast<std::uintptr_t>(memory) % kAlignment != 0) {
    return {Code::kInvalid, "attend: the plan's memory must be aligned to " + std::to_string(kAlignment) + " bytes"};
  }
  const cudaError_t error =
      cudaMemcpyAsync(memory, plan_->uploaded.data(), plan_->uploaded.size(), cudaMemcpyHostToDevice, stream);
  if (error != cudaSuccess) return {Code::kInternal, std::string("attend: ") + cudaGetErrorString(error)};
  Task& task = plan_->task;
  task.pieces = reinterpret_cast<const Piece*>(memory);
  task.done = reinterpret_cast<std::uint32_t*>(memory + plan_->done_at);
  task.sums = reinterpret_cast<float*>(memory + plan_->sums_at);
  task.weights = reinterpret_cast<PieceWeights*>(memory + plan_->weights_at);
  plan_->put = true;
  return Status::ok();
}

Status CudaAttendPlan::attend(const std::byte* queries, const std::int32_t* query_positions, float* output, float* lse,
                              CUstream_st* stream) const {
  if (!plan_->put) return {Code::kInvalid, "attend: the plan is not in device memory yet"};
  Task task = plan_->task;
  task.queries = queries;
  task.query_positions = query_positions;
  task.output = output;
  task.lse = lse;
  const Choice& choice = plan_->choice;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = plan_->blocks;
  config.blockDim = choice.warps * kWarp;
  config.dynamicSmemBytes = choice.warps * choice.warp_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = plan_->overlaps ? 1 : 0;
  cudaLaunchKernelEx(&config, choice.kernel, task);
  return launched("attend");
}

}  // namespace kvern
