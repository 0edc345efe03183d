#include "store/tiered_store.h"

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "tests/store/memory_tier.h"
#include "tests/store/stored_chunks.h"

namespace kvern {
namespace {

using testing::block_hash;
using testing::ChunkSpec;
using testing::holds_exactly;
using testing::MemoryTier;
using testing::namespace_of;
using testing::object_of;
using testing::store_chunk;
using testing::StoreFixture;

constexpr std::size_t kChunkBlocks = 4;

/// Two tiers below a DRAM tier; nothing runs by itself.
struct TieredFixture {
  explicit TieredFixture(std::uint64_t slab_pages = 1024, WritePolicy write = WritePolicy::kOff)
      : write_back_bytes(slab_pages / 4 * 4096), dram(StoreFixture::pages(slab_pages)) {
    std::vector<LowerTier> tiers;
    for (MemoryTier** place : {&fast, &slow}) {
      auto tier = std::make_unique<MemoryTier>(dram.clock);
      *place = tier.get();
      tiers.push_back({std::move(tier), write});
    }
    store = std::make_unique<TieredStore>(
        dram.store, std::move(tiers), executor,
        TieredStoreConfig{.prefetch_window_bytes = window, .write_back_bytes = write_back_bytes});
  }

  static void put(MemoryTier& tier, const ChunkSpec& spec) {
    const std::vector<ChunkSpec> shards = {spec};
    tier.objects[spec.info().key.to_string()] = {spec.info().key, object_of(shards)};
  }
  static ChunkSpec cell(std::uint64_t number, std::uint32_t blocks = kChunkBlocks) {
    return {.prompt = 1, .first_block = number * kChunkBlocks, .blocks = blocks};
  }
  /// Stores cells from this one on until victims are due to be written back; the number of the next cell.
  std::uint64_t fill_until_write_back(std::uint64_t number) {
    while (dram.store.stats().used_bytes + 2 * write_back_bytes < dram.store.stats().capacity_bytes) {
      const auto complete = store_chunk(dram.store, cell(number++));
      EXPECT_TRUE(complete && *complete);
      if (!complete) break;
    }
    return number;
  }
  std::shared_ptr<Prefetch> prefetch(std::size_t blocks, std::size_t first_block = 0) {
    std::vector<BlockHash> hashes;
    for (std::size_t block = 0; block < blocks; ++block) hashes.push_back(block_hash(1, block));
    return store->prefetch(namespace_of(1), 0, hashes, first_block, kChunkBlocks);
  }
  std::size_t matched(std::size_t blocks) {
    std::vector<BlockHash> hashes;
    for (std::size_t block = 0; block < blocks; ++block) hashes.push_back(block_hash(1, block));
    return dram.store.match(namespace_of(1), 0, hashes);
  }

  const std::uint64_t window = 64 << 20;
  const std::uint64_t write_back_bytes;
  StoreFixture dram;
  ManualExecutor executor;
  MemoryTier* fast = nullptr;
  MemoryTier* slow = nullptr;
  std::unique_ptr<TieredStore> store;
};

TEST(TieredStore, BringsUpAPrefixFromSeveralTiers) {
  TieredFixture f;
  f.put(*f.fast, f.cell(0));
  f.put(*f.slow, f.cell(1));
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(2)).value());
  f.put(*f.fast, f.cell(3));
  const auto prefetch = f.prefetch(16);
  EXPECT_TRUE(prefetch->pending()) << "not verified yet";
  EXPECT_EQ(f.matched(16), 0U);
  f.executor.run_all();
  EXPECT_FALSE(prefetch->pending());
  EXPECT_EQ(f.matched(16), 16U);
  for (std::uint64_t number = 0; number < 4; ++number) EXPECT_TRUE(holds_exactly(f.dram.store, f.cell(number)));
  EXPECT_EQ(f.slow->finds, 1U);
  const auto stats = f.store->stats();
  EXPECT_EQ(stats.tiers[0].promoted_chunks, 2U);
  EXPECT_EQ(stats.tiers[1].promoted_chunks, 1U);
}

TEST(TieredStore, AsksNobodyWhenDramHasAll) {
  TieredFixture f;
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  EXPECT_FALSE(f.prefetch(4)->pending());
  EXPECT_FALSE(f.prefetch(3)->pending()) << "a longer chunk serves it";
  EXPECT_FALSE(f.prefetch(8, 8)->pending()) << "the engine has the rest";
  EXPECT_EQ(f.fast->finds, 0U);
}

TEST(TieredStore, WhatIsBroughtUpDuringAFlushDoesNotOutliveIt) {
  TieredFixture f;
  f.put(*f.fast, f.cell(0));
  f.slow->immediate = false;
  std::optional<Status> flushed;
  f.store->flush({.namespaces = namespace_of(1), .prefix = block_hash(1, 1)},
                 [&](const FlushedChunks&, const Status& lower) { flushed = lower; });
  EXPECT_FALSE(flushed.has_value());
  f.put(*f.fast, f.cell(0));  // as if the erasure had not come to it yet
  const auto prefetch = f.prefetch(kChunkBlocks);
  EXPECT_EQ(f.fast->reads, 1U) << "the flush's own";
  EXPECT_FALSE(prefetch->pending());
  while (f.slow->run()) continue;
  ASSERT_TRUE(flushed.has_value());
  f.executor.run_all();
  while (f.slow->run()) continue;
  EXPECT_FALSE(prefetch->pending());
  EXPECT_EQ(f.matched(kChunkBlocks), 0U);
}

TEST(TieredStore, ReadsNothingBehindAGap) {
  TieredFixture f;
  f.put(*f.fast, f.cell(0));
  f.put(*f.fast, f.cell(2));
  const auto prefetch = f.prefetch(12);
  f.executor.run_all();
  EXPECT_FALSE(prefetch->pending());
  EXPECT_EQ(f.fast->reads, 1U) << "the flush's own";
  EXPECT_EQ(f.matched(12), 4U);
}

TEST(TieredStore, AShorterChunkEndsThePrefixAndALongerOneIsPreferred) {
  TieredFixture f;
  f.put(*f.fast, f.cell(0, 2));
  f.put(*f.slow, f.cell(0, 3));
  f.put(*f.slow, f.cell(1));
  const auto prefetch = f.prefetch(8);
  f.executor.run_all();
  EXPECT_EQ(f.matched(8), 3U);
  EXPECT_EQ(f.slow->reads, 1U);
  EXPECT_EQ(f.fast->reads, 0U);
}

TEST(TieredStore, WhatWasBroughtUpStaysWhileTheLookUpHoldsIt) {
  TieredFixture f;
  f.put(*f.fast, f.cell(0));
  auto prefetch = f.prefetch(4);
  f.executor.run_all();
  EXPECT_EQ(f.dram.store.stats().pinned_chunks, 1U);
  EXPECT_EQ(f.dram.store.flush(NamespaceSet::all()).held, 1U);
  EXPECT_EQ(f.matched(4), 0U);
  EXPECT_GT(f.dram.store.stats().used_bytes, 0U);
  prefetch.reset();
  f.dram.store.sweep();
  EXPECT_EQ(f.dram.store.stats().used_bytes, 0U);
}

TEST(TieredStore, DamagedOrForeignObjectsAreErasedAndNeverSeen) {
  TieredFixture f;
  f.put(*f.fast, f.cell(0));
  auto& damaged = f.fast->objects.begin()->second.bytes;
  damaged[damaged.size() - 4096] ^= std::byte{1};
  f.prefetch(4);
  f.executor.run_all();
  EXPECT_EQ(f.matched(4), 0U);
  EXPECT_TRUE(f.fast->objects.empty());
  EXPECT_EQ(f.store->stats().tiers[0].corrupt_chunks, 1U);

  f.put(*f.fast, f.cell(5));
  f.fast->objects[f.cell(0).info().key.to_string()] = f.fast->objects.begin()->second;
  f.fast->objects.erase(f.cell(5).info().key.to_string());
  const auto prefetch = f.prefetch(4);
  f.executor.run_all();
  EXPECT_FALSE(prefetch->pending());
  EXPECT_EQ(f.matched(24), 0U);
  EXPECT_TRUE(f.fast->objects.empty());
  EXPECT_EQ(f.dram.store.stats().used_bytes, 0U);
}

TEST(TieredStore, TwoLookUpsShareOneRead) {
  TieredFixture f;
  f.put(*f.fast, f.cell(0));
  const auto one = f.prefetch(4);
  const auto two = f.prefetch(4);
  EXPECT_TRUE(one->pending());
  EXPECT_TRUE(two->pending());
  f.executor.run_all();
  EXPECT_FALSE(one->pending());
  EXPECT_FALSE(two->pending());
  EXPECT_EQ(f.fast->reads, 1U) << "the flush's own";
}

TEST(TieredStore, ACancelledLookUpDoesNotTakeAnothersChunkAway) {
  TieredFixture f;
  f.put(*f.fast, f.cell(0));
  f.fast->immediate = false;
  auto first = f.prefetch(4);
  ASSERT_TRUE(f.fast->run()) << "found";
  const auto second = f.prefetch(4);
  while (f.fast->waiting.size() > 1) {
    std::rotate(f.fast->waiting.begin(), f.fast->waiting.begin() + 1, f.fast->waiting.end());
    ASSERT_TRUE(f.fast->run()) << "the second one's find";
  }
  first.reset();
  while (f.fast->run()) {
  }
  f.executor.run_all();
  EXPECT_FALSE(second->pending());
  EXPECT_EQ(f.matched(4), 4U);
  EXPECT_EQ(f.fast->reads, 2U);
}

TEST(TieredStore, CancellingLeavesNothingBehind) {
  TieredFixture f;
  for (std::uint64_t number = 0; number < 4; ++number) f.put(*f.fast, f.cell(number));
  f.fast->immediate = false;
  auto prefetch = f.prefetch(16);
  ASSERT_TRUE(f.fast->run());
  EXPECT_EQ(f.store->stats().prefetches, 1U);
  prefetch.reset();
  while (f.fast->run()) {
  }
  f.executor.run_all();
  EXPECT_EQ(f.store->stats().prefetches, 0U);
  EXPECT_EQ(f.dram.store.stats().used_bytes, 0U);
}

TEST(TieredStore, ABrokenTierCostsItsHitsOnly) {
  TieredFixture f;
  f.put(*f.slow, f.cell(0));
  f.fast->broken = Status(Code::kUnavailable, "no route");
  const auto prefetch = f.prefetch(4);
  f.executor.run_all();
  EXPECT_FALSE(prefetch->pending());
  EXPECT_EQ(f.matched(4), 4U);
}

TEST(TieredStore, StopsWhereDramHasNoRoom) {
  TieredFixture f(20);
  for (std::uint64_t number = 0; number < 4; ++number) f.put(*f.fast, f.cell(number));
  const auto prefetch = f.prefetch(16);
  f.executor.run_all();
  EXPECT_FALSE(prefetch->pending());
  const std::size_t found = f.matched(16);
  EXPECT_GT(found, 0U);
  EXPECT_LT(found, 16U) << "what was brought up is held, so that it does not push itself out";
}

TEST(TieredStore, WritesThroughToEveryTier) {
  TieredFixture f(1024, WritePolicy::kThrough);
  const ChunkSpec whole = f.cell(0);
  ASSERT_FALSE(store_chunk(f.dram.store, whole.shard(0, 4)).value());
  ASSERT_TRUE(store_chunk(f.dram.store, whole.shard(4, 4)).value());
  f.store->stored(whole.info().key);
  EXPECT_EQ(f.fast->objects.size(), 1U);
  EXPECT_EQ(f.slow->objects.size(), 1U);
  EXPECT_TRUE(f.store->wait_saved(0));
  EXPECT_EQ(f.dram.store.stats().pinned_chunks, 0U);
  f.dram.store.flush(NamespaceSet::all());
  EXPECT_EQ(f.matched(4), 0U);
  const auto prefetch = f.prefetch(4);
  f.executor.run_all();
  EXPECT_TRUE(holds_exactly(f.dram.store, whole));
}

TEST(TieredStore, AChunkIsHeldUntilItIsWritten) {
  TieredFixture f(1024, WritePolicy::kThrough);
  f.fast->immediate = false;
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  f.store->stored(f.cell(0).info().key);
  EXPECT_EQ(f.store->wait_saved(0).code(), Code::kExpired);
  EXPECT_EQ(f.dram.store.flush(NamespaceSet::all()).held, 1U);
  EXPECT_GT(f.dram.store.stats().used_bytes, 0U);
  ASSERT_TRUE(f.fast->run());
  EXPECT_TRUE(f.store->wait_saved(0));
  EXPECT_EQ(f.dram.store.stats().pinned_chunks, 0U);
}

TEST(TieredStore, ASlowTierDoesNotFillDram) {
  TieredFixture f(256, WritePolicy::kThrough);
  f.slow->immediate = false;
  for (std::uint64_t number = 0; number < 40; ++number) {
    ASSERT_TRUE(store_chunk(f.dram.store, f.cell(number)).value()) << "there is room for chunk " << number;
    f.store->stored(f.cell(number).info().key);
  }
  EXPECT_LE(f.dram.store.stats().pinned_chunks * 9 * 4096, 256 * 4096 / 4);
  EXPECT_GT(f.slow->waiting.size(), 0U);
  EXPECT_GT(f.store->stats().tiers[1].unsaved_chunks, 0U);
  EXPECT_EQ(f.store->stats().tiers[0].saved_chunks, 40U);
  while (f.slow->run()) {
  }
  EXPECT_EQ(f.dram.store.stats().pinned_chunks, 0U);
}

TEST(TieredStore, WritesBackWhatWillLeaveNextAndEachChunkOnce) {
  TieredFixture f(64, WritePolicy::kBack);
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  f.store->stored(f.cell(0).info().key);
  f.store->save_victims();
  EXPECT_EQ(f.fast->writes, 0U) << "there is room";
  std::uint64_t number = f.fill_until_write_back(1);
  f.store->save_victims();
  const std::size_t saved = f.fast->writes;
  EXPECT_GT(saved, 0U);
  EXPECT_LT(saved, number);
  f.store->save_victims();
  EXPECT_EQ(f.fast->writes, saved);
  while (f.dram.store.stats().evicted_chunks == 0) ASSERT_TRUE(store_chunk(f.dram.store, f.cell(number++)).value());
  EXPECT_TRUE(f.fast->objects.contains(f.cell(0).info().key.to_string())) << "it left, and is not lost";
}

TEST(TieredStore, WhatATierRefusesIsNotWrittenToTheOthersAgain) {
  TieredFixture f(64, WritePolicy::kBack);
  f.slow->broken = Status(Code::kUnavailable, "away");
  f.fill_until_write_back(0);
  f.store->save_victims();
  const std::size_t saved = f.fast->writes;
  EXPECT_GT(saved, 0U);
  f.store->save_victims();
  EXPECT_EQ(f.fast->writes, saved);
  f.slow->broken = Status::ok();
  f.store->save_victims();
  EXPECT_EQ(f.fast->writes, saved);
  EXPECT_EQ(f.slow->objects.size(), saved) << "it is back, and gets what it missed";
}

TEST(TieredStore, AFlushReachesEveryTierAndWhatIsOnItsWay) {
  TieredFixture f(1024, WritePolicy::kThrough);
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  f.store->stored(f.cell(0).info().key);
  f.dram.store.flush(NamespaceSet::all());
  const auto prefetch = f.prefetch(4);
  EXPECT_TRUE(prefetch->pending()) << "read, and not verified";
  Status flushed(Code::kInternal, "not called");
  const auto ended = [&](const FlushedChunks&, const Status& lower) { flushed = lower; };
  f.store->flush({.namespaces = namespace_of(1)}, ended);
  EXPECT_TRUE(flushed);
  f.executor.run_all();
  EXPECT_EQ(f.matched(4), 0U);
  EXPECT_TRUE(f.fast->objects.empty());
  f.slow->broken = Status(Code::kUnavailable, "no route");
  f.store->flush({}, ended);
  EXPECT_EQ(flushed.code(), Code::kUnavailable);
}

TEST(TieredStore, AnErasedChunkLeavesEveryTierAndDoesNotArriveAnyMore) {
  TieredFixture f(1024, WritePolicy::kThrough);
  for (const std::uint64_t number : {0U, 1U}) {
    ASSERT_TRUE(store_chunk(f.dram.store, f.cell(number)).value());
    f.store->stored(f.cell(number).info().key);
  }
  const ChunkKey key = f.cell(0).info().key;
  f.dram.store.flush(NamespaceSet::all());
  const auto prefetch = f.prefetch(8);
  EXPECT_TRUE(prefetch->pending()) << "read, and not verified";
  Status erased(Code::kInternal, "not called");
  f.store->erase({key}, [&](const Status& status) { erased = status; });
  EXPECT_TRUE(erased);
  f.executor.run_all();
  EXPECT_EQ(f.matched(4), 0U);
  EXPECT_EQ(f.fast->objects.size(), 1U) << "the other one";
  EXPECT_EQ(f.slow->objects.size(), 1U);
  // Nothing is held against a chunk of that name that comes later.
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  f.store->stored(key);
  EXPECT_EQ(f.matched(4), 4U);
  EXPECT_EQ(f.fast->objects.size(), 2U);
  f.slow->broken = Status(Code::kUnavailable, "no route");
  f.store->erase({key}, [&](const Status& status) { erased = status; });
  EXPECT_EQ(erased.code(), Code::kUnavailable);
  EXPECT_EQ(f.matched(4), 0U);
}

TEST(TieredStore, AWriteThatOvertakesAnErasureIsErased) {
  TieredFixture f(1024, WritePolicy::kThrough);
  f.fast->immediate = false;
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  f.store->stored(f.cell(0).info().key);
  f.store->erase({f.cell(0).info().key}, [](const Status&) {});
  while (f.fast->run()) {
  }
  EXPECT_TRUE(f.fast->objects.empty());
  EXPECT_TRUE(f.slow->objects.empty());
}

TEST(TieredStore, AWriteThatOvertakesAFlushIsErased) {
  TieredFixture f(1024, WritePolicy::kThrough);
  f.slow->immediate = false;
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  f.store->stored(f.cell(0).info().key);
  f.store->flush({}, [](const FlushedChunks&, const Status& lower) { EXPECT_TRUE(lower); });
  while (f.slow->run()) {
  }
  EXPECT_TRUE(f.slow->objects.empty());
}

TEST(TieredStore, AFlushOfAPrefixTakesWhatContinuesItFromEveryTier) {
  TieredFixture f;
  const ChunkSpec elsewhere{.prompt = 2, .first_block = 0, .blocks = kChunkBlocks};
  const ChunkSpec elsewhere_on{.prompt = 2, .first_block = kChunkBlocks, .blocks = kChunkBlocks};
  // DRAM and the lower tiers hold every other cell of the prompt: only together do they show what follows what.
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  f.put(*f.slow, f.cell(1));
  f.put(*f.fast, f.cell(2));
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(3)).value());
  f.put(*f.slow, f.cell(4));
  f.put(*f.slow, f.cell(0));
  ASSERT_TRUE(store_chunk(f.dram.store, elsewhere).value());
  f.put(*f.fast, elsewhere_on);
  std::optional<std::pair<FlushedChunks, Status>> flushed;
  const auto ended = [&](const FlushedChunks& dram, const Status& lower) { flushed = {dram, lower}; };
  f.fast->immediate = f.slow->immediate = false;
  f.store->flush({.namespaces = namespace_of(1), .prefix = block_hash(1, kChunkBlocks + 1)}, ended);
  EXPECT_FALSE(flushed.has_value());
  while (f.fast->run() || f.slow->run()) {
  }
  ASSERT_TRUE(flushed.has_value());
  EXPECT_TRUE(flushed->second) << flushed->second.to_string();
  EXPECT_EQ(flushed->first.chunks, 1U);
  EXPECT_TRUE(f.dram.has(f.cell(0)));
  EXPECT_FALSE(f.dram.has(f.cell(3)));
  EXPECT_TRUE(f.dram.has(elsewhere));
  const auto has = [](const MemoryTier& tier, const ChunkSpec& spec) {
    return tier.objects.contains(spec.info().key.to_string());
  };
  EXPECT_TRUE(has(*f.slow, f.cell(0)));
  EXPECT_FALSE(has(*f.slow, f.cell(1)));
  EXPECT_FALSE(has(*f.fast, f.cell(2)));
  EXPECT_FALSE(has(*f.slow, f.cell(4)));
  EXPECT_TRUE(has(*f.fast, elsewhere_on)) << "another prompt";
}

TEST(TieredStore, AFlushOfAPrefixSaysWhatItCouldNotReach) {
  TieredFixture f;
  std::optional<std::pair<FlushedChunks, Status>> flushed;
  const auto ended = [&](const FlushedChunks& dram, const Status& lower) { flushed = {dram, lower}; };
  f.store->flush({.prefix = block_hash(1, 0)}, ended);
  EXPECT_EQ(flushed->second.code(), Code::kNotFound);
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(0)).value());
  f.put(*f.slow, f.cell(1));
  f.slow->broken = Status(Code::kUnavailable, "no route");
  f.store->flush({.prefix = block_hash(1, 0)}, ended);
  EXPECT_EQ(flushed->second.code(), Code::kUnavailable);
  EXPECT_EQ(flushed->first.chunks, 1U) << "what is reached goes all the same";
  f.slow->broken = Status::ok();
  // The start of an object that nobody can read.
  f.slow->objects.begin()->second.bytes[0] = std::byte{0};
  f.store->flush({.prefix = block_hash(1, 0)}, ended);
  EXPECT_TRUE(f.slow->objects.empty());
}

TEST(TieredStore, EndsInTheMiddleOfEverything) {
  TieredFixture f(1024, WritePolicy::kThrough);
  for (std::uint64_t number = 0; number < 4; ++number) f.put(*f.fast, f.cell(number));
  f.fast->immediate = false;
  const auto prefetch = f.prefetch(16);
  ASSERT_TRUE(f.fast->run());
  ASSERT_TRUE(store_chunk(f.dram.store, f.cell(9)).value());
  f.store->stored(f.cell(9).info().key);
  f.store.reset();
  EXPECT_FALSE(prefetch->pending());
  EXPECT_EQ(f.dram.store.stats().pinned_chunks, 0U);
}

}  // namespace
}  // namespace kvern
