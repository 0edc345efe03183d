#include "kernels/slot_pages.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <utility>

namespace kvern {
namespace {

using Pages = std::vector<std::uint32_t>;

using Places = std::vector<SlotPage>;

TEST(SlotPages, ThePoolLendsWhatThinLayersLeaveFreeToThickOnes) {
  const auto pages = slot_pages(SlotLayout::kPool, Pages{4, 1, 2, 1}, 2).value();
  EXPECT_EQ(pages[0], (Places{{0, 0}, {0, 1}, {1, 1}, {3, 1}}));
  EXPECT_EQ(pages[1], (Places{{1, 0}}));
  EXPECT_EQ(pages[2], (Places{{2, 0}, {2, 1}}));
}

TEST(SlotPages, TheShiftLeavesTheFirstBlocksOfThinLayersFree) {
  const auto pages = slot_pages(SlotLayout::kShift, Pages{3, 1}, 4).value();
  EXPECT_EQ(pages[0], (Places{{0, 1}, {0, 2}, {0, 3}}));
  EXPECT_EQ(pages[1], (Places{{1, 3}}));
}

TEST(SlotPages, ARectangleIsAllBlocks) {
  const auto pages = slot_pages(SlotLayout::kRectangular, Pages{2, 2}, 2).value();
  EXPECT_EQ(pages[1], (Places{{1, 0}, {1, 1}}));
}

TEST(SlotPages, RefusesWhatDoesNotFitItsBlocks) {
  const auto refused = [](SlotLayout layout, const Pages& pages, std::uint32_t blocks) {
    const auto found = slot_pages(layout, pages, blocks);
    return !found && found.error().code() == Code::kInvalid;
  };
  for (const Pages& pages : {Pages{}, Pages{1, 2}, Pages{2, 0}, Pages{1, 1}}) {
    EXPECT_TRUE(refused(SlotLayout::kPool, pages, 2));
  }
  for (const Pages& pages : {Pages{}, Pages{1, 3}, Pages{2, 0}}) {
    EXPECT_TRUE(refused(SlotLayout::kShift, pages, 2));
  }
  for (const Pages& pages : {Pages{}, Pages{1, 2}, Pages{3, 3}}) {
    EXPECT_TRUE(refused(SlotLayout::kRectangular, pages, 2));
  }
}

RC_GTEST_PROP(SlotPages, ThePoolGivesEveryPageToExactlyOneLayer, ()) {
  const auto layers = *rc::gen::inRange<std::uint32_t>(1, 40);
  const auto blocks = *rc::gen::inRange<std::uint32_t>(1, 30);
  Pages counts(layers, blocks);
  for (int i = 0; i < 100; ++i) {
    const auto from = *rc::gen::inRange<std::uint32_t>(0, layers), to = *rc::gen::inRange<std::uint32_t>(0, layers);
    if (counts[from] > 1) --counts[from], ++counts[to];
  }
  const auto pages = slot_pages(SlotLayout::kPool, counts, blocks).value();
  std::set<std::pair<std::uint32_t, std::uint32_t>> seen;
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    RC_ASSERT(pages[layer].size() == counts[layer]);
    for (std::uint32_t i = 0; i < counts[layer]; ++i) {
      const SlotPage page = pages[layer][i];
      RC_ASSERT(page.layer < layers && page.block < blocks);
      RC_ASSERT(i >= blocks || (page == SlotPage{layer, i}));
      RC_ASSERT(seen.emplace(page.layer, page.block).second);
    }
  }
  RC_ASSERT(seen.size() == std::size_t{layers} * blocks);
}

RC_GTEST_PROP(SlotPages, WholePagesSumToTheMeanAndStayWithinAPageOfTheirShare, ()) {
  const auto layers = *rc::gen::inRange<std::uint32_t>(1, 40);
  PageBudget budget{32, *rc::gen::inRange<std::uint32_t>(2, 20), 1, 60};
  std::vector<double> tokens(layers, 32.0 * budget.mean_pages);
  for (int i = 0; i < 60; ++i) {
    const auto from = *rc::gen::inRange<std::uint32_t>(0, layers), to = *rc::gen::inRange<std::uint32_t>(0, layers);
    const double moved = std::min({7.5, tokens[from] - 32, 60 * 32 - tokens[to]});
    tokens[from] -= moved;
    tokens[to] += moved;
  }
  const auto pages = whole_pages(tokens, budget);
  RC_ASSERT(std::accumulate(pages.begin(), pages.end(), 0U) == budget.mean_pages * layers);
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    RC_ASSERT(pages[layer] >= budget.least && pages[layer] <= budget.most);
    RC_ASSERT(std::abs(32.0 * pages[layer] - tokens[layer]) <= 32.001);
  }
}

}  // namespace
}  // namespace kvern
