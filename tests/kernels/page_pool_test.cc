#include "kernels/page_pool.h"

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

TEST(PagePool, LendsWhatThinLayersLeaveFreeToThickOnes) {
  const auto pages = pool_pages(Pages{4, 1, 2, 1}).value();
  EXPECT_EQ(pages[0], (std::vector<PoolPage>{{0, 0}, {0, 1}, {1, 1}, {3, 1}}));
  EXPECT_EQ(pages[1], (std::vector<PoolPage>{{1, 0}}));
  EXPECT_EQ(pages[2], (std::vector<PoolPage>{{2, 0}, {2, 1}}));
}

TEST(PagePool, RefusesWhatDoesNotFillItsBlocks) {
  for (const Pages& pages : {Pages{}, Pages{1, 2}, Pages{2, 0}}) {
    EXPECT_EQ(pool_pages(pages).error().code(), Code::kInvalid);
  }
}

RC_GTEST_PROP(PagePool, GivesEveryPageToExactlyOneLayer, ()) {
  const auto layers = *rc::gen::inRange<std::uint32_t>(1, 40);
  const auto blocks = *rc::gen::inRange<std::uint32_t>(1, 30);
  Pages counts(layers, blocks);
  for (int i = 0; i < 100; ++i) {
    const auto from = *rc::gen::inRange<std::uint32_t>(0, layers), to = *rc::gen::inRange<std::uint32_t>(0, layers);
    if (counts[from] > 1) --counts[from], ++counts[to];
  }
  const auto pages = pool_pages(counts).value();
  std::set<std::pair<std::uint32_t, std::uint32_t>> seen;
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    RC_ASSERT(pages[layer].size() == counts[layer]);
    for (std::uint32_t i = 0; i < counts[layer]; ++i) {
      const PoolPage page = pages[layer][i];
      RC_ASSERT(page.layer < layers && page.block < blocks);
      RC_ASSERT(i >= blocks || (page == PoolPage{layer, i}));
      RC_ASSERT(seen.emplace(page.layer, page.block).second);
    }
  }
  RC_ASSERT(seen.size() == std::size_t{layers} * blocks);
}

RC_GTEST_PROP(PagePool, WholePagesSumToTheMeanAndStayWithinAPageOfTheirShare, ()) {
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
