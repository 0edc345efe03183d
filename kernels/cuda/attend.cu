#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/elements.cuh"

namespace kvern {
namespace {

using namespace cuda;

constexpr unsigned kWarps = 4;
/// Queries that a block works on, so that a key is read once for all query heads of most models' groups.
constexpr unsigned kQueries = 4;
/// Columns of a value that a lane holds, in pairs.
constexpr unsigned kPairs = kMaxAttendDim / kWarp / 2;
/// What fits in the 4 KiB of a launch's parameters, so that nothing has to be uploaded before it.
constexpr unsigned kSegmentsPerLaunch = 32;
constexpr unsigned kHeadsPerLaunch = 512;

/// Entries of a piece (one block) by compute capability. Enough blocks to fill the device at 32k tokens of 8 heads,
/// enough tokens per block that combining stays small. Not measured yet.
constexpr Policy kPieces[] = {{8, 1024}, {9, 1024}, {10, 1024}};
constexpr std::uint32_t kSmallestPiece = smallest_value(kPieces);

/// Neighbouring elements that move in one instruction.
template <typename T, unsigned kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

struct Rows {
  const std::byte* data;
  std::size_t stride;
  const std::uint32_t* index;
  const float* lengths;
  DType dtype;
  /// Every row begins at a multiple of 16 bytes and has a multiple of 16.
  bool aligned;

  __device__ const std::byte* row(std::uint32_t entry) const {
    return data + (index != nullptr ? index[entry] : entry) * stride;
  }
};

struct Segment {
  Rows keys;
  Rows values;
  const float* bias;
  const std::int32_t* positions;
  std::uint32_t entries;
  std::uint32_t head;
  /// Where its pieces' results begin, in pieces.
  std::uint32_t first_piece;
};
struct Segments {
  Segment of[kSegmentsPerLaunch];
};
static_assert(sizeof(Segments) <= 3840);

struct FirstPieces {
  std::uint32_t of[kHeadsPerLaunch + 1];
};

/// What all launches share.
struct Shared {
  const std::byte* queries;
  std::size_t query_head_stride;
  std::size_t query_row_stride;
  DType query_dtype;
  float scale;
  const std::int32_t* query_positions;
  std::uint32_t rows;   ///< per query head
  std::uint32_t count;  ///< queries per KV head
  std::uint32_t dim;
  std::uint32_t value_dim;
  std::uint32_t piece;
  /// Per piece and query: value_dim sums; then per piece and query the largest logit and the total of the weights.
  float* sums;
  float* largest;
  float* totals;
};

/// Calls run with the element type of a dtype.
template <class Run>
__device__ void with_type(DType dtype, Run run) {
  if (dtype == DType::kFloat32) {
    run(Float32());
  } else if (dtype == DType::kFloat16) {
    run(Float16());
  } else {
    run(BFloat16());
  }
}

__device__ float element_at(DType dtype, const std::byte* row, std::uint32_t column) {
  float value = 0;
  with_type(dtype, [&]<class E>(E) { value = E::to_float(reinterpret_cast<const typename E::Raw*>(row)[column]); });
  return value;
}

/// Dot products of a lane's own key with the block's queries.
template <class E, unsigned kCount>
__device__ void dot_products(const std::byte* row, std::uint32_t dim, const float (*queries)[kMaxAttendDim],
                             float* dots) {
  using Raw = typename E::Raw;
  const auto* elements = reinterpret_cast<const Raw*>(row);
  for (std::uint32_t column = 0; column < dim; column += kCount) {
    const auto pack = *reinterpret_cast<const Pack<Raw, kCount>*>(elements + column);
    for (unsigned i = 0; i < kCount; ++i) {
      const float key = E::to_float(pack.values[i]);
      for (unsigned query = 0; query < kQueries; ++query) {
        dots[query] = fmaf(key, queries[query][column + i], dots[query]);
      }
    }
  }
}

/// Adds a weighted value: each lane its own columns.
template <class E, bool kAligned>
__device__ void add_row(const std::byte* row, std::uint32_t dim, unsigned lane, const float (*weights)[kWarp],
                        unsigned entry, float (*sums)[kPairs][2]) {
  using Raw = typename E::Raw;
  const auto* elements = reinterpret_cast<const Raw*>(row);
  for (unsigned pair = 0; pair < kPairs; ++pair) {
    const std::uint32_t column = (pair * kWarp + lane) * 2;
    if (column >= dim) return;
    float values[2];
    if (kAligned) {
      const auto pack = *reinterpret_cast<const Pack<Raw, 2>*>(elements + column);
      values[0] = E::to_float(pack.values[0]);
      values[1] = E::to_float(pack.values[1]);
    } else {
      values[0] = E::to_float(elements[column]);
      values[1] = column + 1 < dim ? E::to_float(elements[column + 1]) : 0.0F;
    }
    for (unsigned query = 0; query < kQueries; ++query) {
      const float weight = weights[query][entry];
      sums[query][pair][0] = fmaf(weight, values[0], sums[query][pair][0]);
      sums[query][pair][1] = fmaf(weight, values[1], sums[query][pair][1]);
    }
  }
}

/// One block per piece of a segment and kQueries queries. Its warps take turns with 32 entries each: first every lane
/// multiplies a key of its own, then all lanes add up the values. The warps' results are combined in order.
__global__ void attend_pieces(const __grid_constant__ Segments segments, Shared shared) {
  __shared__ float queries[kQueries][kMaxAttendDim];
  __shared__ float weights[kWarps][kQueries][kWarp];
  __shared__ float warp_sums[kWarps][kQueries][kMaxAttendDim];
  __shared__ float warp_largest[kWarps][kQueries];
  __shared__ float warp_totals[kWarps][kQueries];
  const Segment& segment = segments.of[blockIdx.y];
  const std::uint32_t begin = blockIdx.x * shared.piece;
  if (begin >= segment.entries) return;
  const std::uint32_t end = min(begin + shared.piece, segment.entries);
  const std::uint32_t first_query = blockIdx.z * kQueries;
  const std::uint32_t query_count = min(kQueries, shared.count - first_query);
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;

  for (unsigned i = threadIdx.x; i < kQueries * shared.dim; i += blockDim.x) {
    const std::uint32_t query = i / shared.dim;
    const std::uint32_t column = i % shared.dim;
    float value = 0;
    if (query < query_count) {
      const std::uint32_t of_head = first_query + query;
      const std::uint32_t heads_before = segment.head * (shared.count / shared.rows) + of_head / shared.rows;
      const std::byte* row =
          shared.queries + heads_before * shared.query_head_stride + of_head % shared.rows * shared.query_row_stride;
      value = shared.scale * element_at(shared.query_dtype, row, column);
    }
    queries[query][column] = value;
  }
  __syncthreads();

  float largest[kQueries];
  float totals[kQueries];
  float sums[kQueries][kPairs][2] = {};
  for (unsigned query = 0; query < kQueries; ++query) {
    largest[query] = -INFINITY;
    totals[query] = 0;
  }
  for (std::uint32_t tile = begin + warp * kWarp; tile < end; tile += kWarps * kWarp) {
    const std::uint32_t entry = tile + lane;
    float dots[kQueries] = {};
    if (entry < end) {
      const std::byte* row = segment.keys.row(entry);
      with_type(segment.keys.dtype, [&]<class E>(E) {
        if (segment.keys.aligned) {
          dot_products<E, 16 / sizeof(typename E::Raw)>(row, shared.dim, queries, dots);
        } else {
          dot_products<E, 1>(row, shared.dim, queries, dots);
        }
      });
    }
    for (unsigned query = 0; query < kQueries; ++query) {
      float logit = dots[query];
      if (entry < end) {
        if (segment.keys.lengths != nullptr) logit *= segment.keys.lengths[entry];
        if (segment.bias != nullptr) logit += segment.bias[entry];
        if (segment.positions != nullptr && shared.query_positions != nullptr && query < query_count &&
            segment.positions[entry] > shared.query_positions[(first_query + query) % shared.rows]) {
          logit = -INFINITY;
        }
      } else {
        logit = -INFINITY;
      }
      const float now = fmaxf(largest[query], largest_of_warp(logit));
      const float reference = now == -INFINITY ? 0.0F : now;
      const float factor = expf(largest[query] - reference);
      float weight = expf(logit - reference);
      totals[query] = totals[query] * factor + sum_of_warp(weight);
      largest[query] = now;
      for (unsigned pair = 0; pair < kPairs; ++pair) {
        sums[query][pair][0] *= factor;
        sums[query][pair][1] *= factor;
      }
      if (entry < end && segment.values.lengths != nullptr) weight *= segment.values.lengths[entry];
      weights[warp][query][lane] = weight;
    }
    __syncwarp();
    const std::uint32_t tile_entries = min(kWarp, end - tile);
    with_type(segment.values.dtype, [&]<class E>(E) {
      for (unsigned i = 0; i < tile_entries; ++i) {
        const std::byte* row = segment.values.row(tile + i);
        if (segment.values.aligned) {
          add_row<E, true>(row, shared.value_dim, lane, weights[warp], i, sums);
        } else {
          add_row<E, false>(row, shared.value_dim, lane, weights[warp], i, sums);
        }
      }
    });
    __syncwarp();
  }

  for (unsigned query = 0; query < kQueries; ++query) {
    for (unsigned pair = 0; pair < kPairs; ++pair) {
      const unsigned column = (pair * kWarp + lane) * 2;
      warp_sums[warp][query][column] = sums[query][pair][0];
      warp_sums[warp][query][column + 1] = sums[query][pair][1];
    }
    if (lane == 0) {
      warp_largest[warp][query] = largest[query];
      warp_totals[warp][query] = totals[query];
    }
  }
  __syncthreads();
  const std::size_t piece = std::size_t{segment.first_piece} + blockIdx.x;
  for (unsigned query = 0; query < query_count; ++query) {
    const std::size_t at = piece * shared.count + first_query + query;
    float all = -INFINITY;
    for (unsigned i = 0; i < kWarps; ++i) all = fmaxf(all, warp_largest[i][query]);
    const float reference = all == -INFINITY ? 0.0F : all;
    for (unsigned column = threadIdx.x; column < shared.value_dim; column += blockDim.x) {
      float sum = 0;
      for (unsigned i = 0; i < kWarps; ++i) {
        sum = fmaf(expf(warp_largest[i][query] - reference), warp_sums[i][query][column], sum);
      }
      shared.sums[at * shared.value_dim + column] = sum;
    }
    if (threadIdx.x == 0) {
      float total = 0;
      for (unsigned i = 0; i < kWarps; ++i) {
        total = fmaf(expf(warp_largest[i][query] - reference), warp_totals[i][query], total);
      }
      shared.largest[at] = all;
      shared.totals[at] = total;
    }
  }
}

/// One block per query and KV head: its pieces in order.
__global__ void combine_pieces(const __grid_constant__ FirstPieces first, Shared shared, std::uint32_t first_head,
                               float* output, float* lse) {
  const std::uint32_t query = blockIdx.x;
  const std::uint32_t begin = first.of[blockIdx.y];
  const std::uint32_t end = first.of[blockIdx.y + 1];
  float all = -INFINITY;
  for (std::uint32_t piece = begin; piece < end; ++piece) {
    all = fmaxf(all, shared.largest[std::size_t{piece} * shared.count + query]);
  }
  const float reference = all == -INFINITY ? 0.0F : all;
  float total = 0;
  for (std::uint32_t piece = begin; piece < end; ++piece) {
    const std::size_t at = std::size_t{piece} * shared.count + query;
    total = fmaf(expf(shared.largest[at] - reference), shared.totals[at], total);
  }
  const std::size_t row = std::size_t{first_head + blockIdx.y} * shared.count + query;
  for (unsigned column = threadIdx.x; column < shared.value_dim; column += blockDim.x) {
    float sum = 0;
    for (std::uint32_t piece = begin; piece < end; ++piece) {
      const std::size_t at = std::size_t{piece} * shared.count + query;
      sum = fmaf(expf(shared.largest[at] - reference), shared.sums[at * shared.value_dim + column], sum);
    }
    output[row * shared.value_dim + column] = total == 0 ? 0.0F : sum / total;
  }
  if (threadIdx.x == 0) lse[row] = reference + logf(total);
}

Rows device_rows(const AttendRows& rows, std::uint32_t dim) {
  const std::size_t row_bytes = dim * dtype_bytes(rows.dtype);
  const bool aligned = (reinterpret_cast<std::uintptr_t>(rows.data) | rows.stride_bytes | row_bytes) % 16 == 0;
  return {rows.data, rows.stride_bytes, rows.index, rows.lengths, rows.dtype, aligned};
}

std::uint32_t pieces_of(std::uint32_t entries, std::uint32_t piece) { return (entries + piece - 1) / piece; }

}  // namespace

std::size_t cuda_attend_workspace_floats(const AttendProblem& problem) {
  std::size_t pieces = 0;
  for (const auto& segments : problem.heads) {
    for (const AttendSegment& segment : segments) pieces += pieces_of(segment.entries, kSmallestPiece);
  }
  const std::size_t count = std::size_t{problem.queries.heads} / problem.heads.size() * problem.queries.tokens;
  return pieces * count * (problem.value_dim + 2);
}

Status cuda_attend(const AttendProblem& problem, float* workspace, std::size_t workspace_floats, float* output,
                   float* lse, CUstream_st* stream) {
  if (Status status = problem.validate(); !status) return status;
  if (workspace_floats < cuda_attend_workspace_floats(problem)) {
    return {Code::kInvalid, "attend: workspace is too small"};
  }
  const HeadRows& queries = problem.queries;
  const std::uint32_t piece = value_for_device(kPieces);
  const auto heads = static_cast<std::uint32_t>(problem.heads.size());
  std::vector<Segment> segments;
  std::vector<std::uint32_t> first_pieces;
  std::uint32_t pieces = 0;
  std::uint32_t longest = 0;
  for (std::uint32_t head = 0; head < heads; ++head) {
    first_pieces.push_back(pieces);
    for (const AttendSegment& segment : problem.heads[head]) {
      if (segment.entries == 0) continue;
      if (segment.keys.reader != nullptr || segment.values.reader != nullptr) {
        return {Code::kRefused, "attend: encoded rows have to be decoded before the GPU attends to them"};
      }
      segments.push_back({device_rows(segment.keys, queries.dim), device_rows(segment.values, problem.value_dim),
                          segment.bias, segment.positions, segment.entries, head, pieces});
      pieces += pieces_of(segment.entries, piece);
      longest = std::max(longest, segment.entries);
    }
  }
  first_pieces.push_back(pieces);

  Shared shared{};
  shared.queries = queries.data;
  shared.query_head_stride = queries.head_stride_bytes;
  shared.query_row_stride = queries.token_stride_bytes;
  shared.query_dtype = queries.dtype;
  shared.scale =
      problem.scale != 0 ? problem.scale : static_cast<float>(1.0 / std::sqrt(static_cast<double>(queries.dim)));
  shared.query_positions = problem.query_positions;
  shared.rows = queries.tokens;
  shared.count = queries.heads / heads * queries.tokens;
  shared.dim = queries.dim;
  shared.value_dim = problem.value_dim;
  shared.piece = piece;
  shared.sums = workspace;
  shared.largest = workspace + std::size_t{pieces} * shared.count * problem.value_dim;
  shared.totals = shared.largest + std::size_t{pieces} * shared.count;

  for (std::size_t first = 0; first < segments.size(); first += kSegmentsPerLaunch) {
    Segments batch{};
    const std::size_t count = std::min<std::size_t>(kSegmentsPerLaunch, segments.size() - first);
    std::copy_n(segments.begin() + static_cast<std::ptrdiff_t>(first), count, batch.of);
    const dim3 grid(pieces_of(longest, piece), static_cast<unsigned>(count), (shared.count + kQueries - 1) / kQueries);
    attend_pieces<<<grid, kWarps * kWarp, 0, stream>>>(batch, shared);
  }
  for (std::uint32_t first = 0; first < heads; first += kHeadsPerLaunch) {
    FirstPieces batch{};
    const std::uint32_t count = std::min(kHeadsPerLaunch, heads - first);
    std::copy_n(first_pieces.begin() + first, count + 1, batch.of);
    combine_pieces<<<dim3(shared.count, count), kWarps * kWarp, 0, stream>>>(batch, shared, first, output, lse);
  }
  return launched("attend");
}

}  // namespace kvern
