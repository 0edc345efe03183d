#pragma once

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "kernels/preference_budgets.h"
#include "kernels/selection.h"
#include "kernels/token_scores.h"

namespace kvern::evict {

/// When a prompt is evicted at all. A prompt of at most `window` tokens is not even scored.
enum class PrefillRule {
  kReference,  ///< as published: when it is longer than the cache and the window together
  kStrict,     ///< when it is longer than the cache
};
constexpr bool has_candidates(std::uint64_t tokens, std::uint32_t window) { return tokens > window; }
constexpr bool evicts(PrefillRule rule, std::uint64_t tokens, std::uint32_t cache_tokens, std::uint32_t window) {
  return has_candidates(tokens, window) &&
         tokens > std::uint64_t{cache_tokens} + (rule == PrefillRule::kReference ? window : 0);
}

/// How budgets become whole tokens; see preference_budgets.h.
enum class BudgetRounding { kFair, kReference };

struct CascadeOptions {
  std::uint32_t layers = 0;        ///< of the model
  std::uint32_t cache_tokens = 0;  ///< C: tokens per layer on average, window included
  std::uint32_t window = 32;       ///< w: last tokens, always kept
  std::uint32_t floor = 0;         ///< least candidates per layer
  BudgetRounding rounding = BudgetRounding::kFair;

  /// kInvalid without layers, or when the cache does not hold more than the window.
  Status validate() const;
  /// (C - w) * layers.
  std::uint64_t total() const;
};

/// CAKE's eviction while a prompt is prefilled: as each layer is done, all layers seen share the whole budget by
/// preference, and those before are cut further by the scores they came with. With fair rounding the end is the same
/// as one eviction with the last budgets. Holds indices and scores' order, never K or V. Not thread-safe.
class Cascade {
 public:
  /// candidates: R, the prompt's tokens before the window, the same for all layers. The options are valid.
  Cascade(const CascadeOptions& options, std::uint32_t candidates);

  /// The next layer: its preference and its scores over the candidates. Cuts every layer seen to its budget of this
  /// stage. kInvalid, nothing changed, for scores of another number of candidates or a layer too many.
  Status add_layer(double preference, const TokenScores& scores);

  std::uint32_t layers_seen() const { return static_cast<std::uint32_t>(layers_.size()); }
  /// Budgets of the last stage, one per layer seen. With reference rounding one may exceed what its layer still holds.
  const std::vector<std::uint32_t>& budgets() const { return budgets_; }
  /// Candidates that each head of a layer still holds.
  std::uint32_t held(std::uint32_t layer) const { return layers_[layer].held; }
  /// Tokens that a layer still holds, its window included.
  Selection kept(std::uint32_t layer) const;

 private:
  /// Best first, so that a smaller budget is a change of length.
  struct Layer {
    std::vector<std::vector<std::uint32_t>> ranked;
    std::uint32_t held = 0;
  };

  const CascadeOptions options_;
  const std::uint32_t candidates_;
  std::vector<double> preferences_;
  std::vector<std::uint32_t> budgets_;
  std::vector<Layer> layers_;
};

}  // namespace kvern::evict
