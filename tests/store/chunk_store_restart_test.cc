#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <vector>

#include "store/container_map.h"
#include "tests/store/stored_chunks.h"

namespace kvern {
namespace {

using testing::block_hash;
using testing::ChunkSpec;
using testing::holds_exactly;
using testing::object_of;
using testing::PageAlignedBytes;
using testing::store_chunk;
using testing::StoreFixture;

/// Memory that outlives the stores which use it, one after the other.
struct Lives {
  explicit Lives(std::uint64_t pages) : config(StoreFixture::pages(pages)), slab(config.slab_bytes) {}

  ChunkStore& start() {
    store.reset();
    index = std::make_unique<PageAlignedBytes>(block_index_bytes(
        {.chunk_capacity = config.chunk_capacity, .slot_count = config.index_slots, .generation = config.generation}));
    store.emplace(config, slab.span().first(config.slab_bytes), index->span(), make_lru_policy(), nullptr, clock,
                  map.span().first(ContainerMap::bytes_for(config.slab_bytes)));
    return *store;
  }

  ChunkStoreConfig config;
  PageAlignedBytes slab;
  PageAlignedBytes map{8192};
  std::unique_ptr<PageAlignedBytes> index;
  ManualClock clock;
  std::optional<ChunkStore> store;
};

TEST(WarmRestart, FindsEveryCompleteChunkWithItsBytes) {
  Lives lives(256);
  ChunkStore& first = lives.start();
  EXPECT_EQ(first.stats().recovered_chunks, 0U);
  std::vector<ChunkSpec> specs;
  for (std::uint64_t prompt = 0; prompt < 4; ++prompt) {
    specs.push_back({.prompt = prompt, .first_block = 0, .blocks = 4});
    specs.push_back({.prompt = prompt, .first_block = 4, .blocks = 3});
  }
  for (const auto& spec : specs) ASSERT_TRUE(store_chunk(first, spec).value());
  const ChunkSpec halves{.prompt = 9};
  ASSERT_FALSE(store_chunk(first, halves.shard(0, 4)).value());
  ASSERT_TRUE(store_chunk(first, halves.shard(4, 4)).value());
  const auto before = first.stats();

  ChunkStore& second = lives.start();
  const auto after = second.stats();
  EXPECT_EQ(after.recovered_chunks, before.chunks);
  EXPECT_EQ(after.chunks, before.chunks);
  EXPECT_EQ(after.used_bytes, before.used_bytes);
  EXPECT_EQ(after.encoded_bytes, before.encoded_bytes);
  EXPECT_EQ(after.raw_bytes, before.raw_bytes);
  EXPECT_EQ(after.index_slots_used, before.index_slots_used);
  EXPECT_EQ(after.dropped_containers, 0U);
  for (const auto& spec : specs) EXPECT_TRUE(holds_exactly(second, spec));
  EXPECT_TRUE(holds_exactly(second, halves));
}

TEST(WarmRestart, KeepsTheOrderOfUse) {
  // Stored one after the other and used in another order, some in the same moment.
  const std::vector<std::uint64_t> stored = {3, 1, 5, 4, 2};
  const std::vector<std::vector<std::uint64_t>> used = {{4}, {1, 5}, {2}};
  const std::vector<std::vector<std::uint64_t>> wanted = {{3}, {4}, {1, 5}, {2}};
  Lives lives(256);
  const auto later = [&] { lives.clock.advance(std::chrono::milliseconds(200)); };
  ChunkStore& first = lives.start();
  for (const std::uint64_t prompt : stored) {
    const ChunkSpec spec{.prompt = prompt};
    if (prompt % 2 == 0) {  // of two ranks
      ASSERT_FALSE(store_chunk(first, spec.shard(0, 4)).value());
      ASSERT_TRUE(store_chunk(first, spec.shard(4, 4)).value());
    } else {
      ASSERT_TRUE(store_chunk(first, spec).value());
    }
    later();
  }
  for (const auto& together : used) {
    for (const std::uint64_t prompt : together) {
      const auto info = ChunkSpec{.prompt = prompt}.info();
      ASSERT_EQ(first.match(info.key.namespace_id, info.key.group, info.block_hashes), info.block_hashes.size());
    }
    later();
  }

  lives.start();
  later();
  ChunkStore& second = lives.start();  // that was no use
  std::vector<std::uint64_t> order;
  second.set_removal_listener([&](const ChunkKey& key, std::span<const BlockHash>, std::string_view) {
    for (const std::uint64_t prompt : stored) {
      if (ChunkSpec{.prompt = prompt}.info().key == key) order.push_back(prompt);
    }
  });
  for (std::uint64_t prompt = 100; order.size() < stored.size(); ++prompt) {
    ASSERT_LT(prompt, 200U) << "the chunks that were there before do not leave";
    ASSERT_TRUE(store_chunk(second, {.prompt = prompt}).value());
  }
  for (const auto& together : wanted) {
    std::vector<std::uint64_t> next(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(together.size()));
    order.erase(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(together.size()));
    std::ranges::sort(next);
    EXPECT_EQ(next, together);
  }
}

TEST(WarmRestart, TheEndOfAPromptLeavesBeforeItsStart) {
  Lives lives(256);
  ChunkStore& first = lives.start();
  const ChunkSpec start{.prompt = 1, .first_block = 0, .blocks = 4}, end{.prompt = 1, .first_block = 4, .blocks = 4};
  ASSERT_TRUE(store_chunk(first, start).value());
  ASSERT_TRUE(store_chunk(first, end).value());
  ChunkStore& second = lives.start();
  bool end_left = false, start_left = false;
  second.set_removal_listener([&](const ChunkKey& key, std::span<const BlockHash>, std::string_view) {
    end_left = end_left || key == end.info().key;
    if (key == start.info().key) {
      start_left = true;
      EXPECT_TRUE(end_left);
    }
  });
  for (std::uint64_t prompt = 100; !start_left; ++prompt) {
    ASSERT_LT(prompt, 200U);
    ASSERT_TRUE(store_chunk(second, {.prompt = prompt}).value());
  }
}

TEST(WarmRestart, DropsWhatIsHalfWrittenOrDamagedAndFreesItsRoom) {
  Lives lives(256);
  ChunkStore& first = lives.start();
  const ChunkSpec good{.prompt = 1}, damaged{.prompt = 2}, half{.prompt = 3}, unpublished{.prompt = 4};
  ASSERT_TRUE(store_chunk(first, good).value());
  ASSERT_TRUE(store_chunk(first, damaged).value());
  ASSERT_FALSE(store_chunk(first, half.shard(0, 4)).value());
  ASSERT_TRUE(first.begin_write(unpublished.info(), 40'000).has_value());
  const auto pinned = first.pin(damaged.info().key.namespace_id, 0, damaged.info().key.last_block);
  lives.slab.span()[pinned->shards.front().extent.offset + 40] ^= std::byte{1};

  ChunkStore& second = lives.start();
  EXPECT_EQ(second.stats().recovered_chunks, 1U);
  EXPECT_EQ(second.stats().dropped_containers, 1U) << "a half-stored chunk is in no map";
  EXPECT_TRUE(holds_exactly(second, good));
  EXPECT_FALSE(holds_exactly(second, damaged));
  second.flush(NamespaceSet::all());
  EXPECT_EQ(second.stats().used_bytes, 0U);
}

TEST(WarmRestart, WhatWasEvictedFlushedOrQuarantinedStaysAway) {
  Lives lives(64);
  ChunkStore& first = lives.start();
  const ChunkSpec flushed{.prompt = 1, .namespace_number = 7}, bad{.prompt = 2}, kept{.prompt = 3};
  ASSERT_TRUE(store_chunk(first, flushed).value());
  ASSERT_TRUE(store_chunk(first, bad).value());
  ASSERT_TRUE(store_chunk(first, kept).value());
  first.flush(flushed.info().key.namespace_id);
  const auto held = first.pin(bad.info().key.namespace_id, 0, bad.info().key.last_block);
  first.quarantine(bad.info().key.namespace_id, 0, bad.info().key.last_block);
  ASSERT_TRUE(held.has_value()) << "its bytes cannot be freed yet";

  ChunkStore& second = lives.start();
  EXPECT_EQ(second.stats().recovered_chunks, 1U);
  EXPECT_TRUE(holds_exactly(second, kept));
  EXPECT_FALSE(holds_exactly(second, bad));
}

TEST(WarmRestart, AnUnknownMapOrASmallerSlabIsAnEmptyStart) {
  Lives lives(256);
  ASSERT_TRUE(store_chunk(lives.start(), {.prompt = 1}).value());
  lives.map.span()[0] ^= std::byte{1};
  EXPECT_EQ(lives.start().stats().chunks, 0U);

  ASSERT_TRUE(store_chunk(*lives.store, {.prompt = 1}).value());
  lives.config.slab_bytes -= 4096;
  EXPECT_EQ(lives.start().stats().chunks, 0U);
}

TEST(WarmRestart, ALargerSlabKeepsWhatWasThere) {
  Lives lives(256);
  lives.config.slab_bytes = 128 * 4096;
  ASSERT_TRUE(store_chunk(lives.start(), {.prompt = 1}).value());
  lives.config.slab_bytes = 256 * 4096;
  EXPECT_TRUE(holds_exactly(lives.start(), {.prompt = 1}));
}

RC_GTEST_PROP(WarmRestart, SurvivesAnyBytesInMapAndSlab, ()) {
  Lives lives(64);
  ChunkStore& first = lives.start();
  for (std::uint64_t prompt = 0; prompt < 6; ++prompt) RC_ASSERT(store_chunk(first, {.prompt = prompt}).value());
  const auto flips = *rc::gen::container<std::vector<std::pair<std::uint32_t, std::uint32_t>>>(
      rc::gen::pair(rc::gen::inRange(0U, 64U * 4096U * 8U), rc::gen::inRange(0U, 2U * 8U * 264U)));
  for (const auto& [slab_bit, map_bit] : flips) {
    lives.slab.span()[slab_bit / 8] ^= static_cast<std::byte>(1U << slab_bit % 8);
    const std::uint32_t byte = map_bit / 8;  // half of the flips in what comes behind the header
    if (byte < 264) lives.map.span()[32 + byte] ^= static_cast<std::byte>(1U << map_bit % 8);
  }
  ChunkStore& second = lives.start();
  second.flush(NamespaceSet::all());
  RC_ASSERT(second.stats().used_bytes == 0U);
  RC_ASSERT(second.stats().index_slots_used == 0U);
}

TEST(ChunkObject, IsPublishedAsAWholeAndFreedShardByShard) {
  StoreFixture f(StoreFixture::pages(256));
  const ChunkSpec whole{.prompt = 5};
  const std::vector<ChunkSpec> halves = {whole.shard(0, 4), whole.shard(4, 4)};
  const auto object = object_of(halves);
  const auto ticket = f.store.begin_load(object.size());
  ASSERT_TRUE(ticket.has_value());
  std::ranges::copy(object, f.store.bytes(*ticket).begin());
  std::vector<LoadedShard> shards;
  for (std::uint64_t at = 0; at < object.size();) {
    const auto reader = ContainerReader::parse(std::span(object).subspan(at));
    ASSERT_TRUE(reader.has_value());
    shards.push_back({reader->info(), at, reader->size_bytes()});
    at += (reader->size_bytes() + 4095) / 4096 * 4096;
  }
  EXPECT_FALSE(f.has(whole));
  ASSERT_TRUE(f.store.publish_load(*ticket, shards, 1));
  EXPECT_TRUE(holds_exactly(f.store, whole));
  EXPECT_TRUE(f.store.unsaved_victims(1 << 30, 1).empty());
  EXPECT_EQ(f.store.unsaved_victims(1 << 30, 2).size(), 1U);
  EXPECT_EQ(f.store.stats().used_bytes, object.size());

  const auto again = f.store.begin_load(object.size());
  ASSERT_TRUE(again.has_value());
  std::ranges::copy(object, f.store.bytes(*again).begin());
  EXPECT_TRUE(f.store.publish_load(*again, shards, 1)) << "it is there already";
  EXPECT_EQ(f.store.stats().used_bytes, object.size());

  const auto part = f.store.begin_load(object.size());
  ASSERT_TRUE(part.has_value());
  f.store.flush(NamespaceSet::all());
  EXPECT_EQ(f.store.publish_load(*part, std::span(shards).first(1), 1).code(), Code::kCorrupt);
  const auto aborted = f.store.begin_load(object.size());
  ASSERT_TRUE(aborted.has_value());
  f.store.abort(*aborted);
  f.store.flush(NamespaceSet::all());
  EXPECT_EQ(f.store.stats().used_bytes, 0U);
  EXPECT_EQ(f.store.begin_load(100).error().code(), Code::kRefused);
}

// The chunk that comes up has no number yet while room for one is made, long after the host was started.
TEST(ChunkObject, ComesUpWhereAllChunkNumbersAreTaken) {
  StoreFixture f({.slab_bytes = 64 * 4096, .chunk_capacity = 2, .index_slots = 64});
  f.clock.advance(std::chrono::hours(1));
  for (std::uint64_t prompt = 0; prompt < 2; ++prompt) ASSERT_TRUE(store_chunk(f.store, {.prompt = prompt}).value());
  const ChunkSpec risen{.prompt = 5};
  const auto object = object_of(std::vector<ChunkSpec>{risen});
  const auto ticket = f.store.begin_load(object.size());
  ASSERT_TRUE(ticket.has_value());
  std::ranges::copy(object, f.store.bytes(*ticket).begin());
  const auto reader = ContainerReader::parse(std::span(object));
  ASSERT_TRUE(reader.has_value());
  const std::vector<LoadedShard> shards{{reader->info(), 0, reader->size_bytes()}};
  ASSERT_TRUE(f.store.publish_load(*ticket, shards, 1));
  EXPECT_TRUE(holds_exactly(f.store, risen));
  EXPECT_FALSE(f.has({.prompt = 0}));
  EXPECT_TRUE(holds_exactly(f.store, {.prompt = 1}));
  EXPECT_EQ(f.store.stats().chunks, 2U);
  EXPECT_EQ(f.store.stats().incomplete_chunks, 0U);
}

TEST(ChunkObject, DamagedNamesTakeTheirChunkAway) {
  StoreFixture f(StoreFixture::pages(64));
  const ChunkSpec damaged{.prompt = 1}, good{.prompt = 2};
  ASSERT_TRUE(store_chunk(f.store, damaged).value());
  ASSERT_TRUE(store_chunk(f.store, good).value());
  const auto info = damaged.info();
  std::vector<std::size_t> removed_blocks;
  f.store.set_removal_listener([&](const ChunkKey&, std::span<const BlockHash> blocks, std::string_view) {
    removed_blocks.push_back(blocks.size());
  });
  const auto pinned = f.pin(damaged);
  const auto bytes = f.store.bytes(pinned->shards.front());
  const std::size_t at = block_hashes_offset(info.codec_spec) + 1 + info.block_hashes.front().size() + 5;  // of block 1
  const_cast<std::byte&>(bytes[at]) ^= std::byte{1};
  f.store.unpin(pinned->pin);

  EXPECT_FALSE(f.store.pin(info.key.namespace_id, 0, info.block_hashes[1]));
  EXPECT_EQ(f.store.stats().quarantined_chunks, 1U);
  EXPECT_EQ(removed_blocks, std::vector<std::size_t>{0}) << "it is not known which";
  EXPECT_FALSE(f.pin(damaged)) << "all of it went";
  EXPECT_FALSE(f.store.pin(info.key.namespace_id, 0, block_hash(7, 7))) << "a block that nobody stored";
  EXPECT_EQ(f.store.stats().quarantined_chunks, 1U);
  EXPECT_TRUE(holds_exactly(f.store, good));
  ASSERT_TRUE(store_chunk(f.store, damaged).value());
  EXPECT_TRUE(holds_exactly(f.store, damaged));
  EXPECT_TRUE(f.has(damaged));
}

TEST(ChunkObject, AStoredChunkIsSavedOnce) {
  StoreFixture f(StoreFixture::pages(64));
  const ChunkSpec one{.prompt = 1}, two{.prompt = 2};
  ASSERT_TRUE(f.put(one));
  ASSERT_TRUE(f.put(two));
  ASSERT_EQ(f.store.unsaved_victims(4096, 3).size(), 1U) << "about so many bytes";
  f.store.mark_saved(one.info().key, 3);
  const auto left = f.store.unsaved_victims(1 << 20, 3);
  ASSERT_EQ(left.size(), 1U);
  EXPECT_EQ(left.front().key, two.info().key);
  EXPECT_EQ(left.front().missing_in, 3);
}

}  // namespace
}  // namespace kvern
