#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <list>
#include <utility>
#include <vector>

#include "store/eviction_policy.h"

namespace kvern {
namespace {

using Numbers = std::vector<std::uint32_t>;

TEST(LruPolicy, NamesTheLeastRecentlyUsedFirst) {
  const auto policy = make_lru_policy();
  EXPECT_EQ(policy->name(), "lru");
  for (std::uint32_t chunk : {5U, 3U, 9U}) policy->inserted(chunk, 1);
  EXPECT_EQ(policy->victims(2), (Numbers{5, 3}));
  policy->touched(5);
  EXPECT_EQ(policy->victims(10), (Numbers{3, 9, 5}));
  policy->skipped(3);
  EXPECT_EQ(policy->victims(1), (Numbers{9}));
  policy->erased(9);
  EXPECT_EQ(policy->victims(10), (Numbers{5, 3}));
}

RC_GTEST_PROP(LruPolicy, AgreesWithAList, (const std::vector<std::pair<std::uint8_t, std::uint8_t>>& operations)) {
  const auto policy = make_lru_policy();
  std::list<std::uint32_t> model;
  for (const auto& [action, number] : operations) {
    const std::uint32_t chunk = number % 16U;
    const bool known = std::ranges::find(model, chunk) != model.end();
    switch (action % 4) {
      case 0:
        policy->inserted(chunk, 1);
        if (!known) model.push_back(chunk);
        break;
      case 1:
        policy->erased(chunk);
        model.remove(chunk);
        break;
      default:
        action % 4 == 2 ? policy->touched(chunk) : policy->skipped(chunk);
        model.remove(chunk);
        if (known) model.push_back(chunk);
    }
    RC_ASSERT(policy->victims(100) == Numbers(model.begin(), model.end()));
  }
}

}  // namespace
}  // namespace kvern
