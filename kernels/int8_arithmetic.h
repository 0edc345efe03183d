#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "kernels/element.h"

/// The arithmetic of the int8 form (docs/format.md), shared by CPU and GPU so that both give the same bytes. Every step
/// is one correctly rounded IEEE operation, or integers.
namespace kvern::int8 {

/// Codes are symmetric: -128 is not used.
constexpr float kMaxCode = 127.0F;
/// Groups whose scale would be smaller become zeros. It keeps every intermediate value normal, so that the result does
/// not depend on whether a thread flushes denormals.
constexpr float kMinScale = 0x1p-100F;

/// Scales are stored as the upper half of a float (bfloat16). This is the largest one whose codes all decode to finite
/// values of the dtype; everything above it, NaN, infinities and negative values included, is corrupt.
KVERN_HOST_DEVICE constexpr std::uint16_t max_scale_bits(DType dtype) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(largest_finite(dtype) / kMaxCode) >> 16);
}

/// Up to here -128, which is never written, decodes to a finite value, too.
KVERN_HOST_DEVICE constexpr std::uint16_t any_code_scale_bits(DType dtype) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(largest_finite(dtype) / 128.0F) >> 16);
}

KVERN_HOST_DEVICE constexpr float scale_value(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// The scale of a group whose largest magnitude is given (finite): magnitude / 127, rounded up.
KVERN_HOST_DEVICE constexpr std::uint16_t scale_bits(float magnitude, DType dtype) {
  const float scale = magnitude / kMaxCode;
  if (scale < kMinScale) return 0;
  const std::uint32_t up = (std::bit_cast<std::uint32_t>(scale) + 0xFFFFU) >> 16;
  return up < max_scale_bits(dtype) ? static_cast<std::uint16_t>(up) : max_scale_bits(dtype);
}

/// What values of the group are multiplied with. Where the scale had to be capped the group is squeezed into the codes,
/// so that no code ever needs to be clamped.
KVERN_HOST_DEVICE constexpr float inverse_scale(float magnitude, DType dtype) {
  const std::uint16_t bits = scale_bits(magnitude, dtype);
  if (bits == 0) return 0.0F;
  return bits == max_scale_bits(dtype) ? kMaxCode / magnitude : 1.0F / scale_value(bits);
}

/// Nearest code, ties to even.
KVERN_HOST_DEVICE inline std::int8_t encode(float value, float inverse) {
#if defined(__CUDA_ARCH__)
  // The sum rounds to units, which are its last bits; conversions run at a quarter of the rate or less.
  constexpr float kUnits = 0x1.8p23F;
  return static_cast<std::int8_t>(__float_as_int(__fadd_rn(__fmul_rn(value, inverse), kUnits)) & 0xFF);
#else
  return static_cast<std::int8_t>(std::nearbyint(value * inverse));
#endif
}

/// Whether a code and the scale of its group, at most max_scale_bits(), decode to a finite value. Codes that encode()
/// makes always do.
KVERN_HOST_DEVICE constexpr bool is_finite(float code, float scale, DType dtype) {
  return code > -128.0F || scale <= scale_value(any_code_scale_bits(dtype));
}

/// Exact: 7 bits times 8 bits.
KVERN_HOST_DEVICE inline float decode(std::int8_t code, float scale) { return static_cast<float>(code) * scale; }

/// How one plane (layer, K or V, head) lies in its section: scales, padded to 64 bytes, then one code per element in
/// the order of the plane.
struct Form {
  DType dtype = DType::kBFloat16;
  bool per_channel = true;  ///< K: a scale per channel and group of tokens; V: per token and group of channels
  std::uint32_t tokens = 0;
  std::uint32_t dim = 0;
  std::uint32_t group = 0;  ///< tokens or channels per group; the last group may be shorter

  static constexpr std::uint32_t kMaxChannelGroup = 128;
  static constexpr std::size_t kAlignment = 64;

  /// V rows are cut into the fewest groups of at most 128 channels, as even as multiples of 16 allow.
  static constexpr std::uint32_t channel_group(std::uint32_t dim) {
    const std::uint32_t groups = (dim + kMaxChannelGroup - 1) / kMaxChannelGroup;
    return ((dim + groups - 1) / groups + 15) / 16 * 16;
  }

  KVERN_HOST_DEVICE constexpr std::uint32_t groups() const {
    return ((per_channel ? tokens : dim) + group - 1) / group;
  }
  KVERN_HOST_DEVICE constexpr std::size_t scales() const {
    return static_cast<std::size_t>(groups()) * (per_channel ? dim : tokens);
  }
  /// Where the scale of an element stands: [token group][channel] or [token][channel group].
  KVERN_HOST_DEVICE constexpr std::size_t scale_index(std::uint32_t token, std::uint32_t channel) const {
    return per_channel ? static_cast<std::size_t>(token / group) * dim + channel
                       : static_cast<std::size_t>(token) * groups() + channel / group;
  }
  KVERN_HOST_DEVICE constexpr std::size_t codes_offset() const {
    return (scales() * sizeof(std::uint16_t) + kAlignment - 1) / kAlignment * kAlignment;
  }
  KVERN_HOST_DEVICE constexpr std::size_t section_bytes() const {
    return codes_offset() + static_cast<std::size_t>(tokens) * dim;
  }
};

}  // namespace kvern::int8
