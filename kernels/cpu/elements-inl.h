// Vectors of floats from and to the element types of K, V and Q, once per instruction set. No include guard of the
// usual kind: foreach_target.h includes it again for each target.
#if defined(KERNELS_CPU_ELEMENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_ELEMENTS_INL_H_
#undef KERNELS_CPU_ELEMENTS_INL_H_
#else
#define KERNELS_CPU_ELEMENTS_INL_H_
#endif

#include <hwy/highway.h>

#include "kernels/element.h"

HWY_BEFORE_NAMESPACE();
namespace kvern {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Sixteen floats at most, so that head dimensions, which are multiples of 16, need no remainder.
using DF = hn::CappedTag<float, 16>;
using DI = hn::Rebind<std::int32_t, DF>;
using DU = hn::Rebind<std::uint32_t, DF>;
using VF = hn::VFromD<DF>;

// An element type: its bits, how they become floats and back.
struct Float32 {
  using Raw = std::uint32_t;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr Raw kMagnitude = 0x7FFFFFFFU;
  static constexpr Raw kInfinity = 0x7F800000U;
  static float to_float(Raw raw) { return std::bit_cast<float>(raw); }
  static Raw from_float(float value) { return std::bit_cast<Raw>(value); }
  static HWY_INLINE VF load(const Raw* raw) { return hn::BitCast(DF(), hn::LoadU(DU(), raw)); }
  static HWY_INLINE void store(VF value, Raw* raw) { hn::StoreU(hn::BitCast(DU(), value), DU(), raw); }
};

struct BFloat16 {
  using Raw = std::uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr Raw kMagnitude = 0x7FFFU;
  static constexpr Raw kInfinity = 0x7F80U;
  static float to_float(Raw raw) { return from_bfloat16(raw); }
  static Raw from_float(float value) { return to_bfloat16(value); }
  static HWY_INLINE VF load(const Raw* raw) {
    const hn::Rebind<Raw, DF> d16;
    return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), hn::LoadU(d16, raw))));
  }
  static HWY_INLINE void store(VF value, Raw* raw) {
    const hn::Rebind<Raw, DF> d16;
    const auto bits = hn::BitCast(DU(), value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(DU(), 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(DU(), 0x7FFF))));
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(DI(), rounded)), d16, raw);
  }
};

struct Float16 {
  using Raw = std::uint16_t;
  static constexpr DType kDType = DType::kFloat16;
  static constexpr Raw kMagnitude = 0x7FFFU;
  static constexpr Raw kInfinity = 0x7C00U;
  static float to_float(Raw raw) { return from_float16(raw); }
  static Raw from_float(float value) { return to_float16(value); }
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SCALAR
  // No F16C here, and Highway's replacement for it truncates.
  static constexpr std::size_t kLanes = hn::MaxLanes(DF());
  static HWY_INLINE VF load(const Raw* raw) {
    HWY_ALIGN float values[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) values[i] = to_float(raw[i]);
    return hn::Load(DF(), values);
  }
  static HWY_INLINE void store(VF value, Raw* raw) {
    HWY_ALIGN float values[kLanes];
    hn::Store(value, DF(), values);
    for (std::size_t i = 0; i < kLanes; ++i) raw[i] = from_float(values[i]);
  }
#else
  static HWY_INLINE VF load(const Raw* raw) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    return hn::PromoteTo(DF(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(raw)));
  }
  static HWY_INLINE void store(VF value, Raw* raw) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    hn::StoreU(hn::DemoteTo(d16, value), d16, reinterpret_cast<hwy::float16_t*>(raw));
  }
#endif
};

}  // namespace HWY_NAMESPACE
}  // namespace kvern
HWY_AFTER_NAMESPACE();

#endif
