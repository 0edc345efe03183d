#include "store/slab.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace kvern {
namespace {

constexpr std::uint64_t kPage = Slab::kAlignment;

std::uint64_t rounded(std::uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Where free bytes lie in front of the reach, computed from what is used.
std::uint64_t largest_gap(const std::map<std::uint64_t, Extent>& used, std::uint64_t reach) {
  std::uint64_t largest = 0;
  std::uint64_t end = 0;
  for (const auto& [offset, extent] : used) {
    largest = std::max(largest, std::min(offset, reach) - end);
    end = std::min(offset + rounded(extent.bytes), reach);
  }
  return std::max(largest, reach - end);
}

std::uint64_t used_behind(const std::map<std::uint64_t, Extent>& used, std::uint64_t reach) {
  std::uint64_t bytes = 0;
  for (const auto& [offset, extent] : used) {
    const std::uint64_t end = offset + rounded(extent.bytes);
    bytes += std::max(end, reach) - std::max(offset, reach);
  }
  return bytes;
}

TEST(Slab, RefusesCapacitiesThatItCannotKeepBooksOf) {
  EXPECT_THROW(Slab{0}, std::invalid_argument);
  EXPECT_THROW(Slab{kPage - 1}, std::invalid_argument);
  EXPECT_THROW(Slab{std::uint64_t{1} << 60}, std::invalid_argument);
}

TEST(Slab, GivesAllOfItselfAndNoMore) {
  Slab slab(10 * kPage + 100);
  EXPECT_EQ(slab.capacity_bytes(), 10 * kPage);
  const auto all = slab.allocate(10 * kPage);
  ASSERT_TRUE(all.has_value());
  EXPECT_EQ(slab.used_bytes(), 10 * kPage);
  EXPECT_EQ(slab.largest_free_bytes(), 0U);
  EXPECT_FALSE(slab.allocate(1).has_value());
  slab.release(*all);
  EXPECT_EQ(slab.largest_free_bytes(), 10 * kPage);
  EXPECT_FALSE(slab.allocate(0).has_value());
  EXPECT_FALSE(slab.allocate(11 * kPage).has_value());
  EXPECT_FALSE(slab.allocate(~std::uint64_t{0}).has_value());
}

TEST(Slab, StartsWithWhatIsInUseAlready) {
  const std::vector<Extent> used = {{0, 100}, {2 * kPage, kPage}, {3 * kPage, 2 * kPage + 1}};
  Slab slab(8 * kPage, used);
  EXPECT_EQ(slab.used_bytes(), 5 * kPage);
  EXPECT_EQ(slab.largest_free_bytes(), 2 * kPage);
  ASSERT_TRUE(slab.allocate(2 * kPage).has_value());
  ASSERT_TRUE(slab.allocate(kPage).has_value());
  EXPECT_FALSE(slab.allocate(1).has_value());
  for (const Extent& extent : used) slab.release(extent);
  EXPECT_EQ(slab.used_bytes(), 3 * kPage);
  const auto refused = [](std::vector<Extent> extents) { Slab again(8 * kPage, extents); };
  EXPECT_THROW(refused({{0, 2 * kPage}, {kPage, 1}}), std::invalid_argument) << "overlap";
  EXPECT_THROW(refused({{kPage, 1}, {0, 1}}), std::invalid_argument) << "order";
  EXPECT_THROW(refused({{7 * kPage, kPage + 1}}), std::invalid_argument) << "outside";
  EXPECT_THROW(refused({{100, 1}}), std::invalid_argument) << "alignment";
}

TEST(Slab, TheHalvesOfASplitAreFreedOneByOne) {
  Slab slab(8 * kPage);
  const auto whole = slab.allocate(5 * kPage);
  ASSERT_TRUE(whole.has_value());
  const auto [head, tail] = slab.split(*whole, 2 * kPage);
  EXPECT_EQ(head, (Extent{whole->offset, 2 * kPage}));
  EXPECT_EQ(tail, (Extent{whole->offset + 2 * kPage, 3 * kPage}));
  EXPECT_EQ(slab.used_bytes(), 5 * kPage);
  slab.release(head);
  EXPECT_EQ(slab.used_bytes(), 3 * kPage);
  slab.release(tail);
  EXPECT_EQ(slab.largest_free_bytes(), 8 * kPage);
}

TEST(Slab, ShrinkingGivesTheEndBack) {
  Slab slab(16 * kPage);
  const auto first = slab.allocate(8 * kPage);
  const auto second = slab.allocate(8 * kPage);
  ASSERT_TRUE(first && second);
  const auto smaller = slab.shrink(*first, 3 * kPage - 5);
  EXPECT_EQ(smaller.offset, first->offset);
  EXPECT_EQ(smaller.bytes, 3 * kPage - 5);
  EXPECT_EQ(slab.used_bytes(), 11 * kPage);
  const auto third = slab.allocate(5 * kPage);
  ASSERT_TRUE(third.has_value());
  slab.release(smaller);
  slab.release(*second);
  slab.release(*third);
  EXPECT_EQ(slab.used_bytes(), 0U);
  EXPECT_EQ(slab.largest_free_bytes(), 16 * kPage);
}

TEST(Slab, WhatIsCutOffIsNeverAllocatedAgain) {
  Slab slab(10 * kPage);
  const auto kept = slab.allocate(2 * kPage);
  const auto reaching = slab.allocate(4 * kPage);
  ASSERT_TRUE(kept && reaching);
  slab.cut_off(5 * kPage + 100);
  EXPECT_EQ(slab.capacity_bytes(), 6 * kPage) << "one page behind it is still in use";
  EXPECT_FALSE(slab.allocate(1).has_value());
  slab.release(*reaching);
  EXPECT_EQ(slab.capacity_bytes(), 5 * kPage);
  EXPECT_EQ(slab.largest_free_bytes(), 3 * kPage);
  EXPECT_FALSE(slab.allocate(4 * kPage).has_value());
  slab.release(*kept);
  EXPECT_EQ(slab.used_bytes(), 0U);
  EXPECT_TRUE(slab.allocate(5 * kPage).has_value());
  EXPECT_FALSE(slab.allocate(1).has_value());
}

// What eviction relies on: a slab full of equal chunks takes another one where one went.
TEST(Slab, AFreedPlaceTakesAnotherOfTheSameSize) {
  for (std::uint64_t pages : {1U, 31U, 33U, 65U, 127U, 1023U}) {
    Slab slab(pages * kPage * 20);
    std::vector<Extent> extents;
    while (auto extent = slab.allocate(pages * kPage)) extents.push_back(*extent);
    ASSERT_EQ(extents.size(), 20U);
    std::mt19937 random(1);
    for (int i = 0; i < 100; ++i) {
      auto& extent = extents[random() % extents.size()];
      slab.release(extent);
      const auto again = slab.allocate(pages * kPage);
      ASSERT_TRUE(again.has_value()) << pages;
      EXPECT_EQ(*again, extent);
    }
  }
}

// (action, size, which)
using Operation = std::tuple<std::uint8_t, std::uint32_t, std::uint32_t>;

RC_GTEST_PROP(Slab, AgreesWithANaiveModel, (const std::vector<Operation>& operations)) {
  const auto capacity_pages = *rc::gen::inRange<std::uint64_t>(1, 3000);
  Slab slab(capacity_pages * kPage);
  const auto cut_at = *rc::gen::inRange<std::uint64_t>(0, 2 * capacity_pages) * kPage;
  std::uint64_t reach = capacity_pages * kPage;
  std::map<std::uint64_t, Extent> used;
  std::uint64_t used_bytes = 0;
  const auto pick = [&](std::uint32_t which) {
    return std::next(used.begin(), static_cast<std::ptrdiff_t>(which % used.size()));
  };
  for (const auto& [action, size, which] : operations) {
    if (action % 16 == 15) {
      slab.cut_off(cut_at);
      reach = std::min(reach, cut_at);
    } else if (action % 4 < 2 || used.empty()) {
      const std::uint64_t bytes = 1 + size % (rounded(capacity_pages * kPage / (1 + which % 50)));
      const std::uint64_t gap = largest_gap(used, reach);
      const auto extent = slab.allocate(bytes);
      if (!extent) {
        RC_ASSERT(gap < rounded(bytes) + rounded(bytes) / 32 + kPage);
        continue;
      }
      RC_ASSERT(extent->bytes == bytes);
      RC_ASSERT(extent->offset % kPage == 0);
      const auto after = used.lower_bound(extent->offset);
      const std::uint64_t next_begin = std::min(reach, after == used.end() ? reach : after->first);
      const std::uint64_t previous_end =
          after == used.begin() ? 0 : std::prev(after)->first + rounded(std::prev(after)->second.bytes);
      RC_ASSERT(previous_end <= extent->offset);
      RC_ASSERT(extent->offset + rounded(bytes) <= next_begin);
      used.emplace(extent->offset, *extent);
      used_bytes += rounded(bytes);
    } else if (action % 4 == 2) {
      const auto it = pick(which);
      used_bytes -= rounded(it->second.bytes);
      slab.release(it->second);
      used.erase(it);
    } else {
      const auto it = pick(which);
      const std::uint64_t bytes = 1 + size % it->second.bytes;
      used_bytes -= rounded(it->second.bytes) - rounded(bytes);
      it->second = slab.shrink(it->second, bytes);
      RC_ASSERT((it->second == Extent{it->first, bytes}));
    }
    RC_ASSERT(slab.used_bytes() == used_bytes);
    RC_ASSERT(slab.largest_free_bytes() == largest_gap(used, reach));
    RC_ASSERT(slab.capacity_bytes() == reach + used_behind(used, reach));
  }
  for (const auto& [offset, extent] : used) slab.release(extent);
  RC_ASSERT(slab.used_bytes() == 0U);
  RC_ASSERT(slab.capacity_bytes() == reach);
  RC_ASSERT(slab.largest_free_bytes() == reach);
  RC_ASSERT(slab.allocate(reach).has_value() == (reach > 0));
}

}  // namespace
}  // namespace kvern
