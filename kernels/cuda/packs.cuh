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

/// The smaller and the larger elements of two words, one by one; NaN where either is.
template <class E>
__device__ std::uint32_t smaller_of(std::uint32_t a, std::uint32_t b) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
  return __float_as_uint(smaller);
}
template <>
__device__ inline std::uint32_t smaller_of<BFloat16>(std::uint32_t a, std::uint32_t b) {
  asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
template <>
__device__ inline std::uint32_t smaller_of<Float16>(std::uint32_t a, std::uint32_t b) {
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
template <class E>
__device__ std::uint32_t larger_of(std::uint32_t a, std::uint32_t b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
  return __float_as_uint(larger);
}
template <>
__device__ inline std::uint32_t larger_of<BFloat16>(std::uint32_t a, std::uint32_t b) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
template <>
__device__ inline std::uint32_t larger_of<Float16>(std::uint32_t a, std::uint32_t b) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

/// The ends of what some elements span, so that one operation widens both: the lowest and the highest with its sign
/// turned, in a word's halves or a word each. NaN once there was one.
template <class E>
struct Ends {
  static constexpr std::uint32_t kWords = 2 / kWordElements<E>;
  std::uint32_t words[kWords];

  __device__ void add(const Ends& other) {
    for (std::uint32_t i = 0; i < kWords; ++i) words[i] = smaller_of<E>(words[i], other.words[i]);
  }
  __device__ void values(float& low, float& high) const {
    float ends[2];
    for (std::uint32_t i = 0; i < kWords; ++i) to_floats<E>(words[i], ends + i * kWordElements<E>);
    low = ends[0];
    high = -ends[1];
  }
};

template <class E, std::uint32_t kCount>
__device__ Ends<E> ends_of(const Words<E, kCount>& elements) {
  std::uint32_t low = elements.words[0];
  std::uint32_t high = elements.words[0];
  for (std::uint32_t i = 1; i < Words<E, kCount>::kWords; ++i) {
    low = smaller_of<E>(low, elements.words[i]);
    high = larger_of<E>(high, elements.words[i]);
  }
  constexpr std::uint32_t kSign = 0x80000000U;
  if constexpr (kWordElements<E> == 1) {
    return {low, high ^ kSign};
  } else {
    const std::uint32_t of_firsts = __byte_perm(low, high, 0x5410) ^ kSign;
    const std::uint32_t of_seconds = __byte_perm(low, high, 0x7632) ^ kSign;
    return {smaller_of<E>(of_firsts, of_seconds)};
  }
}

}  // namespace kvern::cuda
