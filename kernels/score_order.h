#pragma once

#include <bit>
#include <cstdint>

#include "kernels/element.h"

namespace kvern::evict {

/// The order of scores everywhere, on CPU and GPU: an integer that is larger for a higher score. NaN counts as
/// -infinity and +0 equals -0; of equal scores the lower index comes first.
KVERN_HOST_DEVICE constexpr std::uint32_t score_rank(float score) {
  constexpr std::uint32_t kSign = 0x80000000U;
  constexpr std::uint32_t kMinusInfinity = 0xFF800000U;
  auto bits = std::bit_cast<std::uint32_t>(score);
  if ((bits & ~kSign) > 0x7F800000U) bits = kMinusInfinity;
  if (bits == kSign) bits = 0;
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

}  // namespace kvern::evict
