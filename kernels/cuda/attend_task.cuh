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

  __device__ std::uint32_t number(std::uint32_t entry) const { return index != nullptr ? index[entry] : entry; }
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
struct alignas(16) Piece {
  Segment segment;
  std::uint32_t head;
  std::uint32_t begin;
  std::uint32_t end;
  /// The pieces of its head follow each other: the first, and their number.
  std::uint32_t first_of_head;
  std::uint32_t of_head;
};

/// What the weights of a query in a piece are relative to, and their total.
struct alignas(8) PieceWeights {
  float reference;
  float total;
};

struct Task {
  const Piece* pieces;
  /// Blocks that are done, by head and block of queries. 0 between runs.
  std::uint32_t* done;
  /// Per piece and query: value_dim sums of weighted values, and their weights.
  float* sums;
  PieceWeights* weights;

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

/// Programmatic dependent launch, where the device has it and the host asks for it: blocks of the next kernel may begin
/// where there is room for them, and get as far as their wait_for_previous().
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Until the kernels before are done, and what they wrote is seen. Every thread, before it reads anything but the plan
/// (which copies write, not kernels) and before it writes.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Copies a piece to shared memory. All threads of the block.
__device__ inline void take_piece(const Task& task, std::uint32_t number, Piece& piece) {
  static_assert(sizeof(Piece) % sizeof(uint4) == 0);
  if (threadIdx.x < sizeof(Piece) / sizeof(uint4)) {
    reinterpret_cast<uint4*>(&piece)[threadIdx.x] = reinterpret_cast<const uint4*>(task.pieces + number)[threadIdx.x];
  }
  __syncthreads();
}

/// Zero for what is below the smallest normal number.
__device__ inline float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

/// What weights are relative to when the largest logit is given: nothing may be subtracted from -infinity.
__device__ inline float finite_reference(float largest) { return largest == -INFINITY ? 0.0F : largest; }

/// The result of one warp: sums relative to a reference. Rows lie four banks apart, so that lanes that store 16 bytes
/// of different queries seldom meet.
template <unsigned kQueries, unsigned kDim>
struct alignas(16) WarpResult {
  float sums[kQueries][kDim + 4];
  float references[kQueries];
  float totals[kQueries];
};

/// Neighbouring sums of weighted values, relative to a reference, and the total of the weights.
template <unsigned kCount>
struct PartialSums {
  float sums[kCount] = {};
  float reference = -INFINITY;
  float total = 0;

  /// Adds all of them: their factors do not wait for each other.
  template <unsigned kOthers>
  __device__ void add(const PartialSums (&others)[kOthers]) {
    float now = reference;
    for (const PartialSums& other : others) now = fmaxf(now, other.reference);
    const float base = finite_reference(now);
    const float mine = power_of_two(reference - base);
    total *= mine;
    for (float& sum : sums) sum *= mine;
    for (const PartialSums& other : others) {
      const float factor = power_of_two(other.reference - base);
      total = fmaf(other.total, factor, total);
      for (unsigned i = 0; i < kCount; ++i) sums[i] = fmaf(other.sums[i], factor, sums[i]);
    }
    reference = now;
  }
  __device__ void add(const PartialSums& other) {
    const PartialSums others[1] = {other};
    add(others);
  }
};

/// The outputs of a block's queries from the results of their head's pieces [begin, end), in order. All threads of the
/// block; scratch: shared memory for a PartialSums of each.
template <unsigned kThreads, unsigned kDim, unsigned kVector>
__device__ void combine_pieces(const Task& task, std::uint32_t head, std::uint32_t begin, std::uint32_t end,
                               std::uint32_t first_query, std::uint32_t query_count, void* scratch) {
  /// Results that a thread waits for together: half of the 33 pieces per head that eight heads have on 132
  /// multiprocessors, and what there are registers for.
  constexpr unsigned kTogether = kVector == 4 && kThreads > 128 ? 17 : 8;
  using Partial = PartialSums<kVector>;
  auto* parts = static_cast<Partial*>(scratch);
  constexpr std::uint32_t kColumns = kDim / kVector;
  const std::uint32_t width = kColumns * query_count;
  for (std::uint32_t first = 0; first < width; first += kThreads) {
    const std::uint32_t here = min(width - first, kThreads);
    const std::uint32_t slices = kThreads / here;
    const std::uint32_t slice = threadIdx.x / here;
    const std::uint32_t query = (first + threadIdx.x % here) / kColumns;
    const std::uint32_t column = (first + threadIdx.x % here) % kColumns * kVector;
    const bool working = slice < slices && column < task.value_dim;
    // The thread's next result, and how far behind it the following one lies.
    const std::size_t at = std::size_t{begin + slice} * task.count + first_query + query;
    const float* sums = task.sums + at * task.value_dim + column;
    const PieceWeights* weights = task.weights + at;
    const std::size_t step = std::size_t{slices} * task.count;
    Partial result;
    for (std::uint32_t piece = begin + slice; working && piece < end; piece += kTogether * slices) {
      Partial loaded[kTogether];
      for (unsigned i = 0; i < kTogether; ++i, weights += step, sums += step * task.value_dim) {
        if (piece + i * slices >= end) continue;
        const float2 pair = __ldcg(reinterpret_cast<const float2*>(weights));
        loaded[i].reference = pair.x;
        loaded[i].total = pair.y;
        if constexpr (kVector == 4) {
          const float4 four = __ldcg(reinterpret_cast<const float4*>(sums));
          loaded[i].sums[0] = four.x, loaded[i].sums[1] = four.y, loaded[i].sums[2] = four.z,
          loaded[i].sums[3] = four.w;
        } else {
          loaded[i].sums[0] = __ldcg(sums);
        }
      }
      result.add(loaded);
    }
    parts[threadIdx.x] = result;
    __syncthreads();
    if (working && slice == 0) {
#pragma unroll 1
      for (std::uint32_t other = 1; other < slices; ++other) result.add(parts[threadIdx.x + other * here]);
      const std::size_t row = std::size_t{head} * task.count + first_query + query;
      const float inverse = result.total == 0 ? 0.0F : 1.0F / result.total;
      for (unsigned i = 0; i < kVector; ++i) task.output[row * task.value_dim + column + i] = result.sums[i] * inverse;
      if (column == 0) task.lse[row] = (finite_reference(result.reference) + log2f(result.total)) * kLn2;
    }
    __syncthreads();
  }
}

/// Counts one of `of` in; true for the last, which sees what all others have written before. Leaves 0.
__device__ inline bool arrive_last(std::uint32_t* done, std::uint32_t of) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(done), "r"(of - 1) : "memory");
  return before == of - 1;
}

/// Combines the results of the block's warps, result_of(warp), and hands them in; task.value_dim is a multiple of
/// kVector. The last block of a head and its queries makes the output: which one that is does not matter to the result.
/// All threads of the block, after a barrier.
template <unsigned kWarps, unsigned kQueries, unsigned kDim, unsigned kVector, class ResultOf>
__device__ void hand_in(const Task& task, const Piece& piece, std::uint32_t number, std::uint32_t query_block,
                        ResultOf result_of, void* scratch) {
  constexpr unsigned kThreads = kWarps * kWarp;
  constexpr unsigned kColumns = kDim / kVector;
  const std::uint32_t first_query = query_block * kQueries;
  const std::uint32_t query_count = min(kQueries, task.count - first_query);
#pragma unroll 1
  for (std::uint32_t i = threadIdx.x; i < query_count * kColumns; i += kThreads) {
    const std::uint32_t query = i / kColumns;
    const std::uint32_t column = i % kColumns * kVector;
    if (column >= task.value_dim) continue;
    PartialSums<kVector> of_warps[kWarps];
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      const auto& result = result_of(warp);
      for (unsigned j = 0; j < kVector; ++j) of_warps[warp].sums[j] = result.sums[query][column + j];
      of_warps[warp].reference = result.references[query];
      of_warps[warp].total = result.totals[query];
    }
    PartialSums<kVector> sum;
    sum.add(of_warps);
    const std::size_t at = std::size_t{number} * task.count + first_query + query;
    float* sums = task.sums + at * task.value_dim + column;
    if constexpr (kVector == 4) {
      *reinterpret_cast<float4*>(sums) = {sum.sums[0], sum.sums[1], sum.sums[2], sum.sums[3]};
    } else {
      *sums = sum.sums[0];
    }
    if (column == 0) task.weights[at] = {sum.reference, sum.total};
  }
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = piece.of_head == 1 ||
           arrive_last(task.done + std::size_t{piece.head} * task.query_blocks + query_block, piece.of_head);
  }
  __syncthreads();
  if (!last) return;
  combine_pieces<kThreads, kDim, kVector>(task, piece.head, piece.first_of_head, piece.first_of_head + piece.of_head,
                                          first_query, query_count, scratch);
}

}  // namespace kvern::cuda
