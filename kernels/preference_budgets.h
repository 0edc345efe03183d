#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvern::evict {

/// The tokens that a cascade shares out, before the observation window.
struct TokenBudget {
  std::uint64_t total = 0;  ///< over all layers
  std::uint32_t cap = 0;    ///< most that one layer can use: its candidates R
  std::uint32_t floor = 0;  ///< least that one layer gets, where the total allows it
};

/// CAKE's allocation over the m layers seen so far, in real numbers: b_l = clamp(lambda * P_l, floor, cap) with lambda
/// such that they sum to min(total, m * cap). Preferences that are NaN, infinite or negative count as 0. When all are
/// 0, or m * floor >= that sum, every layer gets the same; when the others are full, layers of preference 0 share the
/// rest equally. More layers never raise a layer's share.
std::vector<double> preference_shares(std::span<const double> preferences, const TokenBudget& budget);

/// The shares in whole tokens. Before the last stage (m < layers) rounded up, so that stages nest and no token is lost
/// that a later stage keeps; at the last rounded down, the missing tokens one each to the largest fractions, ties to
/// the lower layer: the sum is exactly min(total, m * cap).
std::vector<std::uint32_t> fair_budgets(std::span<const double> preferences, const TokenBudget& budget,
                                        std::uint32_t layers);

/// The rounding of CAKE's published code, for comparison with it: ignores the floor, may exceed the cap, and may raise
/// an earlier layer's budget from one stage to the next. Preferences that do not sum to a positive number: as
/// fair_budgets (the published code divides by zero).
std::vector<std::uint32_t> reference_budgets(std::span<const double> preferences, const TokenBudget& budget);

}  // namespace kvern::evict
