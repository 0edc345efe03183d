#pragma once

#include <cstdint>
#include <vector>

#include "kernels/window_scores.h"

namespace kvern::evict {

/// Tokens per layer that do not depend on the prompt. All count tokens before the observation window.

/// The same for every layer; what does not divide goes one each to the lowest layers. Sums to min(total, layers * cap).
std::vector<std::uint32_t> uniform_budgets(std::uint32_t layers, std::uint64_t total, std::uint32_t cap);

/// PyramidKV (arXiv 2406.02069): falls in a line from 2C - C/slope in the first layer to C/slope in the last, where C =
/// total / layers. Sums to min(total, layers * cap); what the cap takes goes to the other layers in proportion. slope
/// >= 1; one layer gets all.
std::vector<std::uint32_t> pyramid_budgets(std::uint32_t layers, std::uint64_t total, std::uint32_t cap, double slope);

/// WindowKV's published slope control.
constexpr std::uint32_t kWindowPyramidSlope = 14;

/// WindowKV's pyramid as its authors implemented it, in integers: tokens per layer of every group, for C tokens per
/// layer on average. Sums to a few tokens more than C * layers; inverted (rising) when the groups are large: the
/// caller may want to warn (see is_inverted()). Never negative.
std::vector<std::uint32_t> window_pyramid_implemented(std::uint32_t tokens_per_layer, const LayerGroups& groups,
                                                      std::uint32_t slope);

/// WindowKV's pyramid as printed in the paper, in reals: steeper, to tokens_per_layer / slope in the last group.
std::vector<double> window_pyramid_printed(std::uint32_t tokens_per_layer, const LayerGroups& groups,
                                           std::uint32_t slope);

/// True when the last group gets more than the first.
bool is_inverted(const std::vector<std::uint32_t>& group_budgets);

}  // namespace kvern::evict
