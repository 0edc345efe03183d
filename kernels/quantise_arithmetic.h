#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "kernels/element.h"

/// The arithmetic of the forms fp8, int4, int3, int2 and int8r (docs/format.md), shared by CPU and GPU so that all give
/// the same bytes. Every step is one correctly rounded float32 operation, or integers. Where a product is exact (a code
/// times a scale of eight significant bits) it may be fused with the sum behind it: the result is the same.
namespace kvern::quantise {

enum class Kind : std::uint8_t { kFp8, kInt4, kInt3, kInt2, kInt8Residual };

/// Asymmetric groups have a scale and the value of code 0 (KIVI, arXiv 2402.02750); symmetric ones have a scale alone,
/// and their codes lie evenly around zero.
enum class Scheme : std::uint8_t { kAsymmetric, kSymmetric };

/// Groups whose scale would be smaller get scale 0, and their smallest value becomes 0 below kMinOffset. It keeps every
/// intermediate value normal, so that the result does not depend on whether a thread flushes denormals.
constexpr float kMinScale = 0x1p-100F;
constexpr float kMinOffset = 0x1p-110F;
constexpr float kLargestE4m3 = 448.0F;
/// int8r refines a code of int4 by this many steps.
constexpr float kResidualSteps = 16.0F;
/// Where the middle of an int4 step lies among them, half a fine step aside: fine codes are cells, not points.
constexpr float kResidualMiddle = 7.5F;

/// Bits per element in the first plane of codes, and in the second one (0: there is none). int3 is two bits and the
/// upper one apart; int8r is int4 and the residual apart.
KVERN_HOST_DEVICE constexpr std::uint32_t first_bits(Kind kind) {
  return kind == Kind::kFp8 ? 8 : kind == Kind::kInt3 || kind == Kind::kInt2 ? 2 : 4;
}
KVERN_HOST_DEVICE constexpr std::uint32_t second_bits(Kind kind) {
  return kind == Kind::kInt3 ? 1 : kind == Kind::kInt8Residual ? 4 : 0;
}
/// The largest code that a scale multiplies: of int4 for int8r, the largest number for fp8.
KVERN_HOST_DEVICE constexpr float max_code(Kind kind) {
  return kind == Kind::kFp8 ? kLargestE4m3 : kind == Kind::kInt3 ? 7.0F : kind == Kind::kInt2 ? 3.0F : 15.0F;
}
/// Scales from the middle of a symmetric group to its end.
KVERN_HOST_DEVICE constexpr float half_span(Kind kind) {
  return kind == Kind::kFp8 ? kLargestE4m3 : max_code(kind) * 0.5F;
}

KVERN_HOST_DEVICE constexpr float scale_value(std::uint16_t bits) { return from_bfloat16(bits); }
/// A float cut to its upper half.
KVERN_HOST_DEVICE constexpr std::uint16_t scale_bits_below(float value) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}
/// No scale is larger, so that the largest code times the scale is finite in float32.
KVERN_HOST_DEVICE constexpr std::uint16_t max_scale_bits(Kind kind) {
  return scale_bits_below(largest_finite(DType::kBFloat16) / max_code(kind));
}

/// What a group is written with.
struct Group {
  std::uint16_t scale = 0;  ///< bfloat16
  float offset = 0;         ///< value of code 0; 0 for fp8
  float inverse = 0;        ///< code before rounding = value * inverse - bias
  float bias = 0;
};

/// Where a group begins that spans more than float32 can tell in one difference: it is squeezed around its middle.
KVERN_HOST_DEVICE constexpr float squeezed_offset(float low, float high, Kind kind) {
  const float middle = low * 0.5F + high * 0.5F;
  return from_bfloat16(scale_bits_below(middle - half_span(kind) * scale_value(max_scale_bits(kind))));
}

/// Of a group of finite values from low to high.
KVERN_HOST_DEVICE constexpr Group make_group(float low, float high, Kind kind, Scheme scheme, DType dtype) {
  const bool symmetric = scheme == Scheme::kSymmetric;
  const float half = half_span(kind);
  if (low < kMinOffset && low > -kMinOffset) low = 0;
  Group group;
  if (!symmetric) group.offset = low;
  // Quarters, which cannot overflow.
  const float span = symmetric ? (-low > high ? -low : high) * 0.25F : high * 0.25F - low * 0.25F;
  const float codes = (symmetric ? half : max_code(kind)) * 0.25F;
  const float scale = span / codes;
  if (!(scale >= kMinScale)) return group;
  std::uint16_t bits = to_bfloat16(scale);
  const bool squeezed = bits >= max_scale_bits(kind);
  if (squeezed) {
    bits = max_scale_bits(kind);
    if (!symmetric) group.offset = squeezed_offset(low, high, kind);
  }
  const float end = symmetric ? half * scale_value(bits) : max_code(kind) * scale_value(bits) + group.offset;
  if (end > largest_finite(dtype)) --bits;
  group.scale = bits;
  group.inverse = squeezed ? codes / span : 1.0F / scale_value(bits);
  if (kind == Kind::kFp8) return group;
  if (symmetric) group.offset = -half * scale_value(bits);
  group.bias = symmetric ? -half : low * group.inverse;
  return group;
}

/// What codes of a group are multiplied with and what is added.
struct Line {
  float scale = 0;
  float offset = 0;
};

/// The line of a group as it is stored, or false when encoding cannot have made it: then some code of it might decode
/// to a value that is not finite. offset: as stored; not looked at for symmetric groups.
KVERN_HOST_DEVICE constexpr bool make_line(std::uint16_t bits, float offset, Kind kind, Scheme scheme, DType dtype,
                                           Line& line) {
  const float largest = largest_finite(dtype);
  if (bits > max_scale_bits(kind)) return false;
  line.scale = scale_value(bits);
  if (bits != 0 && line.scale < kMinScale) return false;
  if (scheme == Scheme::kSymmetric) {
    line.offset = kind == Kind::kFp8 ? 0.0F : -half_span(kind) * line.scale;
    return half_span(kind) * line.scale <= largest;
  }
  line.offset = offset;
  const float magnitude = offset < 0 ? -offset : offset;
  if (!(magnitude <= largest) || (magnitude < kMinOffset && magnitude != 0)) return false;
  return max_code(kind) * line.scale + offset <= largest;
}

KVERN_HOST_DEVICE constexpr float smaller(float a, float b) { return b < a ? b : a; }

/// The line of int8r's fine codes from that of its base. Close to the dtype's largest numbers, where the outermost fine
/// codes would not be finite any more, it is squeezed.
KVERN_HOST_DEVICE constexpr Line refine(Line base, DType dtype) {
  constexpr float kMaxFine = 255.0F;
  constexpr float kMaxReach = largest_finite(DType::kBFloat16);
  const float largest = largest_finite(dtype);
  Line fine{base.scale / kResidualSteps, 0};
  fine.offset = base.offset - kResidualMiddle * fine.scale;
  const float reach = kMaxFine * fine.scale;
  if (reach <= kMaxReach && fine.offset >= -largest && reach + fine.offset <= largest) return fine;
  if (!(fine.offset >= -largest)) fine.offset = -largest;
  const float room = smaller(largest / kMaxFine - fine.offset / kMaxFine, kMaxReach / kMaxFine);
  // A bfloat16 step below what is right, which is more than the roundings above can have added; nothing where those
  // could matter.
  const float cut =
      room < largest * 0x1p-28F ? 0.0F : scale_value(static_cast<std::uint16_t>(scale_bits_below(room) - 1));
  if (fine.scale > cut) fine.scale = cut;
  return fine;
}

/// Nearest whole number, ties to even. Of magnitudes below 2^22.
KVERN_HOST_DEVICE inline std::int32_t nearest(float value) {
#if defined(__CUDA_ARCH__)
  // The sum rounds to units, which are its last bits; conversions run at a quarter of the rate or less.
  constexpr float kUnits = 0x1.8p23F;
  return __float_as_int(__fadd_rn(value, kUnits)) - std::bit_cast<std::int32_t>(kUnits);
#else
  return static_cast<std::int32_t>(std::nearbyint(value));
#endif
}

/// The value of a whole number below 2^23, without the conversion that devices are slow at.
KVERN_HOST_DEVICE constexpr float whole(std::uint32_t number) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(0x1p23F) | number) - 0x1p23F;
}

/// e4m3, finite only (arXiv 2209.05433): nearest, ties to even; everything beyond 448 becomes 448, NaN 0x7F.
KVERN_HOST_DEVICE constexpr std::uint8_t to_e4m3(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 24 & 0x80U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return 0x7F;
  if (magnitude >= std::bit_cast<std::uint32_t>(kLargestE4m3)) return static_cast<std::uint8_t>(sign | 0x7EU);
  // A power of two 2^20 times the value's own, at least that of the smallest normal number, 2^-6: adding it rounds to
  // three bits of mantissa and leaves them in the last place.
  const std::uint32_t floor = std::bit_cast<std::uint32_t>(0x1p-6F);
  const std::uint32_t power = ((magnitude > floor ? magnitude : floor) & 0x7F800000U) + (20U << 23);
  const float shifted = std::bit_cast<float>(magnitude) + std::bit_cast<float>(power);
  const std::uint32_t steps = std::bit_cast<std::uint32_t>(shifted) - power;
  return static_cast<std::uint8_t>(sign | (steps + (power >> 20) - (141U << 3)));
}

/// NaN for 0x7F and 0xFF.
KVERN_HOST_DEVICE constexpr float from_e4m3(std::uint8_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80U) << 24;
  const std::uint32_t magnitude = code & 0x7FU;
  if (magnitude == 0x7FU) return std::bit_cast<float>(sign | 0x7FC00000U);
  if (magnitude >= 8U) return std::bit_cast<float>(sign | ((magnitude << 20) + (120U << 23)));
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-9F));
}

/// The code of a value: for int8r the base times sixteen plus the residual.
KVERN_HOST_DEVICE inline std::uint32_t encode(float value, const Group& group, Kind kind) {
  if (kind == Kind::kFp8) return to_e4m3(value * group.inverse);
  // Only float32 values that hardly differ beside their size come to more than the largest code.
  const float steps = smaller(value * group.inverse - group.bias, max_code(kind));
  const std::int32_t code = nearest(steps);
  if (kind != Kind::kInt8Residual) return static_cast<std::uint32_t>(code);
  const float fine = (steps - whole(static_cast<std::uint32_t>(code))) * kResidualSteps + kResidualMiddle;
  return static_cast<std::uint32_t>(code * 16 + nearest(smaller(fine, kResidualSteps - 1)));
}

/// line: of the fine codes for int8r.
KVERN_HOST_DEVICE constexpr float decode(std::uint32_t code, Line line, Kind kind) {
  if (kind == Kind::kFp8) return from_e4m3(static_cast<std::uint8_t>(code)) * line.scale;
  return whole(code) * line.scale + line.offset;
}

/// Codes of neighbouring channels as they lie in the planes: lowest bits first, the first channel lowest.
constexpr std::uint32_t kPackChannels = 8;
struct Packed {
  std::uint64_t first = 0;
  std::uint32_t second = 0;
};

/// Bits of a code that are in the first plane, shifted to the bottom: for int8r the upper ones, otherwise the lower.
KVERN_HOST_DEVICE constexpr std::uint32_t first_part(std::uint32_t code, Kind kind) {
  return kind == Kind::kInt8Residual ? code >> 4 : code & ((1U << first_bits(kind)) - 1);
}
KVERN_HOST_DEVICE constexpr std::uint32_t second_part(std::uint32_t code, Kind kind) {
  return kind == Kind::kInt8Residual ? code & 15U : code >> first_bits(kind);
}

KVERN_HOST_DEVICE constexpr Packed pack(const std::uint32_t (&codes)[kPackChannels], Kind kind) {
  Packed packed;
  for (std::uint32_t i = 0; i < kPackChannels; ++i) {
    packed.first |= static_cast<std::uint64_t>(first_part(codes[i], kind)) << (i * first_bits(kind));
    packed.second |= second_part(codes[i], kind) << (i * second_bits(kind));
  }
  return packed;
}

KVERN_HOST_DEVICE constexpr std::uint32_t unpack(const Packed& packed, std::uint32_t channel, Kind kind) {
  const auto first =
      static_cast<std::uint32_t>(packed.first >> (channel * first_bits(kind))) & ((1U << first_bits(kind)) - 1);
  if (second_bits(kind) == 0) return first;
  const std::uint32_t second = packed.second >> (channel * second_bits(kind)) & ((1U << second_bits(kind)) - 1);
  return kind == Kind::kInt8Residual ? first << 4 | second : first | second << first_bits(kind);
}

/// How one plane (layer, K or V, head) lies in its section: scales; for asymmetric groups the values of code 0 in the
/// plane's dtype; the first plane of codes; the second one where there is one. Each part begins at a multiple of 64.
struct Form {
  DType dtype = DType::kBFloat16;
  bool per_channel = true;  ///< K: groups of tokens per channel; V: groups of channels per token
  std::uint32_t tokens = 0;
  std::uint32_t dim = 0;    ///< a multiple of 16
  std::uint32_t group = 0;  ///< tokens or channels per group; the last group may be shorter
  Kind kind = Kind::kInt4;
  Scheme scheme = Scheme::kAsymmetric;

  static constexpr std::size_t kAlignment = 64;
  static constexpr std::uint32_t kDimStep = 16;

  /// V rows are cut into the fewest groups of at most this many channels, as even as multiples of 16 allow.
  static constexpr std::uint32_t channel_group(std::uint32_t dim, std::uint32_t at_most) {
    const std::uint32_t groups = (dim + at_most - 1) / at_most;
    if (groups == 0) return at_most;
    return ((dim + groups - 1) / groups + kDimStep - 1) / kDimStep * kDimStep;
  }
  KVERN_HOST_DEVICE static constexpr std::size_t aligned(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  KVERN_HOST_DEVICE constexpr bool has_offsets() const { return scheme == Scheme::kAsymmetric; }
  KVERN_HOST_DEVICE constexpr std::size_t element_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
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
  KVERN_HOST_DEVICE constexpr std::size_t offsets_at() const { return aligned(scales() * sizeof(std::uint16_t)); }
  KVERN_HOST_DEVICE constexpr std::size_t first_at() const {
    return offsets_at() + (has_offsets() ? aligned(scales() * element_bytes()) : 0);
  }
  KVERN_HOST_DEVICE constexpr std::size_t first_row_bytes() const { return dim * first_bits(kind) / 8; }
  KVERN_HOST_DEVICE constexpr std::size_t second_row_bytes() const { return dim * second_bits(kind) / 8; }
  KVERN_HOST_DEVICE constexpr std::size_t first_end() const { return first_at() + tokens * first_row_bytes(); }
  KVERN_HOST_DEVICE constexpr std::size_t second_at() const { return aligned(first_end()); }
  KVERN_HOST_DEVICE constexpr std::size_t section_bytes() const {
    return second_bits(kind) == 0 ? first_end() : second_at() + tokens * second_row_bytes();
  }
};

}  // namespace kvern::quantise
