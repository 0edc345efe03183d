#include "kernels/layer_budgets.h"

#include <algorithm>

#include "kernels/preference_budgets.h"

namespace kvern::evict {

std::vector<std::uint32_t> uniform_budgets(std::uint32_t layers, std::uint64_t total, std::uint32_t cap) {
  return fair_budgets(std::vector<double>(layers, 1), {total, cap, 0}, layers);
}

std::vector<std::uint32_t> pyramid_budgets(std::uint32_t layers, std::uint64_t total, std::uint32_t cap, double slope) {
  const double last = 1 / slope;
  const double first = 2 - last;
  std::vector<double> weights(layers, 1);
  for (std::uint32_t layer = 0; layer < layers && layers > 1; ++layer) {
    weights[layer] = first + (last - first) * layer / (layers - 1);
  }
  return fair_budgets(weights, {total, cap, 0}, layers);
}

std::vector<std::uint32_t> window_pyramid_implemented(std::uint32_t tokens_per_layer, const LayerGroups& groups,
                                                      std::uint32_t slope) {
  const std::uint32_t count = groups.count();
  if (count <= 1) return std::vector<std::uint32_t>(count, tokens_per_layer);
  const std::int64_t last = std::int64_t{tokens_per_layer} * groups.per_group / slope;
  const std::int64_t first = 2 * std::int64_t{tokens_per_layer} - last;
  const std::int64_t steps = count - 1;
  // Rounded down, also below zero.
  std::int64_t step = (first - last) / steps;
  if ((first - last) % steps < 0) --step;
  std::vector<std::uint32_t> budgets(count);
  for (std::uint32_t group = 0; group < count; ++group) {
    const std::int64_t tokens = group + 1 == count ? last : first - group * step;
    budgets[group] = static_cast<std::uint32_t>(std::max<std::int64_t>(0, tokens));
  }
  return budgets;
}

std::vector<double> window_pyramid_printed(std::uint32_t tokens_per_layer, const LayerGroups& groups,
                                           std::uint32_t slope) {
  const std::uint32_t count = groups.count();
  if (count <= 1) return std::vector<double>(count, tokens_per_layer);
  const double total = static_cast<double>(tokens_per_layer) * groups.layers;
  const double last = total / (static_cast<double>(slope) * count);
  const double first = 2 * total / count - last;
  std::vector<double> budgets(count);
  for (std::uint32_t group = 0; group < count; ++group) {
    budgets[group] = (first + (last - first) * group / (count - 1)) / groups.per_group;
  }
  return budgets;
}

bool is_inverted(const std::vector<std::uint32_t>& group_budgets) {
  return !group_budgets.empty() && group_budgets.back() > group_budgets.front();
}

}  // namespace kvern::evict
