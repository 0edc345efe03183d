// Chunks that somebody wants kept.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/store/store_fixture.h"

namespace kvern {
namespace {

using testing::ChunkSpec;
using testing::StoreFixture;

constexpr std::uint32_t kBlocks = 4;

ChunkSpec chunk_of(std::uint64_t prompt, std::uint64_t number) {
  return {.prompt = prompt, .first_block = number * kBlocks, .blocks = kBlocks};
}

/// A store of so many chunks of a page each.
struct Retaining : StoreFixture {
  explicit Retaining(std::uint64_t chunks, double share = 0.5) : StoreFixture(config_of(chunks, share)) {}

  static ChunkStoreConfig config_of(std::uint64_t chunks, double share) {
    ChunkStoreConfig config = pages(chunks);
    config.retain_share = share;
    return config;
  }

  bool put_in_order(std::uint64_t prompt, std::uint64_t number) {
    if (!put(chunk_of(prompt, number))) return false;
    if (number > 0) link(prompt, number);
    return true;
  }
  /// The chunk follows the one before it.
  void link(std::uint64_t prompt, std::uint64_t number) {
    const std::uint64_t block = number * kBlocks;
    store.link(chunk_of(prompt, number).info().key.namespace_id, 0, testing::block_hash(prompt, block - 1),
               testing::block_hash(prompt, block));
  }
  RetainedChunks retain(std::uint64_t prompt, std::uint64_t number, std::chrono::seconds time) {
    const auto info = chunk_of(prompt, number).info();
    return store.retain(info.key.namespace_id, 0, info.block_hashes,
                        clock.now_ns() + std::chrono::nanoseconds(time).count());
  }
  bool stores(std::uint64_t prompt, std::uint64_t number) {
    const auto info = chunk_of(prompt, number).info();
    return store.describe(info.key.namespace_id, 0, info.key.last_block).has_value();
  }
};

TEST(Retention, WhatIsRetainedLeavesAfterAllElseAndNotForEver) {
  Retaining f(4);
  ASSERT_TRUE(f.put_in_order(1, 0));
  ASSERT_EQ(f.retain(1, 0, std::chrono::seconds(10)).chunks, 1U);
  for (std::uint64_t prompt = 2; prompt < 20; ++prompt) ASSERT_TRUE(f.put_in_order(prompt, 0));
  EXPECT_TRUE(f.stores(1, 0)) << "15 chunks came and went after it";
  EXPECT_EQ(f.store.stats().retained_chunks, 1U);
  EXPECT_EQ(f.store.stats().retained_bytes, 4096U);
  f.clock.advance(std::chrono::seconds(10));
  for (std::uint64_t prompt = 20; prompt < 28; ++prompt) ASSERT_TRUE(f.put_in_order(prompt, 0));
  EXPECT_FALSE(f.stores(1, 0)) << "its time is over";
  EXPECT_EQ(f.store.stats().retained_chunks, 0U);
}

TEST(Retention, KeepsWhatAChunkIsReachedThrough) {
  Retaining f(4, 1);
  for (std::uint64_t number = 0; number < 3; ++number) ASSERT_TRUE(f.put_in_order(1, number));
  ASSERT_EQ(f.retain(1, 2, std::chrono::seconds(10)).chunks, 1U);
  EXPECT_EQ(f.store.stats().retained_chunks, 3U) << "and both before it";
  for (std::uint64_t prompt = 2; prompt < 9; ++prompt) ASSERT_TRUE(f.put_in_order(prompt, 0));
  for (std::uint64_t number = 0; number < 3; ++number) EXPECT_TRUE(f.stores(1, number)) << number;
}

TEST(Retention, ATenantMayHaveNoMoreRetainedThanItsShare) {
  Retaining f(8, 0.25);
  for (std::uint64_t number = 0; number < 4; ++number) ASSERT_TRUE(f.put_in_order(1, number));
  EXPECT_EQ(f.retain(1, 1, std::chrono::seconds(10)).chunks, 1U) << "two chunks are a quarter of eight";
  EXPECT_EQ(f.retain(1, 2, std::chrono::seconds(10)).refused, 1U);
  EXPECT_EQ(f.store.stats().retained_chunks, 2U);
  EXPECT_EQ(f.retain(1, 1, std::chrono::seconds(20)).chunks, 1U) << "longer is not more";
  f.clock.advance(std::chrono::seconds(20));
  ASSERT_TRUE(f.put_in_order(2, 0));
  EXPECT_EQ(f.retain(2, 0, std::chrono::seconds(10)).chunks, 1U) << "what expired counts no more";
}

TEST(Retention, AShareIsThatOfTheTenantsQuotaWhereThatIsSmaller) {
  Retaining f(8, 0.5);
  f.store.set_terms(
      testing::namespace_of(1),
      {.ladder = std::nullopt, .rotation = {}, .max_relative_error = 1, .tenant = "small", .tenant_bytes = 4 * 4096});
  for (std::uint64_t number = 0; number < 3; ++number) ASSERT_TRUE(f.put_in_order(1, number));
  EXPECT_EQ(f.retain(1, 2, std::chrono::seconds(10)).refused, 1U) << "three chunks are more than half of four";
  EXPECT_EQ(f.retain(1, 1, std::chrono::seconds(10)).chunks, 1U);
  for (std::uint64_t prompt = 2; prompt < 9; ++prompt) ASSERT_TRUE(f.put_in_order(prompt, 0));
  EXPECT_TRUE(f.stores(1, 0) && f.stores(1, 1)) << "the tenant's own chunks left for its own";
  EXPECT_EQ(f.store.stats().chunks, 4U);
}

TEST(Retention, ZeroRetainsNothing) {
  Retaining f(4, 0);
  ASSERT_TRUE(f.put_in_order(1, 0));
  EXPECT_EQ(f.retain(1, 0, std::chrono::seconds(10)).refused, 1U);
  EXPECT_EQ(f.retain(9, 0, std::chrono::seconds(10)).refused, 0U) << "it is not stored";
}

TEST(Retention, UnderPressureWhatIsRetainedLeavesFromTheEndOfThePromptThatEndsFirst) {
  Retaining f(4, 1);
  for (std::uint64_t number = 0; number < 2; ++number) ASSERT_TRUE(f.put_in_order(1, number));
  for (std::uint64_t number = 0; number < 2; ++number) ASSERT_TRUE(f.put_in_order(2, number));
  ASSERT_EQ(f.retain(1, 1, std::chrono::seconds(20)).chunks, 1U);
  ASSERT_EQ(f.retain(2, 1, std::chrono::seconds(10)).chunks, 1U);
  ASSERT_TRUE(f.put_in_order(3, 0)) << "nothing is pinned by being retained";
  EXPECT_FALSE(f.stores(2, 1));
  EXPECT_TRUE(f.stores(2, 0) && f.stores(1, 0) && f.stores(1, 1));
  const auto pin = f.pin(chunk_of(3, 0));
  ASSERT_TRUE(pin);
  ASSERT_TRUE(f.put_in_order(4, 0)) << "what is in use hides nothing";
  EXPECT_FALSE(f.stores(2, 0));
  EXPECT_TRUE(f.stores(3, 0) && f.stores(1, 0) && f.stores(1, 1));
  f.store.unpin(pin->pin);
}

TEST(Retention, ALongerChunkTakesOverTheWish) {
  Retaining f(4);
  ASSERT_TRUE(f.put({.prompt = 1, .blocks = 2}));
  const auto info = ChunkSpec{.prompt = 1, .blocks = 2}.info();
  ASSERT_EQ(f.store.retain(info.key.namespace_id, 0, info.block_hashes, f.clock.now_ns() + 1'000'000'000).chunks, 1U);
  ASSERT_TRUE(f.put({.prompt = 1, .blocks = 4}));
  EXPECT_EQ(f.store.stats().retained_chunks, 1U);
  for (std::uint64_t prompt = 2; prompt < 9; ++prompt) ASSERT_TRUE(f.put_in_order(prompt, 0));
  EXPECT_TRUE(f.stores(1, 0));
}

TEST(Retention, WhatIsFlushedIsRetainedNoMore) {
  Retaining f(4);
  ASSERT_TRUE(f.put_in_order(1, 0));
  ASSERT_EQ(f.retain(1, 0, std::chrono::seconds(10)).chunks, 1U);
  EXPECT_EQ(f.store.flush(testing::namespace_of(1)).chunks, 1U);
  EXPECT_EQ(f.store.stats().retained_bytes, 0U);
}

/// What a store does with wishes, said naively.
class Naive {
 public:
  using Chunk = std::pair<std::uint64_t, std::uint64_t>;  // prompt, number

  explicit Naive(std::size_t most) : most_(most) {}

  std::set<Chunk> stored;
  std::map<Chunk, std::int64_t> until;
  std::set<Chunk> linked;  // to the one before it

  void expire(std::int64_t now_ns) {
    std::erase_if(until, [&](const auto& wish) { return wish.second <= now_ns; });
  }
  bool retain(const Chunk& chunk, std::int64_t until_ns) {
    std::vector<Chunk> chain{chunk};
    while (linked.contains(chain.back())) chain.emplace_back(chunk.first, chain.back().second - 1);
    const auto added = static_cast<std::size_t>(
        std::ranges::count_if(chain, [&](const Chunk& each) { return !until.contains(each); }));
    if (until.size() + added > most_) return false;
    for (const Chunk& each : chain) until[each] = std::max(until[each], until_ns);
    return true;
  }
  void link(const Chunk& chunk) {
    const Chunk before{chunk.first, chunk.second - 1};
    if (!stored.contains(chunk) || !stored.contains(before) || linked.contains(chunk)) return;
    if (until.contains(chunk) && !retain(before, until[chunk])) return;
    linked.insert(chunk);
  }
  void left(const Chunk& chunk) {
    stored.erase(chunk);
    until.erase(chunk);
    linked.erase(chunk);
    linked.erase({chunk.first, chunk.second + 1});
  }

 private:
  const std::size_t most_;
};

using Operations = std::vector<std::tuple<std::uint8_t, std::uint8_t, std::uint8_t, std::uint8_t>>;

RC_GTEST_PROP(Retention, AgreesWithANaiveModel, (const Operations& operations)) {
  constexpr std::uint64_t kChunks = 12;
  constexpr std::uint64_t kPrompts = 5;
  constexpr std::uint64_t kLength = 5;
  Retaining f(kChunks, 0.5);
  Naive model(kChunks / 2);
  for (const auto& [action, first, second, third] : operations) {
    const Naive::Chunk chunk{first % kPrompts, second % kLength};
    const auto [prompt, number] = chunk;
    switch (action % 8) {
      case 0:
      case 1:
      case 2:
      case 3: {
        if (model.stored.contains(chunk)) break;
        const bool is_full = model.stored.size() == kChunks;
        if (is_full) model.expire(f.clock.now_ns());
        RC_ASSERT(static_cast<bool>(f.put(chunk_of(prompt, number))));
        std::vector<Naive::Chunk> gone;
        for (const auto& each : model.stored) {
          if (!f.stores(each.first, each.second)) gone.push_back(each);
        }
        RC_ASSERT(gone.size() == (is_full ? 1U : 0U));
        for (const auto& each : gone) {
          RC_ASSERT(!model.linked.contains({each.first, each.second + 1}));
          const auto wish = model.until.find(each);
          RC_ASSERT(wish == model.until.end());  // half of the store at most is retained
          model.left(each);
        }
        model.stored.insert(chunk);
        break;
      }
      case 4:
        if (number == 0) break;
        f.link(prompt, number);
        model.link(chunk);
        break;
      case 5:
      case 6: {
        const auto time = std::chrono::seconds(third % 16);
        const RetainedChunks retained = f.retain(prompt, number, time);
        model.expire(f.clock.now_ns());
        const std::uint64_t asked = model.stored.contains(chunk) && time.count() > 0 ? 1 : 0;
        const bool granted =
            asked > 0 && model.retain(chunk, f.clock.now_ns() + std::chrono::nanoseconds(time).count());
        RC_ASSERT(retained.chunks == (granted ? 1U : 0U));
        RC_ASSERT(retained.refused == asked - (granted ? 1U : 0U));
        break;
      }
      default:
        f.clock.advance(std::chrono::seconds(third % 8));
        f.store.sweep();
        model.expire(f.clock.now_ns());
    }
    RC_ASSERT(f.store.stats().retained_chunks == model.until.size());
    RC_ASSERT(f.store.stats().retained_bytes == model.until.size() * 4096);
  }
}

}  // namespace
}  // namespace kvern
