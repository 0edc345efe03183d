#include "kernels/head_budgets.h"

#include <algorithm>
#include <cmath>

#include "kernels/selection.h"

namespace kvern::evict {

Status HeadBudget::validate() const {
  if (floor >= 0 && floor <= 1) return Status::ok();
  return {Code::kInvalid, "head budget: floor must lie between 0 and 1"};
}

Result<std::vector<std::uint32_t>> adaptive_head_budgets(const TokenScores& scores, const HeadBudget& budget) {
  if (Status status = budget.validate(); !status) return failure(std::move(status));
  const std::uint32_t average = std::min(budget.tokens_per_head, scores.tokens);
  const auto floor = static_cast<std::uint32_t>(std::floor(budget.floor * average));
  std::vector<std::uint32_t> budgets(scores.heads, floor);
  // The tokens that no head is sure to keep, in the order of heads and tokens, and the head of each.
  std::vector<float> contested;
  std::vector<std::uint32_t> heads;
  for (std::uint32_t head = 0; head < scores.heads; ++head) {
    const std::span<const float> of_head = scores.of(head);
    const std::vector<std::uint32_t> sure = best_of(of_head, floor);
    auto next = sure.begin();
    for (std::uint32_t token = 0; token < scores.tokens; ++token) {
      if (next != sure.end() && *next == token) {
        ++next;
        continue;
      }
      contested.push_back(of_head[token]);
      heads.push_back(head);
    }
  }
  for (const std::uint32_t i : best_of(contested, std::size_t{scores.heads} * (average - floor))) ++budgets[heads[i]];
  return budgets;
}

}  // namespace kvern::evict
