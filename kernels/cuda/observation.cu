#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <string>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/observation.h"
#include "kernels/cuda/observation_task.cuh"
#include "kernels/cuda/observation_tensor.cuh"
#include "kernels/score_order.h"

namespace kvern::evict {
namespace {

using namespace cuda;

constexpr unsigned kWarps = 8;
constexpr unsigned kThreads = kWarps * kWarp;
/// Columns of a tile: one per lane.
constexpr std::uint32_t kTileColumns = kWarp;
/// Rows that a warp multiplies with a key at a time, so that the key is read once for them.
constexpr std::uint32_t kStepRows = 4;
constexpr float kLog2E = 1.44269504088896340736F;
constexpr double kLn2 = 0.693147180559945309417;
/// Variances that one block adds up.
constexpr std::uint32_t kShiftColumns = 8192;

/// Columns that one block adds up in pass 1 without tensor cores, by compute capability: enough blocks to fill the
/// device at 32k tokens of 8 heads. Not measured yet.
constexpr Policy kPieces[] = {{8, 512}, {9, 512}, {10, 512}};
constexpr std::uint32_t kSmallestPiece = smallest_value(kPieces);

/// On the tensor cores a piece is as long as fills the device once, within these limits.
constexpr std::uint32_t kShortestPiece = 2 * tensor::kTileColumns;
constexpr std::uint32_t kMostPieces = 256;
/// Where the device has room for fewer pieces of each head than these, it takes turns with so many instead, so that its
/// last turn is a small part of the time.
constexpr std::uint32_t kFewPieces = 8;
constexpr std::uint32_t kPiecesInTurns = 32;

/// The keys of a tile as floats, [column][dim + 1]: the odd stride keeps lanes on different banks.
template <class E>
__device__ void load_keys(const Problem& problem, std::uint32_t kv_head, std::uint32_t begin, std::uint32_t end,
                          float* keys) {
  const std::uint32_t dim = problem.keys.dim;
  for (std::uint32_t i = threadIdx.x; i < kTileColumns * dim; i += kThreads) {
    const std::uint32_t column = begin + i / dim;
    const auto* row = reinterpret_cast<const typename E::Raw*>(problem.keys.row(kv_head, min(column, end - 1)));
    keys[i / dim * (dim + 1) + i % dim] = E::to_float(row[i % dim]);
  }
}

/// Logits in base 2 of kStepRows rows, from `row` on, with the lane's key; -infinity where masked or not finite. The
/// last rows may be done twice. Adds to the lane's count of those that were not finite.
template <class E>
__device__ void multiply(const Problem& problem, std::uint32_t kv_head, std::uint32_t row, std::uint32_t column,
                         std::uint32_t end, const float* key, float (&logits)[kStepRows], unsigned& not_finite) {
  const std::uint32_t rows = rows_of(problem);
  const std::uint32_t window = problem.queries.tokens;
  const typename E::Raw* queries[kStepRows];
  for (std::uint32_t i = 0; i < kStepRows; ++i) {
    const std::uint32_t r = min(row + i, rows - 1);
    queries[i] = reinterpret_cast<const typename E::Raw*>(
        problem.queries.row(std::size_t{kv_head} * problem.sharing + r / window, r % window));
    logits[i] = 0;
  }
  for (std::uint32_t k = 0; k < problem.keys.dim; ++k) {
    const float element = key[k];
    for (std::uint32_t i = 0; i < kStepRows; ++i) {
      logits[i] = __fmaf_rn(E::to_float(queries[i][k]), element, logits[i]);
    }
  }
  for (std::uint32_t i = 0; i < kStepRows; ++i) {
    const std::uint32_t r = row + i;
    logits[i] *= problem.scale;
    const bool there = r < rows && column < end;
    if (there && !isfinite(logits[i])) ++not_finite;
    const bool seen = column <= problem.keys.tokens - window + r % window;
    if (!there || !seen || !isfinite(logits[i])) logits[i] = -INFINITY;
  }
}

/// Pass 1: one block per piece of columns and KV head. Counts what is not finite.
template <class E>
__global__ void add_columns(Problem problem, std::uint64_t* not_finite) {
  extern __shared__ float shared[];
  const std::uint32_t kv_head = blockIdx.y;
  const std::uint32_t rows = rows_of(problem);
  const std::uint32_t dim = problem.keys.dim;
  float* keys = shared;
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  Totals* totals = problem.totals + (std::size_t{kv_head} * problem.pieces + blockIdx.x) * rows;
  for (std::uint32_t row = threadIdx.x; row < rows; row += kThreads) totals[row] = Totals();
  const std::uint32_t last = min(problem.keys.tokens, (blockIdx.x + 1) * problem.piece);
  unsigned bad = 0;
  for (std::uint32_t begin = blockIdx.x * problem.piece; begin < last; begin += kTileColumns) {
    __syncthreads();
    load_keys<E>(problem, kv_head, begin, last, keys);
    __syncthreads();
    const std::uint32_t column = begin + lane;
    for (std::uint32_t row = warp * kStepRows; row < rows; row += kWarps * kStepRows) {
      float logits[kStepRows];
      multiply<E>(problem, kv_head, row, column, last, keys + lane * (dim + 1), logits, bad);
      for (std::uint32_t i = 0; i < kStepRows && row + i < rows; ++i) {
        Totals& of_row = totals[row + i];
        const float old_reference = of_row.largest;
        const float reference = fmaxf(old_reference, largest_of_warp(logits[i]));
        const float power = exp2f(logits[i] - reference);
        const bool counted = column < problem.columns && power > 0;
        const float sum = sum_of_warp(power);
        const float observed = sum_of_warp(counted ? power : 0.0F);
        const float weighted = sum_of_warp(counted ? power * (logits[i] - reference) : 0.0F);
        if (lane == 0) {
          // exp2f(-inf) is 0, and a row that has seen nothing has nothing to rescale.
          const float change = of_row.sum > 0 ? old_reference - reference : 0.0F;
          const float factor = exp2f(change);
          of_row.largest = reference;
          of_row.weighted = (of_row.weighted + change * of_row.observed) * factor + weighted;
          of_row.observed = of_row.observed * factor + observed;
          of_row.sum = of_row.sum * factor + sum;
        }
        __syncwarp();
      }
    }
  }
  bad = sum_of_warp(bad);
  if (lane == 0 && bad > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(not_finite), static_cast<unsigned long long>(bad));
}

/// Puts the pieces of a row together: one warp per row of all heads, its lanes take turns with the pieces.
__global__ void finish_rows(Problem problem, float* lse) {
  const std::uint32_t rows = rows_of(problem);
  const std::uint32_t index = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  if (index >= rows * problem.keys.heads) return;
  const Totals* of_row = problem.totals + std::size_t{index / rows} * problem.pieces * rows + index % rows;
  float reference = kLowest;
  for (std::uint32_t piece = lane; piece < problem.pieces; piece += kWarp) {
    reference = fmaxf(reference, of_row[std::size_t{piece} * rows].largest);
  }
  reference = largest_of_warp(reference);
  double sum = 0;
  double observed = 0;
  double weighted = 0;
  for (std::uint32_t piece = lane; piece < problem.pieces; piece += kWarp) {
    const Totals total = of_row[std::size_t{piece} * rows];
    if (!(total.sum > 0)) continue;
    const double change = static_cast<double>(total.largest) - static_cast<double>(reference);
    const double factor = exp2(change);
    sum += factor * static_cast<double>(total.sum);
    observed += factor * static_cast<double>(total.observed);
    weighted += factor * (static_cast<double>(total.weighted) + change * static_cast<double>(total.observed));
  }
  sum = sum_of_warp(sum);
  observed = sum_of_warp(observed);
  weighted = sum_of_warp(weighted);
  if (lane != 0) return;
  const bool sees_keys = sum > 0;
  const double log_sum = sees_keys ? static_cast<double>(reference) + log2(sum) : 0;
  // As `index` counts, KV heads and rows are query heads and rows.
  lse[index] = sees_keys ? static_cast<float>(kLn2 * log_sum) : -INFINITY;
  problem.references[index] = sees_keys ? static_cast<float>(log_sum) : INFINITY;
  problem.dispersions[index] = sees_keys ? kLn2 * (observed * log2(sum) - weighted) / sum : 0;
}

/// Pass 2: one block per tile of columns and KV head. As many query heads at a time as have kMaxCudaRows rows; their
/// attention to the tile lies in shared memory, and one warp per query head adds it up, each lane its column.
template <class E>
__global__ void statistics(Problem problem, float* means, float* variances) {
  extern __shared__ float shared[];
  const std::uint32_t kv_head = blockIdx.y;
  const std::uint32_t rows = rows_of(problem);
  const std::uint32_t window = problem.queries.tokens;
  const std::uint32_t dim = problem.keys.dim;
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  float* keys = shared;
  float* attention = shared + kTileColumns * (dim + 1);  // [row of the batch][column]
  const std::uint32_t begin = blockIdx.x * kTileColumns;
  const std::uint32_t column = begin + lane;
  load_keys<E>(problem, kv_head, begin, problem.columns, keys);
  const std::uint32_t batch = max(1U, kMaxCudaRows / window) * window;
  unsigned bad = 0;
  for (std::uint32_t first = 0; first < rows; first += batch) {
    const std::uint32_t last = min(rows, first + batch);
    __syncthreads();
    for (std::uint32_t row = first + warp * kStepRows; row < last; row += kWarps * kStepRows) {
      float logits[kStepRows];
      multiply<E>(problem, kv_head, row, column, problem.columns, keys + lane * (dim + 1), logits, bad);
      for (std::uint32_t i = 0; i < kStepRows && row + i < last; ++i) {
        const float reference = problem.references[std::size_t{kv_head} * rows + row + i];
        attention[(row + i - first) * kTileColumns + lane] = exp2f(logits[i] - reference);
      }
    }
    __syncthreads();
    for (std::uint32_t head = warp; head < (last - first) / window; head += kWarps) {
      const float* of_head = attention + std::size_t{head} * window * kTileColumns + lane;
      float sum = 0;
      for (std::uint32_t row = 0; row < window; ++row) sum += of_head[row * kTileColumns];
      const float mean = sum / static_cast<float>(window);
      float squares = 0;
      for (std::uint32_t row = 0; row < window; ++row) {
        const float deviation = of_head[row * kTileColumns] - mean;
        squares = __fmaf_rn(deviation, deviation, squares);
      }
      if (column >= problem.columns) continue;
      const std::size_t query_head = std::size_t{kv_head} * problem.sharing + first / window + head;
      means[query_head * problem.columns + column] = mean;
      if (variances == nullptr) continue;
      variances[query_head * problem.columns + column] = window > 1 ? squares / static_cast<float>(window - 1) : 0.0F;
    }
  }
}

/// One block per query head and slice of its columns.
__global__ void add_variances(Problem problem, const float* variances) {
  const float* of_head = variances + std::size_t{blockIdx.x} * problem.columns;
  const std::uint32_t end = min(problem.columns, (blockIdx.y + 1) * kShiftColumns);
  double sum = 0;
#pragma unroll 8
  for (std::uint32_t column = blockIdx.y * kShiftColumns + threadIdx.x; column < end; column += kThreads) {
    sum += static_cast<double>(of_head[column]);
  }
  sum = sum_of_block<kWarps>(sum);
  if (threadIdx.x == 0) problem.shifts[std::size_t{blockIdx.x} * problem.shift_slices + blockIdx.y] = sum;
}

/// One block: H and V of the layer.
__global__ void add_heads(Problem problem, double* out) {
  double dispersion = 0;
  double shift = 0;
  const std::uint32_t rows = problem.queries.heads * problem.queries.tokens;
  for (std::uint32_t i = threadIdx.x; i < rows; i += kThreads) dispersion += problem.dispersions[i];
  const std::uint32_t shifts = problem.queries.heads * problem.shift_slices;
  for (std::uint32_t i = threadIdx.x; i < shifts; i += kThreads) shift += problem.shifts[i];
  dispersion = sum_of_block<kWarps>(dispersion);
  shift = sum_of_block<kWarps>(shift);
  if (threadIdx.x != 0) return;
  out[0] = dispersion;
  out[1] = shift;
}

/// One thread per KV head and column.
__global__ void pool(const float* means, const float* variances, std::uint32_t sharing, std::uint32_t columns,
                     float gamma, bool largest, std::uint32_t width, float* scores) {
  const std::uint32_t column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= columns) return;
  const std::uint32_t half = width / 2;
  float sum = 0;
  for (std::uint32_t i = 0; i < sharing; ++i) {
    const std::size_t first = (std::size_t{blockIdx.y} * sharing + i) * columns;
    float pooled = largest ? -INFINITY : 0.0F;
    for (std::uint32_t u = 0; u < width; ++u) {
      const std::uint32_t at = column + u - half;  // wraps around below 0
      if (at >= columns) continue;
      float value = means[first + at];
      if (variances != nullptr) value = __fmaf_rn(gamma, variances[first + at], value);
      pooled = largest ? fmaxf(pooled, value) : pooled + value;
    }
    sum += largest ? pooled : pooled / static_cast<float>(width);
  }
  scores[std::size_t{blockIdx.y} * columns + column] = sum / static_cast<float>(sharing);
}

/// The mean of the `best` highest of a window, added best first; of all, in their order, where there are no more.
__device__ float window_mean(const float* window, std::uint32_t size, std::uint32_t best) {
  float sum = 0;
  if (best >= size) {
    for (std::uint32_t i = 0; i < size; ++i) sum += window[i];
    return sum / static_cast<float>(size);
  }
  // The next after the one before, by rank and then by index: numbers of 64 bits that fall.
  const auto place = [&](std::uint32_t i) {
    return static_cast<std::uint64_t>(score_rank(window[i])) << 32 | (0xFFFFFFFFU - i);
  };
  std::uint64_t before = ~std::uint64_t{0};
  for (std::uint32_t n = 0; n < best; ++n) {
    std::uint64_t next = 0;
    for (std::uint32_t i = 0; i < size; ++i) {
      if (place(i) < before) next = max(next, place(i));
    }
    sum += window[0xFFFFFFFFU - static_cast<std::uint32_t>(next)];
    before = next;
  }
  return sum / static_cast<float>(best);
}

/// One warp per window, its lanes take turns with the query heads.
__global__ void score_windows(const float* means, std::uint32_t heads, std::uint32_t columns, std::uint32_t rows,
                              WindowRule rule, float* scores) {
  const std::uint32_t window = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const std::uint32_t begin = window * rule.tokens;
  if (begin >= columns) return;
  const std::uint32_t size = min(rule.tokens, columns - begin);
  double sum = 0;
  for (std::uint32_t head = threadIdx.x % kWarp; head < heads; head += kWarp) {
    sum += static_cast<double>(window_mean(means + std::size_t{head} * columns + begin, size, rule.best));
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % kWarp == 0) scores[window] = static_cast<float>(sum / heads) * static_cast<float>(rows);
}

constexpr std::uint32_t divide_up(std::uint32_t value, std::uint32_t unit) { return (value + unit - 1) / unit; }

/// As many as there can be, on any device.
std::uint32_t pieces_at_most(std::uint32_t tokens) {
  const std::uint32_t on_tensor_cores = std::min(divide_up(tokens, kShortestPiece), kMostPieces) + 1;
  return std::max(on_tensor_cores, divide_up(tokens, kSmallestPiece));
}

template <typename Kernel>
void allow_shared_memory(Kernel kernel, std::size_t bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

/// What the current device has; 0 without one.
int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

/// Queues all of an observation, given how the two passes over the keys are queued.
template <class FirstPass, class SecondPass>
void observe_in_passes(const Problem& problem, const CudaObservation& out, CUstream_st* stream, FirstPass first_pass,
                       SecondPass second_pass) {
  first_pass();
  const std::uint32_t rows = problem.queries.heads * problem.queries.tokens;
  finish_rows<<<divide_up(rows, kWarps), kThreads, 0, stream>>>(problem, out.lse);
  if (problem.columns > 0) second_pass();
  if (out.variance == nullptr) return;
  if (problem.columns > 0) {
    const dim3 slices(problem.queries.heads, problem.shift_slices);
    add_variances<<<slices, kThreads, 0, stream>>>(problem, out.variance);
  }
  add_heads<<<1, kThreads, 0, stream>>>(problem, out.dispersion);
}

template <class E>
void observe_as(Problem problem, const CudaObservation& out, CUstream_st* stream) {
  const std::size_t key_bytes = std::size_t{kTileColumns} * (problem.keys.dim + 1) * sizeof(float);
  const std::size_t attention_bytes = std::size_t{kMaxCudaRows} * kTileColumns * sizeof(float);
  problem.piece = value_for_device(kPieces);
  problem.pieces = divide_up(problem.keys.tokens, problem.piece);
  const auto add = [&] {
    const dim3 pieces(problem.pieces, problem.keys.heads);
    add_columns<E><<<pieces, kThreads, key_bytes, stream>>>(problem, out.not_finite);
  };
  const auto make_statistics = [&] {
    allow_shared_memory(statistics<E>, key_bytes + attention_bytes);
    const dim3 tiles(divide_up(problem.columns, kTileColumns), problem.keys.heads);
    statistics<E><<<tiles, kThreads, key_bytes + attention_bytes, stream>>>(problem, out.mean, out.variance);
  };
  observe_in_passes(problem, out, stream, add, make_statistics);
}

/// How units of so many rows are shared out; nothing where not even one query head's fit in a block.
std::optional<tensor::Blocks> blocks_of(const Problem& problem, std::uint32_t unit_rows) {
  const auto limit = static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const std::uint32_t units = divide_up(problem.queries.tokens, unit_rows);
  const auto fits = [&](std::uint32_t heads) {
    const tensor::Blocks blocks{units, heads, 1};
    return blocks.warps() <= tensor::kMostWarps &&
           tensor::shared_bytes(blocks, unit_rows, problem.keys.dim) + tensor::kMomentBytes <= limit;
  };
  std::uint32_t heads = std::min(problem.sharing, tensor::kMostWarps / units);
  while (heads > 0 && !fits(heads)) --heads;
  if (heads == 0) return std::nullopt;
  const std::uint32_t groups = divide_up(problem.sharing, heads);
  return tensor::Blocks{units, divide_up(problem.sharing, groups), groups};
}

/// Columns of a piece for blocks of which the device has room for `resident` at a time.
std::uint32_t piece_of(std::uint32_t tokens, std::uint32_t resident, std::uint32_t blocks_per_piece) {
  const std::uint32_t room = resident / blocks_per_piece;
  // One less than there is room for: columns that are not observed have pieces of their own.
  const std::uint32_t pieces = room > kFewPieces ? std::min(room - 1, kMostPieces) : kPiecesInTurns;
  const std::uint32_t columns = std::max(kShortestPiece, divide_up(tokens, pieces));
  return divide_up(columns, tensor::kTileColumns) * tensor::kTileColumns;
}

/// observe_as() on the tensor cores.
template <class E, unsigned kTiles>
void observe_in_tiles(Problem problem, const tensor::Blocks& blocks, const CudaObservation& out, CUstream_st* stream) {
  const auto add_kernel = tensor::add_columns<E, kTiles>;
  const auto statistics_kernel = tensor::statistics<E, kTiles>;
  const unsigned threads = blocks.warps() * kWarp;
  const std::size_t bytes = tensor::shared_bytes(blocks, tensor::kUnitRows<kTiles>, problem.keys.dim);
  allow_shared_memory(add_kernel, bytes);
  allow_shared_memory(statistics_kernel, bytes);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, statistics_kernel, static_cast<int>(threads), bytes);
  resident *= device_attribute(cudaDevAttrMultiProcessorCount);
  problem.piece =
      piece_of(problem.keys.tokens, static_cast<std::uint32_t>(resident), blocks.groups * problem.keys.heads);
  const std::uint32_t observed = tensor::observed_pieces(problem);
  problem.pieces = observed + divide_up(problem.keys.tokens - problem.columns, problem.piece);
  const auto add = [&] {
    const dim3 grid(blocks.groups, problem.pieces, problem.keys.heads);
    add_kernel<<<grid, threads, bytes, stream>>>(problem, blocks, out.not_finite);
  };
  const auto make_statistics = [&] {
    const dim3 grid(blocks.groups, observed, problem.keys.heads);
    statistics_kernel<<<grid, threads, bytes, stream>>>(problem, blocks, out.mean, out.variance);
  };
  observe_in_passes(problem, out, stream, add, make_statistics);
}

bool in_chunks(const HeadRows& rows) {
  const std::size_t addresses =
      reinterpret_cast<std::size_t>(rows.data) | rows.head_stride_bytes | rows.token_stride_bytes;
  return addresses % tensor::kChunkBytes == 0;
}

/// Whether the tensor cores do it; nothing is queued where they do not.
template <class E>
bool observe_on_tensor_cores(const Problem& problem, const CudaObservation& out, CUstream_st* stream) {
  if (problem.keys.dtype != E::kDType || problem.keys.dim % tensor::kFragmentDim != 0) return false;
  if (!in_chunks(problem.queries) || !in_chunks(problem.keys)) return false;
  const bool one_tile = problem.queries.tokens <= tensor::kFragmentRows;
  const auto blocks = blocks_of(problem, one_tile ? tensor::kUnitRows<1> : tensor::kUnitRows<2>);
  if (!blocks.has_value()) return false;
  if (one_tile) {
    observe_in_tiles<E, 1>(problem, *blocks, out, stream);
  } else {
    observe_in_tiles<E, 2>(problem, *blocks, out, stream);
  }
  return true;
}

}  // namespace

std::size_t cuda_observation_bytes(const HeadRows& queries, const HeadRows& keys) {
  const std::size_t rows = std::size_t{queries.heads} * queries.tokens;
  const std::size_t shifts = std::size_t{queries.heads} * divide_up(keys.tokens, kShiftColumns);
  return rows * pieces_at_most(keys.tokens) * sizeof(Totals) + (rows + shifts) * sizeof(double) + rows * sizeof(float);
}

Status cuda_observe(const HeadRows& queries, const HeadRows& keys, std::uint32_t columns, float scale,
                    std::byte* scratch, const CudaObservation& out, CUstream_st* stream) {
  const auto invalid = [](const char* message) { return Status(Code::kInvalid, std::string("observe: ") + message); };
  if (queries.dtype != keys.dtype || keys.dtype == DType::kOpaqueBytes) {
    return invalid("queries and keys must be of one float type");
  }
  if (keys.dim == 0 || keys.dim != queries.dim || keys.dim > kMaxCudaDim) {
    return invalid("dims differ, or are 0 or more than 256");
  }
  if (keys.heads == 0 || keys.heads > 65535 || queries.heads == 0 || queries.heads % keys.heads != 0) {
    return invalid("query heads are no multiple of KV heads, or there are more than 65535");
  }
  if (queries.tokens == 0 || queries.tokens > keys.tokens || queries.tokens > kMaxCudaRows || columns > keys.tokens) {
    return invalid("1 to 256 rows, and no more rows or columns than keys");
  }
  if (queries.heads > (1U << 20)) return invalid("more than 2^20 query heads");
  Problem problem{};
  problem.queries = queries;
  problem.keys = keys;
  problem.columns = columns;
  problem.scale = scale * kLog2E;
  problem.sharing = queries.heads / keys.heads;
  problem.shift_slices = divide_up(columns, kShiftColumns);
  const std::size_t rows = std::size_t{queries.heads} * queries.tokens;
  problem.totals = reinterpret_cast<Totals*>(scratch);
  problem.dispersions = reinterpret_cast<double*>(problem.totals + rows * pieces_at_most(keys.tokens));
  problem.shifts = problem.dispersions + rows;
  problem.references = reinterpret_cast<float*>(problem.shifts + std::size_t{queries.heads} * problem.shift_slices);
  cudaMemsetAsync(out.not_finite, 0, sizeof *out.not_finite, stream);
  if (!observe_on_tensor_cores<BFloat16Pairs>(problem, out, stream) &&
      !observe_on_tensor_cores<Float16Pairs>(problem, out, stream)) {
    with_element(keys.dtype, [&]<class E>(E) { observe_as<E>(problem, out, stream); });
  }
  return launched("observation");
}

Status cuda_window_scores(const float* means, std::uint32_t query_heads, std::uint32_t columns, std::uint32_t rows,
                          const WindowRule& rule, float* scores, CUstream_st* stream) {
  if (Status status = rule.validate(); !status) return status;
  const std::uint32_t windows = rule.count(columns);
  if (windows == 0 || query_heads == 0) return Status::ok();
  score_windows<<<(windows + kWarps - 1) / kWarps, kThreads, 0, stream>>>(means, query_heads, columns, rows, rule,
                                                                          scores);
  return launched("window");
}

Status cuda_cake_scores(const float* means, const float* variances, std::uint32_t query_heads, std::uint32_t kv_heads,
                        std::uint32_t columns, float gamma, const Pooling& pooling, float* scores,
                        CUstream_st* stream) {
  if (Status status = pooling.validate(); !status) return status;
  if (kv_heads == 0 || kv_heads > 65535 || query_heads % kv_heads != 0 || (gamma != 0 && variances == nullptr)) {
    return {Code::kInvalid, "scores: query heads are no multiple of KV heads, or gamma has no variances"};
  }
  if (columns == 0) return Status::ok();
  const dim3 grid((columns + kThreads - 1) / kThreads, kv_heads);
  pool<<<grid, kThreads, 0, stream>>>(means, gamma == 0 ? nullptr : variances, query_heads / kv_heads, columns, gamma,
                                      pooling.kind == Pooling::Kind::kMaximum,
                                      pooling.kind == Pooling::Kind::kNone ? 1 : pooling.width, scores);
  return launched("pooling");
}

}  // namespace kvern::evict
