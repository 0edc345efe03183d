#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/token_scores.h"

namespace kvern::evict {

/// Statistics of the query heads of one KV head: means and variances (null: none), each [head][column].
struct HeadStatistics {
  const float* means = nullptr;
  const float* variances = nullptr;
  std::uint32_t heads = 0;
  std::uint32_t columns = 0;
};

/// out[column] = mean over the heads of pooled (mean + gamma * variance). The terms of a pooled value are put together
/// from left to right, for every column alike.
void pooled_scores(const HeadStatistics& statistics, float gamma, const Pooling& pooling, float* out);

}  // namespace kvern::evict
