#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

/// Asymmetric group quantisation exactly as KIVI publishes it (arXiv 2402.02750): fp32 scale and minimum, a division
/// per element. What the forms int4, int3 and int2, whose groups take fewer bytes, are held against, in the golden
/// vectors and in docs/quality.md.
namespace kvern::kivi {

struct Group {
  float low = 0;
  float scale = 0;

  float decode(std::uint8_t code) const { return static_cast<float>(code) * scale + low; }
};

/// Of `count` finite values that lie `stride` elements apart, as do their codes. bits: 1 to 8. A group without spread
/// has scale 0 and codes 0.
inline Group quantise(const float* values, std::uint8_t* codes, std::size_t count, std::size_t stride,
                      std::uint32_t bits) {
  Group group;
  if (count == 0) return group;
  float high = values[0];
  group.low = values[0];
  for (std::size_t i = 1; i < count; ++i) {
    group.low = std::min(group.low, values[i * stride]);
    high = std::max(high, values[i * stride]);
  }
  const auto largest = static_cast<float>((1U << bits) - 1U);
  group.scale = (high - group.low) / largest;
  for (std::size_t i = 0; i < count; ++i) {
    const float steps = group.scale == 0 ? 0.0F : (values[i * stride] - group.low) / group.scale;
    codes[i * stride] = static_cast<std::uint8_t>(std::nearbyint(std::clamp(steps, 0.0F, largest)));
  }
  return group;
}

}  // namespace kvern::kivi
