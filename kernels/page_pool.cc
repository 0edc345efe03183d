#include "kernels/page_pool.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "kernels/preference_budgets.h"

namespace kvern {

Result<std::vector<std::vector<PoolPage>>> pool_pages(std::span<const std::uint32_t> pages_of_layers) {
  const auto layers = static_cast<std::uint32_t>(pages_of_layers.size());
  const auto sum = std::accumulate(pages_of_layers.begin(), pages_of_layers.end(), std::uint64_t{0});
  if (layers == 0 || sum % layers != 0 || sum > std::numeric_limits<std::uint32_t>::max() ||
      std::ranges::find(pages_of_layers, 0U) != pages_of_layers.end()) {
    return failure(Code::kInvalid, "a pool of " + std::to_string(sum) + " pages does not fit " +
                                       std::to_string(layers) + " layers that have at least one each");
  }
  const auto blocks = static_cast<std::uint32_t>(sum / layers);
  std::vector<PoolPage> free;
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    for (std::uint32_t block = pages_of_layers[layer]; block < blocks; ++block) free.push_back({layer, block});
  }
  auto next = free.begin();
  std::vector<std::vector<PoolPage>> pages(layers);
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    const std::uint32_t count = pages_of_layers[layer];
    pages[layer].reserve(count);
    for (std::uint32_t block = 0; block < std::min(count, blocks); ++block) pages[layer].push_back({layer, block});
    for (std::uint32_t extra = blocks; extra < count; ++extra) pages[layer].push_back(*next++);
  }
  return pages;
}

std::vector<std::uint32_t> whole_pages(std::span<const double> tokens, const PageBudget& budget) {
  std::vector<double> pages(tokens.begin(), tokens.end());
  for (double& share : pages) share /= budget.page_tokens;
  const auto layers = static_cast<std::uint32_t>(tokens.size());
  return evict::fair_budgets(pages, {std::uint64_t{budget.mean_pages} * layers, budget.most, budget.least}, layers);
}

}  // namespace kvern
