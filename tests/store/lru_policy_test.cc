#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "store/eviction_policy.h"

namespace kvern {
namespace {

using Numbers = std::vector<std::uint32_t>;

TEST(LruPolicy, NamesTheLeastRecentlyUsedFirst) {
  const auto policy = make_lru_policy();
  EXPECT_EQ(policy->name(), "lru");
  for (std::uint32_t chunk : {5U, 3U, 9U}) policy->inserted(chunk, {.bytes = 1, .fingerprint = chunk});
  EXPECT_EQ(policy->victims(2), (Numbers{5, 3}));
  policy->touched(5);
  EXPECT_EQ(policy->victims(10), (Numbers{3, 9, 5}));
  policy->skipped(3);
  EXPECT_EQ(policy->victims(1), (Numbers{9}));
  policy->erased(9);
  EXPECT_EQ(policy->victims(10), (Numbers{5, 3}));
}

}  // namespace
}  // namespace kvern
