// Neighbouring elements of K, V and Q in two vectors of floats, those of even index and those of odd: 16-bit elements
// then need no permutation, and neither do codes of less than a byte. Once per instruction set, as elements-inl.h; not
// for the scalar target, which has no vectors to speak of.
#if defined(KERNELS_CPU_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_PAIRS_INL_H_
#undef KERNELS_CPU_PAIRS_INL_H_
#else
#define KERNELS_CPU_PAIRS_INL_H_
#endif

#include <hwy/highway.h>

#include "kernels/cpu/elements-inl.h"

#if HWY_TARGET != HWY_SCALAR

HWY_BEFORE_NAMESPACE();
namespace kvern {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// D is a tag of floats everywhere below; a pair covers twice its lanes of elements.
template <class D>
struct Pair {
  hn::VFromD<D> even;
  hn::VFromD<D> odd;
};

template <class D>
HWY_INLINE Pair<D> load_pair(D d, const float* values) {
  Pair<D> pair;
  hn::LoadInterleaved2(d, values, pair.even, pair.odd);
  return pair;
}

template <class D>
HWY_INLINE Pair<D> load_pair(Float32, D d, const std::uint32_t* raw) {
  return load_pair(d, reinterpret_cast<const float*>(raw));
}
template <class D>
HWY_INLINE void store_pair(Float32, D d, Pair<D> pair, std::uint32_t* raw) {
  hn::StoreInterleaved2(pair.even, pair.odd, d, reinterpret_cast<float*>(raw));
}

template <class D>
HWY_INLINE Pair<D> load_pair(BFloat16, D d, const std::uint16_t* raw) {
  const hn::RebindToUnsigned<D> du;
  const auto both = hn::BitCast(du, hn::LoadU(hn::Repartition<std::uint16_t, D>(), raw));
  return {hn::BitCast(d, hn::ShiftLeft<16>(both)), hn::BitCast(d, hn::And(both, hn::Set(du, 0xFFFF0000U)))};
}
template <class D>
HWY_INLINE void store_pair(BFloat16, D, Pair<D> pair, std::uint16_t* raw) {
  const hn::RebindToUnsigned<D> du;
  const hn::Repartition<std::uint16_t, D> d16;
  const auto rounded = [&](hn::VFromD<D> value) HWY_ATTR {
    const auto bits = hn::BitCast(du, value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
    return hn::Add(hn::Add(bits, hn::Set(du, 0x7FFF)), odd);
  };
  const auto upper = hn::And(rounded(pair.odd), hn::Set(du, 0xFFFF0000U));
  hn::StoreU(hn::BitCast(d16, hn::Or(hn::ShiftRight<16>(rounded(pair.even)), upper)), d16, raw);
}

#if HWY_TARGET == HWY_SSE4
// No F16C here, as in elements-inl.h.
template <class D>
HWY_INLINE Pair<D> load_pair(Float16, D d, const std::uint16_t* raw) {
  HWY_ALIGN float values[2 * hn::MaxLanes(D())];
  for (std::size_t i = 0; i < 2 * hn::MaxLanes(D()); ++i) values[i] = from_float16(raw[i]);
  return load_pair(d, values);
}
template <class D>
HWY_INLINE void store_pair(Float16, D d, Pair<D> pair, std::uint16_t* raw) {
  HWY_ALIGN float values[2 * hn::MaxLanes(D())];
  hn::StoreInterleaved2(pair.even, pair.odd, d, values);
  for (std::size_t i = 0; i < 2 * hn::MaxLanes(D()); ++i) raw[i] = to_float16(values[i]);
}
#else
template <class D>
HWY_INLINE Pair<D> load_pair(Float16, D d, const std::uint16_t* raw) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::Rebind<hwy::float16_t, D> half;
  const auto both = hn::BitCast(du, hn::LoadU(hn::Repartition<std::uint16_t, D>(), raw));
  const auto upper = hn::TruncateTo(d16, hn::ShiftRight<16>(both));
  return {hn::PromoteTo(d, hn::BitCast(half, hn::TruncateTo(d16, both))), hn::PromoteTo(d, hn::BitCast(half, upper))};
}
template <class D>
HWY_INLINE void store_pair(Float16, D, Pair<D> pair, std::uint16_t* raw) {
  const hn::RebindToUnsigned<D> du;
  const hn::Repartition<std::uint16_t, D> d16;
  const hn::Rebind<std::uint16_t, D> narrow;
  const hn::Rebind<hwy::float16_t, D> half;
  const auto even = hn::PromoteTo(du, hn::BitCast(narrow, hn::DemoteTo(half, pair.even)));
  const auto odd = hn::PromoteTo(du, hn::BitCast(narrow, hn::DemoteTo(half, pair.odd)));
  hn::StoreU(hn::BitCast(d16, hn::Or(even, hn::ShiftLeft<16>(odd))), d16, raw);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace kvern
HWY_AFTER_NAMESPACE();

#endif
#endif
