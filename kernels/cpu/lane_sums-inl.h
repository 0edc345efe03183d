// Sums over the lanes of several vectors at once, once per instruction set; see elements-inl.h for the guard.
#if defined(KERNELS_CPU_LANE_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_LANE_SUMS_INL_H_
#undef KERNELS_CPU_LANE_SUMS_INL_H_
#else
#define KERNELS_CPU_LANE_SUMS_INL_H_
#endif

#include <hwy/highway.h>

#include "kernels/cpu/elements-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::evict {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

constexpr std::uint32_t kLanes = hn::MaxLanes(DF());

// The sums of the lanes of kLanes vectors, in their order: the same tree of additions for each.
#if HWY_TARGET == HWY_SCALAR
HWY_INLINE VF sums_of_lanes(const VF* vectors) { return vectors[0]; }
#else
// Of four vectors, per 128-bit block.
HWY_INLINE VF sums_of_blocks(VF a, VF b, VF c, VF e) {
  const DF d;
  const VF ac = hn::Add(hn::InterleaveLower(d, a, c), hn::InterleaveUpper(d, a, c));
  const VF be = hn::Add(hn::InterleaveLower(d, b, e), hn::InterleaveUpper(d, b, e));
  return hn::Add(hn::InterleaveLower(d, ac, be), hn::InterleaveUpper(d, ac, be));
}
HWY_INLINE VF sums_of_halves(VF low, VF high) {
  const DF d;
  return hn::Add(hn::ConcatLowerLower(d, high, low), hn::ConcatUpperUpper(d, high, low));
}
HWY_INLINE VF sums_of_lanes(const VF* v) {
  const VF first = sums_of_blocks(v[0], v[1], v[2], v[3]);
  if constexpr (kLanes == 4) {
    return first;
  } else if constexpr (kLanes == 8) {
    return sums_of_halves(first, sums_of_blocks(v[4], v[5], v[6], v[7]));
  } else {
    // Blocks 0 and 1 of `even` are columns 0-3, 2 and 3 columns 8-11; of `odd` columns 4-7 and 12-15.
    const VF even = sums_of_halves(first, sums_of_blocks(v[8], v[9], v[10], v[11]));
    const VF odd = sums_of_halves(sums_of_blocks(v[4], v[5], v[6], v[7]), sums_of_blocks(v[12], v[13], v[14], v[15]));
    return hn::Add(hn::OddEvenBlocks(hn::SwapAdjacentBlocks(odd), even),
                   hn::OddEvenBlocks(odd, hn::SwapAdjacentBlocks(even)));
  }
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace kvern::evict
HWY_AFTER_NAMESPACE();

#endif
