#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/packs.cuh"
#include "kernels/quantise_arithmetic.h"

/// kernels/quantise_arithmetic.h for packs of kPackChannels elements at a time: the same bytes in fewer instructions.
namespace kvern::quantise {

template <class E>
using Elements = cuda::Words<E, kPackChannels>;

/// What elements of a group are coded with.
struct Factors {
  float inverse;
  float bias;
};

/// 2^23 has units in the last place of its float: whole numbers below are its last bits.
constexpr float kUnits = 0x1p23F;
/// The same for sums that may be a little below zero.
constexpr float kSignedUnits = 0x1.8p23F;
/// Moves the fields of two bits at the bottom of a word's bytes to its upper byte, the lowest byte's first.
constexpr std::uint32_t kGatherPairs = 1U << 24 | 1U << 18 | 1U << 12 | 1U << 6;
/// The same for bits.
constexpr std::uint32_t kGatherBits = 1U << 24 | 1U << 17 | 1U << 10 | 1U << 3;

/// Only float32 values that hardly differ beside their size come to more than half a step above the largest code; the
/// residual of int8r needs steps that do not exceed it at all.
template <class E, Kind kKind>
constexpr bool kCapped = cuda::kWordElements<E> == 1 || kKind == Kind::kInt8Residual;

/// The lowest bytes of four words.
__device__ inline std::uint32_t lowest_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
/// Eight numbers below 16 in the lowest bytes of words.
__device__ inline std::uint32_t nibbles(const std::uint32_t (&numbers)[kPackChannels]) {
  return lowest_bytes(numbers[0], numbers[2], numbers[4], numbers[6]) |
         lowest_bytes(numbers[1], numbers[3], numbers[5], numbers[7]) << 4;
}

/// Four values as e4m3.
__device__ inline std::uint32_t to_e4m3s(const float* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint32_t word;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]));
  return word;
#else
  std::uint32_t word = 0;
  for (std::uint32_t i = 0; i < 4; ++i) word |= static_cast<std::uint32_t>(to_e4m3(values[i])) << (8 * i);
  return word;
#endif
}

/// encode() of values that have become steps.
template <Kind kKind>
__device__ Packed pack_steps(const float (&steps)[kPackChannels]) {
  std::uint32_t codes[kPackChannels];  // in the lowest byte
  for (std::uint32_t k = 0; k < kPackChannels; ++k) codes[k] = __float_as_uint(steps[k] + kSignedUnits);
  if constexpr (kKind == Kind::kInt4) return {nibbles(codes), 0};
  if constexpr (kKind == Kind::kInt8Residual) {
    std::uint32_t fine[kPackChannels];
    for (std::uint32_t k = 0; k < kPackChannels; ++k) {
      // Times a power of two, which is exact: rounded once, like a product and a sum.
      const float residual =
          fmaf(steps[k] - (__uint_as_float(codes[k]) - kSignedUnits), kResidualSteps, kResidualMiddle);
      fine[k] = __float_as_uint(fminf(residual, kResidualSteps - 1) + kSignedUnits);
    }
    return {nibbles(codes), nibbles(fine)};
  }
  const std::uint32_t lower = lowest_bytes(codes[0], codes[1], codes[2], codes[3]);
  const std::uint32_t upper = lowest_bytes(codes[4], codes[5], codes[6], codes[7]);
  const auto pairs = [](std::uint32_t a, std::uint32_t b) {
    return __byte_perm((a & 0x03030303U) * kGatherPairs, (b & 0x03030303U) * kGatherPairs, 0x0073) & 0xFFFFU;
  };
  if constexpr (kKind == Kind::kInt3) {
    const std::uint32_t bits = (lower | upper << 4) >> 2 & 0x11111111U;
    return {pairs(lower, upper), bits * kGatherBits >> 24};
  }
  return {pairs(lower, upper), 0};
}

template <class E, Kind kKind>
__device__ Packed encode_pack(const Elements<E>& elements, const Factors (&factors)[kPackChannels]) {
  float values[kPackChannels];
  for (std::uint32_t i = 0; i < Elements<E>::kWords; ++i) {
    cuda::to_floats<E>(elements.words[i], values + i * cuda::kWordElements<E>);
  }
  for (std::uint32_t k = 0; k < kPackChannels; ++k) {
    values[k] = values[k] * factors[k].inverse;
    if constexpr (kKind == Kind::kFp8) continue;
    values[k] = values[k] - factors[k].bias;
    if constexpr (kCapped<E, kKind>) values[k] = fminf(values[k], max_code(kKind));
  }
  if constexpr (kKind == Kind::kFp8) {
    return {to_e4m3s(values) | static_cast<std::uint64_t>(to_e4m3s(values + 4)) << 32, 0};
  } else {
    return pack_steps<kKind>(values);
  }
}

/// What a code is multiplied with by where it lies in its word, when it is made a number.
template <Kind kKind>
__device__ constexpr float place(std::uint32_t k) {
  if (kKind == Kind::kFp8) return 0x1p-8F;
  if (kKind == Kind::kInt8Residual) return 1.0F;
  return static_cast<float>(1U << (kKind == Kind::kInt2 ? 2 : 4) * (k % 4));
}

/// Lines of neighbouring channels for codes that are multiplied with their places.
struct PlacedLines {
  float scales[kPackChannels];
  float offsets[kPackChannels];
};
template <Kind kKind>
__device__ void put_line(PlacedLines& lines, std::uint32_t k, const Line& line) {
  lines.scales[k] = line.scale * (1.0F / place<kKind>(k));
  lines.offsets[k] = line.offset;
}

/// The codes times their places.
template <Kind kKind>
__device__ void to_numbers(const Packed& packed, float (&numbers)[kPackChannels]) {
  constexpr std::uint32_t kUnitsBits = std::bit_cast<std::uint32_t>(kUnits);
  const auto first = static_cast<std::uint32_t>(packed.first);
  if constexpr (kKind == Kind::kFp8) {
    const std::uint32_t words[2] = {first, static_cast<std::uint32_t>(packed.first >> 32)};
    for (std::uint32_t i = 0; i < 4; ++i) {
      // e4m3 are float16 with a bit less of exponent, 2^8 times as much.
      const std::uint32_t upper = __byte_perm(words[i / 2], 0, i % 2 == 0 ? 0x1404 : 0x3424);
      cuda::to_floats<cuda::Float16>((upper >> 1 & 0x3F803F80U) | (upper & 0x80008000U), numbers + 2 * i);
    }
  } else if constexpr (kKind == Kind::kInt8Residual) {
    const std::uint32_t second = packed.second;
    const std::uint32_t evens = (first << 4 & 0xF0F0F0F0U) | (second & 0x0F0F0F0FU);
    const std::uint32_t odds = (first & 0xF0F0F0F0U) | (second >> 4 & 0x0F0F0F0FU);
    for (std::uint32_t k = 0; k < kPackChannels; ++k) {
      numbers[k] = __uint_as_float(__byte_perm(k % 2 == 0 ? evens : odds, kUnitsBits, 0x7440 + k / 2)) - kUnits;
    }
  } else {
    constexpr std::uint32_t kBits = kKind == Kind::kInt2 ? 2 : 4;
    std::uint32_t fields = first;
    if constexpr (kKind == Kind::kInt3) {
      fields = __byte_perm(fields, 0, 0x4140);
      fields = (fields | fields << 4) & 0x0F0F0F0FU;
      fields = (fields | fields << 2) & 0x33333333U;
      std::uint32_t bits = packed.second;
      bits = (bits | bits << 12) & 0x000F000FU;
      bits = (bits | bits << 6) & 0x03030303U;
      bits = (bits | bits << 3) & 0x11111111U;
      fields |= bits << 2;
    }
    for (std::uint32_t k = 0; k < kPackChannels; ++k) {
      const std::uint32_t mask = ((1U << kBits) - 1) << kBits * (k % 4);
      numbers[k] = __uint_as_float((fields >> k / 4 * 4 * kBits & mask) | kUnitsBits) - kUnits;
    }
  }
}

/// Sets *invalid where a code is one that encoding does not make.
template <class E, Kind kKind>
__device__ Elements<E> decode_pack(const Packed& packed, const PlacedLines& lines, std::uint32_t* invalid) {
  if constexpr (kKind == Kind::kFp8) {
    constexpr std::uint64_t kOnes = 0x0101010101010101U;
    if ((((packed.first & 0x7F * kOnes) + kOnes) & 0x80 * kOnes) != 0) *invalid = 1;
  }
  float values[kPackChannels];
  to_numbers<kKind>(packed, values);
  for (std::uint32_t k = 0; k < kPackChannels; ++k) {
    // The product is exact.
    values[k] = kKind == Kind::kFp8 ? values[k] * lines.scales[k] : fmaf(values[k], lines.scales[k], lines.offsets[k]);
  }
  Elements<E> decoded;
  for (std::uint32_t i = 0; i < Elements<E>::kWords; ++i) {
    decoded.words[i] = cuda::to_word<E>(values + i * cuda::kWordElements<E>);
  }
  return decoded;
}

}  // namespace kvern::quantise
