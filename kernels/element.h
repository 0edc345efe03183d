#pragma once

#include <bit>
#include <cstdint>

#include "base/dtype.h"

#if defined(__CUDACC__)
#define KVERN_HOST_DEVICE __host__ __device__
#else
#define KVERN_HOST_DEVICE
#endif

/// Elements of K, V and Q and their values, shared by CPU and GPU. Every step is one correctly rounded IEEE operation,
/// or integers.
namespace kvern {

KVERN_HOST_DEVICE constexpr float largest_finite(DType dtype) {
  return dtype == DType::kFloat16 ? 65504.0F
                                  : std::bit_cast<float>(dtype == DType::kBFloat16 ? 0x7F7F0000U : 0x7F7FFFFFU);
}

KVERN_HOST_DEVICE constexpr float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}
/// Ties to even. Of finite values only.
KVERN_HOST_DEVICE constexpr std::uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

KVERN_HOST_DEVICE constexpr float from_float16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t magnitude = bits & 0x7FFFU;
  if (magnitude >= 0x7C00U) return std::bit_cast<float>(sign | 0x7F800000U | ((magnitude & 0x3FFU) << 13));
  if (magnitude >= 0x0400U) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000U));
  const float value = static_cast<float>(magnitude) * 0x1p-24F;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}
/// Ties to even. Of values that round to finite ones only.
KVERN_HOST_DEVICE constexpr std::uint16_t to_float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude < 0x38800000U) {
    // Subnormal: adding 0.5 puts the unit of the last place at 2^-24 and rounds there.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000U));
  }
  const std::uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13) & 1U);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

}  // namespace kvern
