#include "kernels/cpu/key_scores.h"

#include <algorithm>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/key_scores.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/lane_sums-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::evict {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

// One product of a row with the anchor, or with itself.
struct WithItself {
  HWY_INLINE VF vector(VF key, std::uint32_t) const { return key; }
  float scalar(float key, std::uint32_t) const { return key; }
};
struct WithAnchor {
  const float* anchor;
  HWY_INLINE VF vector(VF, std::uint32_t i) const { return hn::LoadU(DF(), anchor + i); }
  float scalar(float, std::uint32_t i) const { return anchor[i]; }
};

// As many tokens at a time as a vector has lanes. The last ones may be done twice.
template <class E, class Other>
void products(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, Other other, float* HWY_RESTRICT out) {
  const std::uint32_t whole = keys.dim / kLanes * kLanes;
  const std::uint32_t count = tokens.end - tokens.begin;
  for (std::uint32_t first = 0; first < count; first += kLanes) {
    VF sums[kLanes];
    HWY_ALIGN float rest[kLanes];
    for (std::uint32_t t = 0; t < kLanes; ++t) {
      const std::uint32_t token = tokens.begin + std::min(first + t, count - 1);
      const auto* row = reinterpret_cast<const typename E::Raw*>(keys.row(head, token));
      sums[t] = hn::Zero(DF());
      for (std::uint32_t i = 0; i < whole; i += kLanes) {
        const VF key = E::load(row + i);
        sums[t] = hn::MulAdd(key, other.vector(key, i), sums[t]);
      }
      rest[t] = 0;
      for (std::uint32_t i = whole; i < keys.dim; ++i) {
        const float key = E::to_float(row[i]);
        rest[t] += key * other.scalar(key, i);
      }
    }
    HWY_ALIGN float sum[kLanes];
    hn::Store(hn::Add(sums_of_lanes(sums), hn::Load(DF(), rest)), DF(), sum);
    std::copy_n(sum, std::min(kLanes, count - first), out + first);
  }
}

template <class E>
void add_scaled_rows_as(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, const float* HWY_RESTRICT factors,
                        float* HWY_RESTRICT sum) {
  // Rows that are still in the L1 cache when the next vector of them is read.
  constexpr std::uint32_t kRows = 32;
  const std::uint32_t whole = keys.dim / kLanes * kLanes;
  const std::uint32_t count = tokens.end - tokens.begin;
  for (std::uint32_t first = 0; first < count; first += kRows) {
    const typename E::Raw* rows[kRows];
    float used[kRows];
    std::uint32_t n = 0;
    for (std::uint32_t t = first; t < std::min(count, first + kRows); ++t) {
      if (factors[t] == 0) continue;
      rows[n] = reinterpret_cast<const typename E::Raw*>(keys.row(head, tokens.begin + t));
      used[n++] = factors[t];
    }
    for (std::uint32_t i = 0; i < whole; i += kLanes) {
      VF total = hn::LoadU(DF(), sum + i);
      for (std::uint32_t t = 0; t < n; ++t) total = hn::MulAdd(E::load(rows[t] + i), hn::Set(DF(), used[t]), total);
      hn::StoreU(total, DF(), sum + i);
    }
    for (std::uint32_t i = whole; i < keys.dim; ++i) {
      for (std::uint32_t t = 0; t < n; ++t) sum[i] += E::to_float(rows[t][i]) * used[t];
    }
  }
}

template <class Run>
HWY_INLINE void with_element(DType dtype, Run run) {
  if (dtype == DType::kFloat32) run(Float32());
  if (dtype == DType::kFloat16) run(Float16());
  if (dtype == DType::kBFloat16) run(BFloat16());
}

void squared_norms_any(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, float* out) {
  with_element(keys.dtype, [&]<class E>(E) { products<E>(keys, head, tokens, WithItself(), out); });
}

void dot_products_any(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, const float* anchor, float* out) {
  with_element(keys.dtype, [&]<class E>(E) { products<E>(keys, head, tokens, WithAnchor{anchor}, out); });
}

void add_scaled_rows_any(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, const float* factors,
                         float* sum) {
  with_element(keys.dtype, [&]<class E>(E) { add_scaled_rows_as<E>(keys, head, tokens, factors, sum); });
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::evict
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::evict {

HWY_EXPORT(squared_norms_any);
HWY_EXPORT(dot_products_any);
HWY_EXPORT(add_scaled_rows_any);

void squared_norms(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, float* out) {
  HWY_DYNAMIC_DISPATCH(squared_norms_any)(keys, head, tokens, out);
}

void dot_products(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, const float* anchor, float* out) {
  HWY_DYNAMIC_DISPATCH(dot_products_any)(keys, head, tokens, anchor, out);
}

void add_scaled_rows(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, const float* factors, float* sum) {
  HWY_DYNAMIC_DISPATCH(add_scaled_rows_any)(keys, head, tokens, factors, sum);
}

}  // namespace kvern::evict
#endif
