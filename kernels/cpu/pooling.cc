#include "kernels/cpu/pooling.h"

#include <limits>
#include <vector>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/pooling.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include "kernels/cpu/elements-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::evict {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

constexpr std::uint32_t kLanes = hn::MaxLanes(DF());

void write_indicator(const float* HWY_RESTRICT means, const float* HWY_RESTRICT variances, float gamma,
                     std::uint32_t columns, float* HWY_RESTRICT out) {
  std::uint32_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    VF value = hn::LoadU(DF(), means + column);
    if (variances != nullptr) value = hn::MulAdd(hn::Set(DF(), gamma), hn::LoadU(DF(), variances + column), value);
    hn::StoreU(value, DF(), out + column);
  }
  for (; column < columns; ++column) {
    const float variance = variances == nullptr ? 0.0F : variances[column];
    out[column] = hn::GetLane(hn::MulAdd(hn::Set(DF(), gamma), hn::Set(DF(), variance), hn::Set(DF(), means[column])));
  }
}

void pooled_scores_any(const HeadStatistics& statistics, float gamma, const Pooling& pooling, float* out) {
  const bool largest = pooling.kind == Pooling::Kind::kMaximum;
  const std::uint32_t width = pooling.kind == Pooling::Kind::kNone ? 1 : pooling.width;
  const std::uint32_t columns = statistics.columns;
  const std::uint32_t padded = (columns + kLanes - 1) / kLanes * kLanes;
  // Room for a last vector that reaches beyond the columns, and for the terms on both sides.
  std::vector<float> indicator(padded + width, largest ? -std::numeric_limits<float>::infinity() : 0.0F);
  std::vector<float> sums(padded);
  const VF divisor = hn::Set(DF(), static_cast<float>(width));
  for (std::uint32_t head = 0; head < statistics.heads; ++head) {
    const std::size_t first = std::size_t{head} * columns;
    write_indicator(statistics.means + first, statistics.variances == nullptr ? nullptr : statistics.variances + first,
                    gamma, columns, indicator.data() + width / 2);
    for (std::uint32_t column = 0; column < columns; column += kLanes) {
      VF pooled = hn::LoadU(DF(), indicator.data() + column);
      for (std::uint32_t i = 1; i < width; ++i) {
        const VF next = hn::LoadU(DF(), indicator.data() + column + i);
        pooled = largest ? hn::Max(pooled, next) : hn::Add(pooled, next);
      }
      if (!largest) pooled = hn::Div(pooled, divisor);
      hn::StoreU(hn::Add(hn::LoadU(DF(), sums.data() + column), pooled), DF(), sums.data() + column);
    }
  }
  const auto heads = static_cast<float>(statistics.heads);
  for (std::uint32_t column = 0; column < columns; ++column) out[column] = sums[column] / heads;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::evict
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::evict {

HWY_EXPORT(pooled_scores_any);

void pooled_scores(const HeadStatistics& statistics, float gamma, const Pooling& pooling, float* out) {
  HWY_DYNAMIC_DISPATCH(pooled_scores_any)(statistics, gamma, pooling, out);
}

}  // namespace kvern::evict
#endif
