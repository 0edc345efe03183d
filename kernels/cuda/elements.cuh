#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/element.h"

/// What the kernels of scoring and selection have in common.
namespace kvern::evict {

constexpr unsigned kWarp = 32;
constexpr unsigned kEveryLane = 0xFFFFFFFFU;

struct Float32 {
  using Raw = std::uint32_t;
  __device__ static float to_float(Raw raw) { return __uint_as_float(raw); }
};
struct BFloat16 {
  using Raw = std::uint16_t;
  __device__ static float to_float(Raw raw) { return from_bfloat16(raw); }
};
struct Float16 {
  using Raw = std::uint16_t;
  __device__ static float to_float(Raw raw) { return from_float16(raw); }
};

/// Calls run(element type) for a float type.
template <typename Run>
void with_element(DType dtype, Run run) {
  if (dtype == DType::kFloat32) run(Float32());
  if (dtype == DType::kFloat16) run(Float16());
  if (dtype == DType::kBFloat16) run(BFloat16());
}

/// The sum over the lanes, in every lane.
template <typename T>
__device__ T sum_of_warp(T value) {
  for (unsigned offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kEveryLane, value, offset);
  return value;
}

/// The sum that each thread of a block of kWarps warps has a part of, in the same order every time; in every thread.
template <unsigned kWarps>
__device__ double sum_of_block(double value) {
  __shared__ double of_warp[kWarps];
  value = sum_of_warp(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (unsigned i = 0; i < kWarps; ++i) sum += of_warp[i];
  return sum;
}

inline Status launched(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return Status::ok();
  return {Code::kInternal, std::string(what) + " kernel: " + cudaGetErrorString(error)};
}

}  // namespace kvern::evict
