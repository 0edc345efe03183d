#include "kernels/cpu/align.h"

#include <algorithm>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/align.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvern::align {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
constexpr std::uint32_t kLanes = hn::MaxLanes(D());
constexpr std::uint32_t kColumns = 16;
constexpr std::uint32_t kParts = kColumns / kLanes;
// Rows that share a load of the matrix: their sums fill half of the registers at least.
constexpr std::uint32_t kRows = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;

// Every sum runs over i in order, one product and one sum at a time, whatever a vector holds.
template <std::uint32_t kCount>
HWY_INLINE void multiply_some(const float* HWY_RESTRICT rows, const float* HWY_RESTRICT matrix, std::uint32_t n,
                              std::uint32_t column, float* HWY_RESTRICT out) {
  hn::VFromD<D> sums[kCount][kParts];
  for (auto& row : sums) {
    for (auto& sum : row) sum = hn::Zero(D());
  }
  for (std::uint32_t i = 0; i < n; ++i) {
    for (std::uint32_t part = 0; part < kParts; ++part) {
      const auto factor = hn::LoadU(D(), matrix + std::size_t{i} * n + column + std::size_t{part} * kLanes);
      for (std::uint32_t row = 0; row < kCount; ++row) {
        const auto value = hn::Set(D(), rows[std::size_t{row} * n + i]);
        sums[row][part] = hn::Add(sums[row][part], hn::Mul(value, factor));
      }
    }
  }
  for (std::uint32_t row = 0; row < kCount; ++row) {
    for (std::uint32_t part = 0; part < kParts; ++part) {
      hn::StoreU(sums[row][part], D(), out + std::size_t{row} * n + column + std::size_t{part} * kLanes);
    }
  }
}

void multiply_impl(const float* rows, std::uint32_t tokens, const float* matrix, std::uint32_t n, float* out) {
  for (std::uint32_t column = 0; column < n; column += kColumns) {
    std::uint32_t token = 0;
    for (; token + kRows <= tokens; token += kRows) {
      const std::size_t at = std::size_t{token} * n;
      multiply_some<kRows>(rows + at, matrix, n, column, out + at);
    }
    for (; token < tokens; ++token) {
      const std::size_t at = std::size_t{token} * n;
      multiply_some<1>(rows + at, matrix, n, column, out + at);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::align
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::align {

HWY_EXPORT(multiply_impl);

void multiply(const float* rows, std::uint32_t tokens, const float* matrix, std::uint32_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(multiply_impl)(rows, tokens, matrix, n, out);
}

}  // namespace kvern::align
#endif
