#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/element.h"

/// What the kernels have in common.
namespace kvern::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kEveryLane = 0xFFFFFFFFU;

struct Float32 {
  using Raw = std::uint32_t;
  static constexpr DType kDType = DType::kFloat32;
  __device__ static float to_float(Raw raw) { return __uint_as_float(raw); }
  __device__ static Raw from_float(float value) { return __float_as_uint(value); }
};
struct BFloat16 {
  using Raw = std::uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
  __device__ static float to_float(Raw raw) { return from_bfloat16(raw); }
  __device__ static Raw from_float(float value) { return to_bfloat16(value); }
};
struct Float16 {
  using Raw = std::uint16_t;
  static constexpr DType kDType = DType::kFloat16;
  __device__ static float to_float(Raw raw) { return from_float16(raw); }
  __device__ static Raw from_float(float value) { return to_float16(value); }
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

/// The largest of the lanes' values, in every lane.
__device__ inline float largest_of_warp(float value) {
  for (unsigned offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kEveryLane, value, offset));
  }
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

/// A launch parameter by compute capability, in rising order.
struct Policy {
  int capability_major;
  std::uint32_t value;
};

/// What workspaces of unknown devices are made for.
template <std::size_t kCount>
constexpr std::uint32_t smallest_value(const Policy (&policies)[kCount]) {
  std::uint32_t value = policies[0].value;
  for (const Policy& policy : policies) value = policy.value < value ? policy.value : value;
  return value;
}

/// The value for the current device: that of the highest capability which it has; the first one's below all.
template <std::size_t kCount>
std::uint32_t value_for_device(const Policy (&policies)[kCount]) {
  int device = 0;
  int major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  std::uint32_t value = policies[0].value;
  for (const Policy& policy : policies) {
    if (policy.capability_major <= major) value = policy.value;
  }
  return value;
}

/// What became of the launch before; what: "attend", "int8 encode", …
inline Status launched(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return Status::ok();
  return {Code::kInternal, std::string(what) + " kernel: " + cudaGetErrorString(error)};
}

}  // namespace kvern::cuda
