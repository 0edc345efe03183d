#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/observation.h"
#include "kernels/selection.h"

namespace kvern::evict {

/// WindowKV (arXiv 2503.17922): text windows are scored and kept whole. Window k is tokens [k * tokens,
/// min((k + 1) * tokens, R)) of the R tokens before the observation window; the last may be short.
struct WindowRule {
  /// Tokens per window (the paper's omega), > 0.
  std::uint32_t tokens = 8;
  /// A window's score is the mean of its `best` highest tokens (the paper's p), > 0. best >= tokens: the plain mean,
  /// the paper's rule for localisation; tokens / 2 in its code for aggregation.
  std::uint32_t best = 8;

  Status validate() const;
  std::uint32_t count(std::uint32_t columns) const { return columns / tokens + (columns % tokens != 0 ? 1 : 0); }
};

/// One score per window, for all heads: the mean over all query heads of the rule's mean of t[h, j] = sum_i A[h, i, j].
/// Tensor-parallel ranks sum these over their heads before they select. kInvalid when the rule is not valid.
Result<std::vector<float>> window_scores(const Observation& observation, const WindowRule& rule, Executor* executor);

/// The same from column sums t [heads][columns].
Result<std::vector<float>> window_scores(std::span<const float> sums, std::uint32_t heads, const WindowRule& rule,
                                         Executor* executor);

/// Windows that stay, ascending, of `columns` tokens before the observation window: the best, ties to the lower window,
/// after ceil((columns - budget) / tokens) are dropped; none when those dropped cover all columns; all when the columns
/// fit the budget. Tokens kept can differ from the budget by less than one window either way.
std::vector<std::uint32_t> select_windows(std::span<const float> scores, const WindowRule& rule, std::uint32_t columns,
                                          std::uint32_t budget);

/// Tokens of the windows and the `tail` tokens after the columns, for every head alike. What a leader layer selects
/// holds for the followers of its group: they gather the same tokens of their own K and V.
Selection window_tokens(std::span<const std::uint32_t> windows, const WindowRule& rule, std::uint32_t columns,
                        std::uint32_t tail, std::uint32_t kv_heads);

/// Neighbouring layers that share one list of windows. The first of a group leads; the last group may be shorter.
struct LayerGroups {
  std::uint32_t layers = 0;
  std::uint32_t per_group = 1;  ///< > 0

  std::uint32_t count() const { return (layers + per_group - 1) / per_group; }
  std::uint32_t group_of(std::uint32_t layer) const { return layer / per_group; }
  std::uint32_t leader_of(std::uint32_t layer) const { return layer / per_group * per_group; }
  bool leads(std::uint32_t layer) const { return layer % per_group == 0; }
};

}  // namespace kvern::evict
