#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/elements.cuh"

/// Neighbouring elements of a row that one thread loads, codes and stores, as 32-bit words of one element or two. The
/// conversions are single instructions of the device; of finite values they give what kernels/element.h gives.
namespace kvern::cuda {

/// Elements in a word.
template <class E>
constexpr std::uint32_t kWordElements = sizeof(std::uint32_t) / sizeof(typename E::Raw);

template <class E, std::uint32_t kCount>
struct alignas(16) Words {
  static constexpr std::uint32_t kWords = kCount / kWordElements<E>;
  std::uint32_t words[kWords];
};

/// The values of a word, the first element's first.
template <class E>
__device__ void to_floats(std::uint32_t word, float* values) {
  values[0] = __uint_as_float(word);
}
template <>
__device__ inline void to_floats<BFloat16>(std::uint32_t word, float* values) {
  values[0] = __uint_as_float(word << 16);
  values[1] = __uint_as_float(word & 0xFFFF0000U);
}
template <>
__device__ inline void to_floats<Float16>(std::uint32_t word, float* values) {
  asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(values[0]), "=f"(values[1])
      : "r"(word));
}

/// The inverse, to nearest, ties to even.
template <class E>
__device__ std::uint32_t to_word(const float* values) {
  return __float_as_uint(values[0]);
}
template <>
__device__ inline std::uint32_t to_word<BFloat16>(const float* values) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
  return word;
}
template <>
__device__ inline std::uint32_t to_word<Float16>(const float* values) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
  return word;
}

/// The smallest and the largest values so far, element by element of a word; NaN once there was one.
template <class E>
struct Extremes {
  std::uint32_t low = 0x7F800000U;
  std::uint32_t high = 0xFF800000U;
  __device__ void add(std::uint32_t word) {
    asm("{\n.reg .f32 a, b;\nmov.b32 a, %0;\nmov.b32 b, %1;\nmin.NaN.f32 a, a, b;\nmov.b32 %0, a;\n}"
        : "+r"(low)
        : "r"(word));
    asm("{\n.reg .f32 a, b;\nmov.b32 a, %0;\nmov.b32 b, %1;\nmax.NaN.f32 a, a, b;\nmov.b32 %0, a;\n}"
        : "+r"(high)
        : "r"(word));
  }
};
template <>
struct Extremes<BFloat16> {
  std::uint32_t low = 0x7F807F80U;
  std::uint32_t high = 0xFF80FF80U;
  __device__ void add(std::uint32_t word) {
    asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(low) : "r"(word));
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(high) : "r"(word));
  }
};
template <>
struct Extremes<Float16> {
  std::uint32_t low = 0x7C007C00U;
  std::uint32_t high = 0xFC00FC00U;
  __device__ void add(std::uint32_t word) {
    asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(low) : "r"(word));
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(high) : "r"(word));
  }
};

}  // namespace kvern::cuda
