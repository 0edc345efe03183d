#pragma once

#include "kernels/cuda/attend_task.cuh"

/// Attention over rows of any float type, dimension and alignment, on the ordinary units.
namespace kvern::cuda::any {

constexpr unsigned kWarps = 4;
/// Queries that a block works on, so that a key is read once for all query heads of most models' groups.
constexpr unsigned kQueries = 4;
/// Columns of a value that a lane holds, in pairs.
constexpr unsigned kPairs = kMaxAttendDim / kWarp / 2;

/// Neighbouring elements that move in one instruction.
template <typename T, unsigned kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
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

__device__ inline float element_at(DType dtype, const std::byte* row, std::uint32_t column) {
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

/// One block per piece and kQueries queries. Its warps take turns with 32 entries each: first every lane multiplies a
/// key of its own, then all lanes add up the values.
__global__ void __launch_bounds__(kWarps* kWarp) attend_pieces(const __grid_constant__ Task task) {
  __shared__ float queries[kQueries][kMaxAttendDim];
  __shared__ float weights[kWarps][kQueries][kWarp];
  __shared__ WarpResult<kQueries, kMaxAttendDim> results[kWarps];
  const std::uint32_t query_block = blockIdx.x % task.query_blocks;
  const std::uint32_t number = blockIdx.x / task.query_blocks;
  __shared__ Piece piece;
  let_next_begin();
  take_piece(task, number, piece);
  wait_for_previous();
  const Segment& segment = piece.segment;
  const std::uint32_t first_query = query_block * kQueries;
  const std::uint32_t query_count = min(kQueries, task.count - first_query);
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;

  for (unsigned i = threadIdx.x; i < kQueries * task.dim; i += blockDim.x) {
    const std::uint32_t query = i / task.dim;
    const std::uint32_t column = i % task.dim;
    float value = 0;
    if (query < query_count) {
      value = task.scale * element_at(task.query_dtype, task.query(piece.head, first_query + query), column);
    }
    queries[query][column] = value;
  }
  __syncthreads();

  float references[kQueries];
  float totals[kQueries] = {};
  float sums[kQueries][kPairs][2] = {};
  for (float& reference : references) reference = -INFINITY;
  for (std::uint32_t tile = piece.begin + warp * kWarp; tile < piece.end; tile += kWarps * kWarp) {
    const std::uint32_t entry = tile + lane;
    float dots[kQueries] = {};
    if (entry < piece.end) {
      const std::byte* row = segment.keys.row(entry);
      with_type(segment.keys.dtype, [&]<class E>(E) {
        if (segment.keys.aligned) {
          dot_products<E, 16 / sizeof(typename E::Raw)>(row, task.dim, queries, dots);
        } else {
          dot_products<E, 1>(row, task.dim, queries, dots);
        }
      });
    }
    for (unsigned query = 0; query < kQueries; ++query) {
      float logit = dots[query];
      if (entry < piece.end) {
        if (segment.keys.lengths != nullptr) logit *= segment.keys.lengths[entry];
        if (segment.bias != nullptr) logit = fmaf(segment.bias[entry], kLog2E, logit);
        if (segment.positions != nullptr && task.query_positions != nullptr && query < query_count &&
            segment.positions[entry] > task.query_positions[(first_query + query) % task.rows]) {
          logit = -INFINITY;
        }
      } else {
        logit = -INFINITY;
      }
      const float now = fmaxf(references[query], largest_of_warp(logit));
      const float reference = finite_reference(now);
      const float factor = power_of_two(references[query] - reference);
      float weight = power_of_two(logit - reference);
      totals[query] = totals[query] * factor + sum_of_warp(weight);
      references[query] = now;
      for (unsigned pair = 0; pair < kPairs; ++pair) {
        sums[query][pair][0] *= factor;
        sums[query][pair][1] *= factor;
      }
      if (entry < piece.end && segment.values.lengths != nullptr) weight *= segment.values.lengths[entry];
      weights[warp][query][lane] = weight;
    }
    __syncwarp();
    const std::uint32_t tile_entries = min(kWarp, piece.end - tile);
    with_type(segment.values.dtype, [&]<class E>(E) {
      for (unsigned i = 0; i < tile_entries; ++i) {
        const std::byte* row = segment.values.row(tile + i);
        if (segment.values.aligned) {
          add_row<E, true>(row, task.value_dim, lane, weights[warp], i, sums);
        } else {
          add_row<E, false>(row, task.value_dim, lane, weights[warp], i, sums);
        }
      }
    });
    __syncwarp();
  }

  for (unsigned query = 0; query < kQueries; ++query) {
    for (unsigned pair = 0; pair < kPairs; ++pair) {
      const unsigned column = (pair * kWarp + lane) * 2;
      results[warp].sums[query][column] = sums[query][pair][0];
      results[warp].sums[query][column + 1] = sums[query][pair][1];
    }
    if (lane == 0) {
      results[warp].references[query] = references[query];
      results[warp].totals[query] = totals[query];
    }
  }
  __syncthreads();
  const auto result_of = [&](unsigned of) -> const auto& { return results[of]; };
  if (task.value_dim % 4 == 0) {
    hand_in<kWarps, kQueries, kMaxAttendDim, 4>(task, piece, number, query_block, result_of, results);
  } else {
    hand_in<kWarps, kQueries, kMaxAttendDim, 1>(task, piece, number, query_block, result_of, results);
  }
}

}  // namespace kvern::cuda::any
