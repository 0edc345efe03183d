#include "kernels/cascade.h"

#include <algorithm>
#include <string>

namespace kvern::evict {

Status CascadeOptions::validate() const {
  if (layers == 0) return {Code::kInvalid, "cascade: no layers"};
  if (cache_tokens > window) return Status::ok();
  return {Code::kInvalid, "cascade: a cache of " + std::to_string(cache_tokens) +
                              " tokens per layer holds no more than "
                              "the window of " +
                              std::to_string(window) + "; give it more"};
}

std::uint64_t CascadeOptions::total() const { return std::uint64_t{cache_tokens - window} * layers; }

Cascade::Cascade(const CascadeOptions& options, std::uint32_t candidates)
    : options_(options), candidates_(candidates) {}

Status Cascade::add_layer(double preference, const TokenScores& scores) {
  if (layers_.size() >= options_.layers) {
    return {Code::kInvalid, "cascade: all " + std::to_string(options_.layers) + " layers have been added"};
  }
  if (scores.tokens != candidates_) {
    return {Code::kInvalid, "cascade: scores of " + std::to_string(scores.tokens) + " tokens for " +
                                std::to_string(candidates_) + " candidates"};
  }
  preferences_.push_back(preference);
  const TokenBudget budget{options_.total(), candidates_, options_.floor};
  budgets_ = options_.rounding == BudgetRounding::kFair ? fair_budgets(preferences_, budget, options_.layers)
                                                        : reference_budgets(preferences_, budget);
  Layer layer;
  layer.held = std::min(candidates_, budgets_.back());
  for (std::uint32_t head = 0; head < scores.heads; ++head) {
    layer.ranked.push_back(ranked_best_of(scores.of(head), layer.held));
  }
  layers_.push_back(std::move(layer));
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    if (budgets_[i] >= layers_[i].held) continue;
    layers_[i].held = budgets_[i];
    for (auto& ranked : layers_[i].ranked) ranked.resize(budgets_[i]);
  }
  return Status::ok();
}

Selection Cascade::kept(std::uint32_t layer) const {
  Selection selection;
  for (const auto& ranked : layers_[layer].ranked) {
    const auto first = static_cast<std::ptrdiff_t>(selection.tokens.size());
    selection.tokens.insert(selection.tokens.end(), ranked.begin(), ranked.end());
    std::sort(selection.tokens.begin() + first, selection.tokens.end());
    for (std::uint32_t i = 0; i < options_.window; ++i) selection.tokens.push_back(candidates_ + i);
    selection.offsets.push_back(static_cast<std::uint32_t>(selection.tokens.size()));
  }
  return selection;
}

}  // namespace kvern::evict
