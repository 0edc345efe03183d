#include "kernels/slot_pages.h"

#include <algorithm>
#include <string>

#include "kernels/preference_budgets.h"

namespace kvern {
namespace {

using Counts = std::span<const std::uint32_t>;

bool fit(SlotLayout layout, Counts counts, std::uint32_t blocks) {
  if (counts.empty() || std::ranges::find(counts, 0U) != counts.end()) return false;
  if (layout != SlotLayout::kPool) {
    const auto [least, most] = std::ranges::minmax(counts);
    return layout == SlotLayout::kShift ? most <= blocks : least == blocks && most == blocks;
  }
  std::uint64_t sum = 0;
  for (const std::uint32_t count : counts) sum += count;
  return sum == std::uint64_t{blocks} * counts.size();
}

}  // namespace

Result<std::vector<std::vector<SlotPage>>> slot_pages(SlotLayout layout, Counts pages_of_layers, std::uint32_t blocks) {
  if (!fit(layout, pages_of_layers, blocks)) {
    return failure(Code::kInvalid, "the pages of " + std::to_string(pages_of_layers.size()) + " layers do not fit " +
                                       std::to_string(blocks) + " blocks in the layout " +
                                       std::string(slot_layout_name(layout)));
  }
  const auto layers = static_cast<std::uint32_t>(pages_of_layers.size());
  std::vector<SlotPage> free;
  for (std::uint32_t layer = 0; layout == SlotLayout::kPool && layer < layers; ++layer) {
    for (std::uint32_t block = pages_of_layers[layer]; block < blocks; ++block) free.push_back({layer, block});
  }
  auto next = free.begin();
  std::vector<std::vector<SlotPage>> pages(layers);
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    const std::uint32_t count = pages_of_layers[layer], own = std::min(count, blocks);
    const std::uint32_t first = layout == SlotLayout::kShift ? blocks - own : 0;
    pages[layer].reserve(count);
    for (std::uint32_t i = 0; i < own; ++i) pages[layer].push_back({layer, first + i});
    for (std::uint32_t extra = own; extra < count; ++extra) pages[layer].push_back(*next++);
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
