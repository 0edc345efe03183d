#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/merge.h"
#include "kernels/merge_arithmetic.h"

namespace kvern::merge {
namespace {

using cuda::kEveryLane;
using cuda::launched;
using cuda::with_element;

/// Half a warp works on the rows of one token: a lane per column of sums, as on the CPU.
constexpr unsigned kColumns = 16;
constexpr unsigned kThreads = 256;
constexpr unsigned kRowsPerBlock = kThreads / kColumns;
constexpr unsigned kValues = kMaxDim / kColumns;
constexpr unsigned kMaxGridX = 1U << 20;

template <class E>
__device__ void put(std::byte* row, std::uint32_t index, float value) {
  if constexpr (sizeof(typename E::Raw) == sizeof(float)) {
    const float most = largest_finite(DType::kFloat32);
    reinterpret_cast<float*>(row)[index] = fminf(fmaxf(value, -most), most);
  } else {
    constexpr bool kHalf = std::is_same_v<E, cuda::Float16>;
    const float most = largest_finite(kHalf ? DType::kFloat16 : DType::kBFloat16);
    const float within = fminf(fmaxf(value, -most), most);
    reinterpret_cast<std::uint16_t*>(row)[index] = kHalf ? to_float16(within) : to_bfloat16(within);
  }
}

/// Of the 16 lanes of a row: column i and i + 8, then i + 4, 2, 1; in every lane.
__device__ float total(float value) {
  for (unsigned offset = kColumns / 2; offset > 0; offset /= 2) {
    value = value + __shfl_xor_sync(kEveryLane, value, offset, kColumns);
  }
  return value;
}

template <class E, class Out>
__global__ void merge_kernel(HeadRows x, HeadRows y, float weight, MergedRows out) {
  const unsigned column = threadIdx.x % kColumns;
  const std::size_t rows = static_cast<std::size_t>(x.heads) * x.tokens;
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kRowsPerBlock;
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * kRowsPerBlock;
  for (std::size_t base = first; base < rows; base += step) {
    // Lanes past the last row work on that one and write nothing, since all lanes of a warp take part in the sums.
    const std::size_t number = base + threadIdx.x / kColumns;
    const bool inside = number < rows;
    const std::size_t row = inside ? number : rows - 1;
    const auto* from_x = reinterpret_cast<const typename E::Raw*>(x.row(row / x.tokens, row % x.tokens));
    const auto* from_y = reinterpret_cast<const typename E::Raw*>(y.row(row / x.tokens, row % x.tokens));
    float values_x[kValues];
    float values_y[kValues];
    float squared_x = 0;
    float squared_y = 0;
    for (unsigned i = 0; i < kValues; ++i) {
      const std::uint32_t at = i * kColumns + column;
      values_x[i] = at < x.dim ? E::to_float(from_x[at]) : 0.0F;
      values_y[i] = at < x.dim ? E::to_float(from_y[at]) : 0.0F;
      squared_x = squared_x + values_x[i] * values_x[i];
      squared_y = squared_y + values_y[i] * values_y[i];
    }
    squared_x = total(squared_x);
    squared_y = total(squared_y);
    const float inverse_x = 1.0F / sqrtf(squared_x);
    const float inverse_y = 1.0F / sqrtf(squared_y);
    float difference = 0;
    float sum = 0;
    for (unsigned i = 0; i < kValues; ++i) {
      const float ux = values_x[i] * inverse_x;
      const float uy = values_y[i] * inverse_y;
      // Columns beyond the row are zeros, but not under an infinite factor.
      const bool used = i * kColumns + column < x.dim;
      const float minus = used ? ux - uy : 0.0F;
      const float plus = used ? ux + uy : 0.0F;
      difference = difference + minus * minus;
      sum = sum + plus * plus;
    }
    difference = total(difference);
    sum = total(sum);
    const bool good = usable(squared_x) && usable(squared_y);
    const float angle = good ? angle_between<ScalarOps>(difference, sum) : kPi;
    const bool forced = is_forced(angle);
    const auto weights = slerp_weights<ScalarOps>(difference, sum, angle, weight);
    const float weight_x = weights.x * inverse_x;
    const float weight_y = weights.y * inverse_y;
    if (!inside) continue;
    std::byte* to = out.directions + row * x.dim * sizeof(typename Out::Raw);
    for (unsigned i = 0; i < kValues; ++i) {
      const std::uint32_t at = i * kColumns + column;
      if (at < x.dim) put<Out>(to, at, forced ? 0.0F : values_x[i] * weight_x + values_y[i] * weight_y);
    }
    if (column == 0) {
      out.x_lengths[row] = squared_x <= kMaxSquaredLength ? sqrtf(squared_x) : 0.0F;
      out.y_lengths[row] = squared_y <= kMaxSquaredLength ? sqrtf(squared_y) : 0.0F;
      out.angles[row] = angle;
    }
  }
}

template <class E>
__global__ void restore_kernel(HeadRows directions, const float* lengths, std::byte* out) {
  const std::size_t elements = static_cast<std::size_t>(directions.heads) * directions.tokens * directions.dim;
  const auto* from = reinterpret_cast<const typename E::Raw*>(directions.data);
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kThreads;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += step) {
    put<E>(out + (i - i % directions.dim) * sizeof(typename E::Raw), static_cast<std::uint32_t>(i % directions.dim),
           E::to_float(from[i]) * lengths[i / directions.dim]);
  }
}

unsigned blocks(std::size_t work, unsigned per_block) {
  return static_cast<unsigned>(std::min<std::size_t>((work + per_block - 1) / per_block, kMaxGridX));
}

Status check(const HeadRows& rows) {
  if (rows.dtype == DType::kOpaqueBytes) return {Code::kInvalid, "opaque bytes have no direction"};
  if (rows.dim == 0 || rows.dim > kMaxDim) return {Code::kInvalid, "merging takes head dimensions of 1 to 256"};
  return Status::ok();
}

}  // namespace

Status cuda_merge_layers(const HeadRows& x, const HeadRows& y, float weight, const MergedRows& out,
                         CUstream_st* stream) {
  if (x.dtype != y.dtype || x.heads != y.heads || x.tokens != y.tokens || x.dim != y.dim) {
    return {Code::kInvalid, "layers that are merged must have the same dtype, heads, tokens and dimension"};
  }
  if (Status status = check(x); !status) return status;
  if (out.direction_dtype != x.dtype && out.direction_dtype != DType::kFloat32) {
    return {Code::kInvalid, "directions must be of the layers' dtype or fp32"};
  }
  const std::size_t rows = static_cast<std::size_t>(x.heads) * x.tokens;
  if (rows == 0) return Status::ok();
  with_element(x.dtype, [&](auto element) {
    using E = decltype(element);
    const unsigned grid = blocks(rows, kRowsPerBlock);
    if (out.direction_dtype == x.dtype) {
      merge_kernel<E, E><<<grid, kThreads, 0, stream>>>(x, y, weight, out);
    } else {
      merge_kernel<E, cuda::Float32><<<grid, kThreads, 0, stream>>>(x, y, weight, out);
    }
  });
  return launched("merge");
}

Status cuda_restore_rows(const HeadRows& directions, const float* lengths, std::byte* out, CUstream_st* stream) {
  if (Status status = check(directions); !status) return status;
  const std::size_t elements = static_cast<std::size_t>(directions.heads) * directions.tokens * directions.dim;
  if (elements == 0) return Status::ok();
  with_element(directions.dtype, [&](auto element) {
    using E = decltype(element);
    restore_kernel<E><<<blocks(elements, kThreads), kThreads, 0, stream>>>(directions, lengths, out);
  });
  return launched("restore");
}

}  // namespace kvern::merge
