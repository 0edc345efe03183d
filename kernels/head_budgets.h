#pragma once

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "kernels/token_scores.h"

namespace kvern::evict {

/// How one layer's tokens are spread over its heads.
struct HeadBudget {
  /// Tokens per head on average, before the observation window.
  std::uint32_t tokens_per_head = 0;
  /// Share of them that every head keeps whatever the others score, 0 … 1.
  double floor = 0.2;

  Status validate() const;
};

/// Per-head adaptive budgets (Ada-KV, arXiv 2407.11550): every head first gets floor * tokens_per_head, rounded down,
/// for its best tokens; the rest goes to the best of the remaining tokens of all heads together, ties to the lower head
/// and then the lower token. Sums to heads * min(tokens_per_head, scores.tokens).
Result<std::vector<std::uint32_t>> adaptive_head_budgets(const TokenScores& scores, const HeadBudget& budget);

}  // namespace kvern::evict
