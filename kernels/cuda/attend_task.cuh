#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend.h"
#include "kernels/cuda/elements.cuh"

/// What the kernels of attention share: the plan as it lies in device memory, and how a block hands in its result.
/// Logits are in units of ln 2, so that weights are powers of two.
namespace kvern::cuda {

constexpr float kLog2E = 1.4426950408889634F;
constexpr float kLn2 = 0.6931471805599453F;

struct Rows {
  const std::byte* data;
  std::size_t stride;
  const std::uint32_t* index;
  const float* lengths;
  DType dtype;
  /// Every row begins at a multiple of 16 bytes and has a multiple of 16.
  bool aligned;

  __device__ std::uint32_t number(std::uint32_t entry) const { return index != nullptr ? __ldg(index + entry) : entry; }
  __device__ const std::byte* row(std::uint32_t entry) const { return data + number(entry) * stride; }
};

/// The parts of a section.
struct Codes {
  const std::byte* codes;
  const std::uint16_t* scales;  ///< bfloat16
  const std::byte* offsets;     ///< of the segment's dtype; null: there are none
  std::uint32_t group;          ///< tokens (keys) or channels (values)
};

struct Segment {
  Rows keys;
  Rows values;
  const float* bias;
  const std::int32_t* positions;
  /// 0: rows; 4 and 8: sections.
  std::uint32_t bits;
  /// Of int4: what is taken off a code before it is multiplied, for there is no offset.
  float centre;
  Codes key_codes;
  Codes value_codes;
};

/// Entries [begin, end) of a segment, with all that a block has to know of them: waiting for one load is long enough.
struct Piece {
  Segment segment;
  std::uint32_t head;
  std::uint32_t begin;
  std::uint32_t end;
  /// The pieces of its head follow each other: the first, and their number.
  std::uint32_t first_of_head;
  std::uint32_t of_head;
};

struct Task {
  const Piece* pieces;
  /// Blocks that are done, by head and block of queries. 0 between runs.
  std::uint32_t* done;
  /// Per piece and query: value_dim sums of weighted values; what the weights are relative to; their total.
  float* sums;
  float* references;
  float* totals;

  const std::byte* queries;
  std::size_t query_head_stride;
  std::size_t query_row_stride;
  DType query_dtype;
  float scale;  ///< of <q, k>, in units of ln 2
  const std::int32_t* query_positions;
  std::uint32_t rows;          ///< per query head
  std::uint32_t count;         ///< queries per KV head
  std::uint32_t query_blocks;  ///< blocks that share a piece
  std::uint32_t warp_bytes;    ///< of dynamic shared memory
  std::uint32_t dim;
  std::uint32_t value_dim;
  float* output;
  float* lse;

  __device__ const std::byte* query(std::uint32_t head, std::uint32_t of_head) const {
    const std::size_t query_head = std::size_t{head} * (count / rows) + of_head / rows;
    return queries + query_head * query_head_stride + of_head % rows * query_row_stride;
  }
};

/// Zero for what is below the smallest normal number.
__device__ inline float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

/// What weights are relative to when the largest logit is given: nothing may be subtracted from -infinity.
__device__ inline float finite_reference(float largest) { return largest == -INFINITY ? 0.0F : largest; }

/// The result of one warp: sums relative to a reference.
template <unsigned kQueries, unsigned kDim>
struct WarpResult {
  float sums[kQueries][kDim];
  float references[kQueries];
  float totals[kQueries];
};

/// Neighbouring sums of weighted values, relative to a reference, and the total of the weights.
template <unsigned kCount>
struct PartialSums {
  float sums[kCount];
  float reference;
  float total;

  __device__ void add(const PartialSums& other) {
    const float now = fmaxf(reference, other.reference);
    const float base = finite_reference(now);
    const float mine = power_of_two(reference - base);
    const float others = power_of_two(other.reference - base);
    total = fmaf(total, mine, other.total * others);
    for (unsigned i = 0; i < kCount; ++i) sums[i] = fmaf(sums[i], mine, other.sums[i] * others);
    reference = now;
  }
};

/// The outputs of a block's queries from the results of their head's pieces [begin, end), in order. All threads of the
/// block; scratch: shared memory for a PartialSums of each.
template <unsigned kThreads, unsigned kVector>
__device__ void combine_pieces(const Task& task, std::uint32_t head, std::uint32_t begin, std::uint32_t end,
                               std::uint32_t first_query, std::uint32_t query_count, void* scratch) {
  /// Results that a thread waits for together.
  constexpr unsigned kTogether = 8;
  using Partial = PartialSums<kVector>;
  auto* parts = static_cast<Partial*>(scratch);
  const std::uint32_t columns = task.value_dim / kVector;
  const std::uint32_t width = columns * query_count;
  for (std::uint32_t first = 0; first < width; first += kThreads) {
    const std::uint32_t here = min(width - first, kThreads);
    const std::uint32_t slices = kThreads / here;
    const std::uint32_t slice = threadIdx.x / here;
    const std::uint32_t query = (first + threadIdx.x % here) / columns;
    const std::uint32_t column = (first + threadIdx.x % here) % columns * kVector;
    Partial result{{}, -INFINITY, 0};
    for (std::uint32_t piece = begin + slice; slice < slices && piece < end; piece += kTogether * slices) {
      Partial loaded[kTogether];
      for (unsigned i = 0; i < kTogether; ++i) {
        const std::uint32_t of = piece + i * slices;
        const std::size_t at = std::size_t{min(of, end - 1)} * task.count + first_query + query;
        const float reference = __ldcg(task.references + at);
        loaded[i].reference = of < end ? reference : -INFINITY;
        loaded[i].total = __ldcg(task.totals + at);
        const float* sums = task.sums + at * task.value_dim + column;
        if constexpr (kVector == 4) {
          const float4 four = __ldcg(reinterpret_cast<const float4*>(sums));
          loaded[i].sums[0] = four.x, loaded[i].sums[1] = four.y, loaded[i].sums[2] = four.z,
          loaded[i].sums[3] = four.w;
        } else {
          loaded[i].sums[0] = __ldcg(sums);
        }
      }
      for (unsigned i = 0; i < kTogether; ++i) {
        if (piece + i * slices < end) result.add(loaded[i]);
      }
    }
    parts[threadIdx.x] = result;
    __syncthreads();
    if (slice == 0) {
      for (std::uint32_t other = 1; other < slices; ++other) result.add(parts[threadIdx.x + other * here]);
      const std::size_t row = std::size_t{head} * task.count + first_query + query;
      const float inverse = result.total == 0 ? 0.0F : 1.0F / result.total;
      for (unsigned i = 0; i < kVector; ++i) task.output[row * task.value_dim + column + i] = result.sums[i] * inverse;
      if (column == 0) task.lse[row] = (finite_reference(result.reference) + log2f(result.total)) * kLn2;
    }
    __syncthreads();
  }
}

/// Combines the results of the block's warps, result_of(warp), and hands them in. The last block of a head and its
/// queries makes the output: which one that is does not matter to the result. All threads of the block, after a
/// barrier.
template <unsigned kWarps, unsigned kQueries, unsigned kDim, class ResultOf>
__device__ void hand_in(const Task& task, std::uint32_t piece, std::uint32_t query_block, ResultOf result_of,
                        void* scratch) {
  constexpr unsigned kThreads = kWarps * kWarp;
  const std::uint32_t head = task.pieces[piece].head;
  const std::uint32_t first_query = query_block * kQueries;
  const std::uint32_t query_count = min(kQueries, task.count - first_query);
  __shared__ float factors[kWarps][kQueries];
  if (threadIdx.x < query_count) {
    const unsigned query = threadIdx.x;
    float all = -INFINITY;
    for (unsigned i = 0; i < kWarps; ++i) all = fmaxf(all, result_of(i).references[query]);
    const float reference = finite_reference(all);
    float total = 0;
    for (unsigned i = 0; i < kWarps; ++i) {
      factors[i][query] = power_of_two(result_of(i).references[query] - reference);
      total = fmaf(factors[i][query], result_of(i).totals[query], total);
    }
    const std::size_t at = std::size_t{piece} * task.count + first_query + query;
    task.references[at] = all;
    task.totals[at] = total;
  }
  __syncthreads();
  for (std::uint32_t i = threadIdx.x; i < query_count * kDim; i += kThreads) {
    const std::uint32_t query = i / kDim;
    const std::uint32_t column = i % kDim;
    if (column >= task.value_dim) continue;
    float sum = 0;
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      sum = fmaf(factors[warp][query], result_of(warp).sums[query][column], sum);
    }
    task.sums[(std::size_t{piece} * task.count + first_query + query) * task.value_dim + column] = sum;
  }
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // What the block has written is seen by whoever sees its arrival.
    __threadfence();
    const std::uint32_t pieces = task.pieces[piece].of_head;
    // Wraps to 0 at the last one, for the next run.
    last = atomicInc(task.done + std::size_t{head} * task.query_blocks + query_block, pieces - 1) == pieces - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const std::uint32_t begin = task.pieces[piece].first_of_head;
  const std::uint32_t end = begin + task.pieces[piece].of_head;
  if (task.value_dim % 4 == 0) {
    combine_pieces<kThreads, 4>(task, head, begin, end, first_query, query_count, scratch);
  } else {
    combine_pieces<kThreads, 1>(task, head, begin, end, first_query, query_count, scratch);
  }
}

}  // namespace kvern::cuda
