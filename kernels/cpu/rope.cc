#include "kernels/cpu/rope.h"

#include <algorithm>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rope.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include "kernels/cpu/elements-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::rope {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

constexpr auto kLanes = static_cast<std::uint32_t>(hn::MaxLanes(DF()));

template <class E>
void load_row(const std::byte* from, std::uint32_t dim, float* HWY_RESTRICT to) {
  const auto* raw = reinterpret_cast<const typename E::Raw*>(from);
  std::uint32_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) hn::StoreU(E::load(raw + i), DF(), to + i);
  for (; i < dim; ++i) to[i] = E::to_float(raw[i]);
}

template <class E>
void store_row(const float* HWY_RESTRICT from, std::uint32_t dim, std::byte* to) {
  auto* raw = reinterpret_cast<typename E::Raw*>(to);
  constexpr float kMost = largest_finite(E::kDType);
  [[maybe_unused]] const VF most = hn::Set(DF(), kMost);
  [[maybe_unused]] const VF least = hn::Set(DF(), -kMost);
  std::uint32_t i = 0;
  // Of 16-bit types only: what is not finite stays visible in fp32.
  constexpr bool kClamps = E::kDType != DType::kFloat32;
  for (; i + kLanes <= dim; i += kLanes) {
    VF value = hn::LoadU(DF(), from + i);
    if constexpr (kClamps) value = hn::Min(hn::Max(value, least), most);
    E::store(value, raw + i);
  }
  for (; i < dim; ++i) raw[i] = E::from_float(kClamps ? std::min(std::max(from[i], -kMost), kMost) : from[i]);
}

void turn_neox(const RowTurn& by, float* HWY_RESTRICT row) {
  float* HWY_RESTRICT second = row + by.pairs;
  const float sign = by.direction == Direction::kForward ? 1.0F : -1.0F;
  const VF signs = hn::Set(DF(), sign);
  std::uint32_t i = 0;
  for (; i + kLanes <= by.pairs; i += kLanes) {
    const VF c = hn::LoadU(DF(), by.cosines + i);
    const VF s = hn::Mul(hn::LoadU(DF(), by.sines + i), signs);
    const VF a = hn::LoadU(DF(), row + i);
    const VF b = hn::LoadU(DF(), second + i);
    hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), DF(), row + i);
    hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), DF(), second + i);
  }
  for (; i < by.pairs; ++i) turn({by.cosines[i], by.sines[i] * sign}, row[i], second[i]);
}

void turn_interleaved(const RowTurn& by, float* HWY_RESTRICT row) {
  const float sign = by.direction == Direction::kForward ? 1.0F : -1.0F;
  std::uint32_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const VF signs = hn::Set(DF(), sign);
  for (; i + kLanes <= by.pairs; i += kLanes) {
    const VF c = hn::LoadU(DF(), by.cosines + i);
    const VF s = hn::Mul(hn::LoadU(DF(), by.sines + i), signs);
    VF a;
    VF b;
    hn::LoadInterleaved2(DF(), row + 2 * i, a, b);
    hn::StoreInterleaved2(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), hn::Add(hn::Mul(b, c), hn::Mul(a, s)), DF(),
                          row + 2 * i);
  }
#endif
  for (; i < by.pairs; ++i) turn({by.cosines[i], by.sines[i] * sign}, row[2 * i], row[2 * i + 1]);
}

using LoadRow = void(const std::byte*, std::uint32_t, float*);
using StoreRow = void(const float*, std::uint32_t, std::byte*);

void rotate_rows(const std::byte* rows, std::size_t row_stride_bytes, DType dtype, std::uint32_t count,
                 std::uint32_t dim, RowTurn turn, std::size_t turn_stride, DType out_dtype, std::byte* out) {
  LoadRow* const load = dtype == DType::kFloat32   ? load_row<Float32>
                        : dtype == DType::kFloat16 ? load_row<Float16>
                                                   : load_row<BFloat16>;
  StoreRow* const store = out_dtype == DType::kFloat32   ? store_row<Float32>
                          : out_dtype == DType::kFloat16 ? store_row<Float16>
                                                         : store_row<BFloat16>;
  HWY_ALIGN float row[kMaxDim];
  const std::size_t out_bytes = dim * dtype_bytes(out_dtype);
  for (std::uint32_t i = 0; i < count; ++i) {
    load(rows + i * row_stride_bytes, dim, row);
    if (turn.style == Style::kNeox) {
      turn_neox(turn, row);
    } else {
      turn_interleaved(turn, row);
    }
    store(row, dim, out + i * out_bytes);
    turn.cosines += turn_stride;
    turn.sines += turn_stride;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::rope
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::rope {
HWY_EXPORT(rotate_rows);

void rotate_head(const std::byte* rows, std::size_t row_stride_bytes, DType dtype, std::uint32_t count,
                 std::uint32_t dim, RowTurn turn, std::size_t turn_stride, DType out_dtype, std::byte* out) {
  HWY_DYNAMIC_DISPATCH(rotate_rows)
  (rows, row_stride_bytes, dtype, count, dim, turn, turn_stride, out_dtype, out);
}

}  // namespace kvern::rope
#endif
