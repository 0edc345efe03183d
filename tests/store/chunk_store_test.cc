#include "store/chunk_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/store/store_fixture.h"

namespace kvern {
namespace {

using testing::block_hash;
using testing::ChunkSpec;
using testing::namespace_of;
using testing::PageAlignedBytes;
using testing::StoreFixture;

TEST(ChunkStore, APublishedChunkIsFoundByEachOfItsBlocks) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec spec{.prompt = 7, .blocks = 4};
  const auto info = spec.info();
  EXPECT_EQ(f.store.presence(info.key, info.shape), Presence::kAbsent);
  const auto ticket = f.store.begin_write(info, 10'000);
  ASSERT_TRUE(ticket.has_value());
  ASSERT_EQ(f.store.bytes(*ticket).size(), 10'000U);
  std::ranges::fill(f.store.bytes(*ticket), std::byte{42});
  EXPECT_EQ(f.store.presence(info.key, info.shape), Presence::kInFlight);
  EXPECT_FALSE(f.has(spec)) << "manifest last";

  testing::write_names(f.store.bytes(*ticket), info);
  const auto complete = f.store.publish(*ticket, info, 5000);
  ASSERT_TRUE(complete.has_value());
  EXPECT_TRUE(*complete);
  EXPECT_EQ(f.store.presence(info.key, info.shape), Presence::kStored);
  EXPECT_TRUE(f.has(spec));
  const auto reader = f.reader();
  for (std::size_t block = 0; block < 4; ++block) {
    const auto pinned = f.store.pin(info.key.namespace_id, 0, info.block_hashes[block]);
    ASSERT_TRUE(pinned.has_value());
    EXPECT_EQ(pinned->tokens, 64U);
    ASSERT_EQ(pinned->shards.size(), 1U);
    EXPECT_EQ(f.store.bytes(pinned->shards[0]).size(), 5000U);
    EXPECT_EQ(f.store.bytes(pinned->shards[0])[4999], std::byte{42});
    f.store.unpin(pinned->pin);
    const auto hit = reader.find(block_fingerprint(info.key.namespace_id, 0, info.block_hashes[block].bytes()));
    ASSERT_TRUE(hit.has_value());
    EXPECT_EQ(hit->block_in_chunk, block);
  }
  const auto stats = f.store.stats();
  EXPECT_EQ(stats.chunks, 1U);
  EXPECT_EQ(stats.used_bytes, 8192U);
  EXPECT_EQ(stats.encoded_bytes, 5000U);
  EXPECT_EQ(stats.raw_bytes, info.shape.raw_bytes());
  EXPECT_EQ(stats.index_slots_used, 4U);
}

TEST(ChunkStore, MatchCountsLeadingBlocksOverSeveralChunks) {
  StoreFixture f(StoreFixture::pages(16));
  ASSERT_TRUE(f.put({.prompt = 1, .first_block = 0, .blocks = 4}));
  ASSERT_TRUE(f.put({.prompt = 1, .first_block = 4, .blocks = 4}));
  ASSERT_TRUE(f.put({.prompt = 1, .first_block = 12, .blocks = 4}));
  std::vector<BlockHash> prompt;
  for (std::uint64_t block = 0; block < 16; ++block) prompt.push_back(block_hash(1, block));
  EXPECT_EQ(f.store.match(namespace_of(1), 0, prompt), 8U);
  EXPECT_EQ(f.store.match(namespace_of(1), 0, std::span(prompt).first(6)), 6U);
  EXPECT_EQ(f.store.match(namespace_of(1), 0, {}), 0U);
  EXPECT_EQ(f.store.match(namespace_of(2), 0, prompt), 0U) << "another namespace";
  EXPECT_EQ(f.store.match(namespace_of(1), 1, prompt), 0U) << "another group";
}

TEST(ChunkStore, AChunkIsReadableOnceItsShardsCoverEverything) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec whole{.prompt = 3};
  const auto left = whole.shard(0, 5);
  const auto right = whole.shard(3, 5);
  const auto info = whole.info();
  const auto first = f.put(left);
  ASSERT_TRUE(first.has_value());
  EXPECT_FALSE(*first);
  EXPECT_FALSE(f.has(whole));
  EXPECT_FALSE(f.pin(whole).has_value());
  EXPECT_EQ(f.store.presence(info.key, left.info().shape), Presence::kStored);
  EXPECT_EQ(f.store.presence(info.key, right.info().shape), Presence::kPartlyStored);
  EXPECT_EQ(f.put(left).error().code(), Code::kBusy) << "that shard is there";
  EXPECT_EQ(f.store.stats().incomplete_chunks, 1U);

  const auto second = f.put(right);
  ASSERT_TRUE(second.has_value());
  EXPECT_TRUE(*second);
  EXPECT_TRUE(f.has(whole));
  const auto pinned = f.pin(whole);
  ASSERT_TRUE(pinned.has_value());
  ASSERT_EQ(pinned->shards.size(), 2U);
  EXPECT_EQ(pinned->shards[1].head_begin, 3U);
  EXPECT_EQ(f.store.stats().incomplete_chunks, 0U);
  EXPECT_EQ(f.store.stats().chunks, 1U);
}

TEST(ChunkStore, RefusesAShardThatDisagreesWithTheOthers) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec whole{.prompt = 3};
  ASSERT_TRUE(f.put(whole.shard(0, 4)));
  auto info = whole.shard(4, 4).info();
  info.position += 16;
  EXPECT_EQ(f.store.begin_write(info, 4096).error().code(), Code::kInvalid);
  info = whole.shard(4, 4).info();
  info.model_heads = 16;
  EXPECT_EQ(f.store.begin_write(info, 4096).error().code(), Code::kInvalid);
}

TEST(ChunkStore, OneWriterPerShardAtATime) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec spec{.prompt = 1};
  const auto ticket = f.store.begin_write(spec.info(), 4096);
  ASSERT_TRUE(ticket.has_value());
  EXPECT_EQ(f.store.begin_write(spec.info(), 4096).error().code(), Code::kBusy);
  EXPECT_TRUE(f.store.begin_write(spec.shard(0, 4).info(), 4096).has_value()) << "another range";
  f.store.abort(*ticket);
  f.store.abort(*ticket);
  EXPECT_FALSE(f.store.publish(*ticket, spec.info(), 100).has_value());
  EXPECT_TRUE(f.put(spec).has_value());
  EXPECT_EQ(f.put(spec).error().code(), Code::kBusy) << "stored already";
}

TEST(ChunkStore, APublicationThatDoesNotFitItsTicketLeavesNothingBehind) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec spec{.prompt = 1};
  for (int wrong = 0; wrong < 5; ++wrong) {
    const auto ticket = f.store.begin_write(spec.info(), 4096);
    ASSERT_TRUE(ticket.has_value());
    auto info = wrong == 0 ? ChunkSpec{.prompt = 2}.info() : wrong == 1 ? spec.shard(0, 4).info() : spec.info();
    const std::size_t bytes = wrong == 2 ? 4097 : wrong == 3 ? 0 : 4096;
    std::ranges::fill(f.store.bytes(*ticket), std::byte{0});
    if (wrong < 4) testing::write_names(f.store.bytes(*ticket), info);
    EXPECT_EQ(f.store.publish(*ticket, info, bytes).error().code(), Code::kInvalid) << wrong;
    EXPECT_EQ(f.store.stats().used_bytes, 0U) << wrong;
  }
  EXPECT_TRUE(f.put(spec).has_value());
}

TEST(ChunkStore, EvictsTheLeastRecentlyUsedToMakeRoom) {
  StoreFixture f(StoreFixture::pages(4));
  for (std::uint64_t prompt = 0; prompt < 4; ++prompt) ASSERT_TRUE(f.put({.prompt = prompt}));
  EXPECT_TRUE(f.has({.prompt = 0}));
  ASSERT_TRUE(f.put({.prompt = 4}));
  EXPECT_TRUE(f.has({.prompt = 0}));
  EXPECT_FALSE(f.has({.prompt = 1}));
  EXPECT_TRUE(f.has({.prompt = 2}));
  EXPECT_EQ(f.store.stats().evicted_chunks, 1U);
  EXPECT_EQ(f.store.stats().evicted_bytes, 4096U);
  EXPECT_EQ(f.store.begin_write(ChunkSpec{.prompt = 9}.info(), 5 * 4096).error().code(), Code::kRefused);
  EXPECT_EQ(f.store.stats().chunks, 4U);
}

TEST(ChunkStore, SparesWhatIsPinnedOrClaimed) {
  StoreFixture f(StoreFixture::pages(2));
  const ChunkSpec pinned{.prompt = 1};
  const ChunkSpec claimed{.prompt = 2};
  ASSERT_TRUE(f.put(pinned));
  ASSERT_TRUE(f.put(claimed));
  const auto pin = f.pin(pinned);
  ASSERT_TRUE(pin.has_value());
  const auto claim = f.reader().find(block_fingerprint(namespace_of(1), 0, block_hash(2, 0).bytes()));
  ASSERT_TRUE(claim.has_value());
  f.claimed = {claim->chunk};
  EXPECT_EQ(f.put({.prompt = 3}).error().code(), Code::kBusy);
  EXPECT_TRUE(f.reader().still_valid(*claim)) << "a retirement that was taken back";
  EXPECT_EQ(f.store.stats().pinned_chunks, 1U);
  f.claimed.clear();
  ASSERT_TRUE(f.put({.prompt = 3}));
  EXPECT_FALSE(f.reader().still_valid(*claim));
  EXPECT_TRUE(f.has(pinned));
  f.store.unpin(pin->pin);
  f.store.unpin(pin->pin);
  EXPECT_EQ(f.store.stats().pinned_chunks, 0U);
  ASSERT_TRUE(f.put({.prompt = 4}));
  ASSERT_TRUE(f.put({.prompt = 5}));
  EXPECT_FALSE(f.has(pinned));
}

TEST(ChunkStore, EvictsToMakeRoomInTheIndexAndForChunkNumbers) {
  StoreFixture narrow({.slab_bytes = 64 * 4096, .chunk_capacity = 64, .index_slots = 16});  // 12 usable
  for (std::uint64_t prompt = 0; prompt < 5; ++prompt) ASSERT_TRUE(narrow.put({.prompt = prompt, .blocks = 4}));
  EXPECT_EQ(narrow.store.stats().chunks, 3U);
  EXPECT_TRUE(narrow.has({.prompt = 4, .blocks = 4}));
  EXPECT_EQ(narrow.put({.prompt = 9, .blocks = 13}).error().code(), Code::kBusy);
  EXPECT_EQ(narrow.store.stats().chunks, 3U) << "nothing goes for what can never fit";
  EXPECT_EQ(narrow.store.stats().incomplete_chunks, 0U);
  EXPECT_EQ(narrow.store.stats().used_bytes, 3U * 4096);

  StoreFixture few({.slab_bytes = 64 * 4096, .chunk_capacity = 2, .index_slots = 64});
  for (std::uint64_t prompt = 0; prompt < 5; ++prompt) ASSERT_TRUE(few.put({.prompt = prompt}));
  EXPECT_EQ(few.store.stats().chunks, 2U);
}

TEST(ChunkStore, WithoutThePartThatCannotBeHadItGoesOnAsASmallerOne) {
  StoreFixture f(StoreFixture::pages(16));
  for (std::uint64_t prompt = 0; prompt < 4; ++prompt) ASSERT_TRUE(f.put({.prompt = prompt}));
  f.store.cut_off(8 * 4096);
  EXPECT_EQ(f.store.stats().capacity_bytes, 8U * 4096);
  for (std::uint64_t prompt = 10; prompt < 40; ++prompt) {
    const auto info = ChunkSpec{.prompt = prompt}.info();
    const auto ticket = f.store.begin_write(info, 4096);
    ASSERT_TRUE(ticket) << "something has left for it";
    EXPECT_LT(ticket->extent.offset, 8U * 4096);
    testing::write_names(f.store.bytes(*ticket), info);
    ASSERT_TRUE(f.store.publish(*ticket, info, 4096));
  }
  EXPECT_EQ(f.store.stats().chunks, 8U);
  EXPECT_GT(f.store.stats().evicted_chunks, 0U);
}

TEST(ChunkStore, ALongerChunkTakesOverFromAShorterOne) {
  StoreFixture f(StoreFixture::pages(16));
  std::vector<std::string> reasons;
  std::vector<ChunkKey> removed;
  f.store.set_removal_listener([&](const ChunkKey& key, std::span<const BlockHash> blocks, std::string_view reason) {
    reasons.emplace_back(reason);
    removed.push_back(key);
    EXPECT_EQ(blocks.size(), 2U);
    EXPECT_EQ(f.store.stats().chunks, 1U) << "called without the lock";
  });
  const ChunkSpec shorter{.prompt = 1, .blocks = 2};
  const ChunkSpec longer{.prompt = 1, .blocks = 6};
  ASSERT_TRUE(f.put(shorter));
  EXPECT_EQ(f.store.presence(longer.info().key, longer.info().shape), Presence::kAbsent);
  ASSERT_TRUE(f.put(longer));
  EXPECT_TRUE(f.has(shorter));
  EXPECT_TRUE(f.has(longer));
  EXPECT_EQ(f.number_of(shorter), f.number_of(longer));
  EXPECT_EQ(reasons, std::vector<std::string>{"superseded"});
  EXPECT_EQ(removed, std::vector<ChunkKey>{shorter.info().key});
  const auto stats = f.store.stats();
  EXPECT_EQ(stats.superseded_chunks, 1U);
  EXPECT_EQ(stats.chunks, 1U);
  EXPECT_EQ(stats.used_bytes, 4096U);
  EXPECT_EQ(stats.index_slots_used, 6U);
}

TEST(ChunkStore, AShorterChunkThatComesLateIsDroppedSilently) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec shorter{.prompt = 1, .blocks = 2};
  const ChunkSpec longer{.prompt = 1, .blocks = 4};
  ASSERT_TRUE(f.put(shorter.shard(0, 4)));
  const auto late = f.store.begin_write(shorter.shard(4, 4).info(), 4096);
  ASSERT_TRUE(late.has_value());
  ASSERT_TRUE(f.put(longer));
  EXPECT_EQ(f.store.presence(shorter.info().key, shorter.info().shape), Presence::kStored);
  EXPECT_EQ(f.put(shorter).error().code(), Code::kBusy);
  testing::write_names(f.store.bytes(*late), shorter.info());
  const auto outcome = f.store.publish(*late, shorter.shard(4, 4).info(), 4096);
  ASSERT_TRUE(outcome.has_value());
  EXPECT_TRUE(*outcome);
  EXPECT_EQ(f.number_of(shorter), f.number_of(longer));
  EXPECT_EQ(f.store.stats().used_bytes, 4096U);
  EXPECT_EQ(f.store.stats().incomplete_chunks, 0U);
}

TEST(ChunkStore, ASupersededChunkStaysReadableWhileItIsHeld) {
  StoreFixture f(StoreFixture::pages(3));
  const ChunkSpec shorter{.prompt = 1, .blocks = 2};
  const ChunkSpec longer{.prompt = 1, .blocks = 4};
  const auto ticket = f.store.begin_write(shorter.info(), 4096);
  ASSERT_TRUE(ticket.has_value());
  std::ranges::fill(f.store.bytes(*ticket), std::byte{11});
  testing::write_names(f.store.bytes(*ticket), shorter.info());
  ASSERT_TRUE(f.store.publish(*ticket, shorter.info(), 4096));
  const auto pinned = f.pin(shorter);
  ASSERT_TRUE(pinned.has_value());
  f.claimed = {pinned->chunk};
  ASSERT_TRUE(f.put(longer));
  EXPECT_EQ(f.store.stats().used_bytes, 2U * 4096);

  // The longer one goes; whoever claimed the shorter one must still get it.
  ASSERT_TRUE(f.put({.prompt = 8}));
  ASSERT_TRUE(f.put({.prompt = 9}));
  EXPECT_FALSE(f.has(longer));
  f.store.unpin(pinned->pin);
  const auto again = f.pin(shorter, PinFor::kClaimed);
  ASSERT_TRUE(again.has_value());
  EXPECT_EQ(again->chunk, pinned->chunk);
  EXPECT_EQ(f.store.bytes(again->shards[0])[0], std::byte{11});
  f.store.unpin(again->pin);
  f.store.sweep();
  EXPECT_TRUE(f.pin(shorter, PinFor::kClaimed).has_value()) << "claimed";
  f.claimed.clear();
  EXPECT_EQ(f.store.stats().pinned_chunks, 1U);
}

TEST(ChunkStore, SweepFreesASupersededChunkOnceNobodyHoldsIt) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec shorter{.prompt = 1, .blocks = 2};
  ASSERT_TRUE(f.put(shorter));
  const auto pinned = f.pin(shorter);
  ASSERT_TRUE(pinned.has_value());
  ASSERT_TRUE(f.put({.prompt = 1, .blocks = 4}));
  f.store.sweep();
  EXPECT_EQ(f.store.stats().used_bytes, 2U * 4096);
  f.store.unpin(pinned->pin);
  f.claimed = {pinned->chunk};
  f.store.sweep();
  EXPECT_EQ(f.store.stats().used_bytes, 2U * 4096);
  f.claimed.clear();
  f.store.sweep();
  EXPECT_EQ(f.store.stats().used_bytes, 4096U);
}

TEST(ChunkStore, QuarantineTakesAChunkAwayAtOnceAndFreesItLater) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec spec{.prompt = 1};
  std::vector<std::string> reasons;
  f.store.set_removal_listener(
      [&](const ChunkKey&, std::span<const BlockHash>, std::string_view reason) { reasons.emplace_back(reason); });
  ASSERT_TRUE(f.put(spec));
  const auto pinned = f.pin(spec);
  ASSERT_TRUE(pinned.has_value());
  f.store.quarantine(namespace_of(1), 0, block_hash(1, 2));
  f.store.quarantine(namespace_of(1), 0, block_hash(1, 2));
  EXPECT_FALSE(f.has(spec));
  EXPECT_FALSE(f.pin(spec).has_value());
  EXPECT_EQ(reasons, std::vector<std::string>{"quarantined"});
  EXPECT_EQ(f.store.stats().quarantined_chunks, 1U);
  EXPECT_EQ(f.store.stats().used_bytes, 4096U);
  EXPECT_TRUE(f.put(spec).has_value()) << "good bytes can come again";
  f.store.unpin(pinned->pin);
  f.store.sweep();
  EXPECT_EQ(f.store.stats().used_bytes, 4096U);
  EXPECT_TRUE(f.has(spec));
}

TEST(ChunkStore, WhatIsFlushedIsNotFoundAndIsReadableForWhoHoldsIt) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec pinned{.prompt = 1};
  const ChunkSpec claimed{.prompt = 2};
  const ChunkSpec idle{.prompt = 3};
  const ChunkSpec other{.prompt = 4, .namespace_number = 2};
  for (const auto& spec : {pinned, claimed, idle, other}) ASSERT_TRUE(f.put(spec));
  ASSERT_TRUE(f.put(ChunkSpec{.prompt = 5}.shard(0, 4)));
  const auto pin = f.pin(pinned);
  ASSERT_TRUE(pin.has_value());
  const auto before = f.store.bytes(pin->shards.front());
  f.claimed = {f.number_of(claimed)};
  EXPECT_EQ(f.store.flush(namespace_of(1)), (FlushedChunks{.chunks = 3, .bytes = 3 * 4096, .held = 2}));
  for (const auto& spec : {pinned, claimed, idle}) {
    EXPECT_FALSE(f.has(spec));
    EXPECT_FALSE(f.pin(spec).has_value()) << "nobody else finds it";
  }
  EXPECT_TRUE(f.has(other));
  EXPECT_EQ(f.store.stats().incomplete_chunks, 0U);
  const auto by_claim = f.store.pin(namespace_of(1), 0, claimed.info().key.last_block, PinFor::kClaimed);
  ASSERT_TRUE(by_claim.has_value()) << "who had matched it loads it";
  EXPECT_FALSE(f.store.pin(namespace_of(1), 0, idle.info().key.last_block, PinFor::kClaimed).has_value());
  for (std::uint64_t prompt = 10; prompt < 40; ++prompt) f.put({.prompt = prompt}).value();
  EXPECT_EQ(f.store.bytes(pin->shards.front()).data(), before.data());
  f.claimed.clear();
  EXPECT_TRUE(f.put(pinned).has_value()) << "it can be stored anew meanwhile";
  f.store.unpin(pin->pin);
  f.store.unpin(by_claim->pin);
  f.store.flush(NamespaceSet::all());
  EXPECT_EQ(f.store.stats().used_bytes, 0U);
  EXPECT_EQ(f.store.stats().index_slots_used, 0U);
  EXPECT_EQ(f.store.stats().pinned_chunks, 0U);
}

TEST(ChunkStore, FlushOfATenantAndOfSingleChunks) {
  StoreFixture f(StoreFixture::pages(16));
  // The first four bytes of an id are its tenant's: namespace_of() makes a tenant of each number.
  const auto namespaces = {namespace_of(1), namespace_of(2)};
  for (const auto& id : namespaces) EXPECT_TRUE(NamespaceSet::of_tenant(id).contains(id));
  for (std::uint64_t prompt = 0; prompt < 3; ++prompt) ASSERT_TRUE(f.put({.prompt = prompt}));
  ASSERT_TRUE(f.put({.prompt = 3, .namespace_number = 2}));
  const std::vector<ChunkKey> keys{ChunkSpec{.prompt = 1}.info().key, ChunkSpec{.prompt = 1}.info().key,
                                   ChunkSpec{.prompt = 9}.info().key};
  EXPECT_EQ(f.store.flush(keys), (FlushedChunks{.chunks = 1, .bytes = 4096}));
  EXPECT_FALSE(f.has({.prompt = 1}));
  NamespaceId sibling = namespace_of(1);
  sibling.bytes[15] = 7;
  EXPECT_EQ(f.store.flush(sibling).chunks, 0U);
  EXPECT_EQ(f.store.flush(NamespaceSet::of_tenant(sibling)).chunks, 2U);
  EXPECT_TRUE(f.has({.prompt = 3, .namespace_number = 2}));
}

TEST(ChunkStore, SweepDropsChunksWhoseShardsNeverCame) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec whole{.prompt = 1};
  ASSERT_TRUE(f.put(whole.shard(0, 2)));
  f.clock.advance(std::chrono::seconds(50));
  ASSERT_TRUE(f.put(whole.shard(2, 2)));
  f.clock.advance(std::chrono::seconds(50));
  f.store.sweep();
  EXPECT_EQ(f.store.stats().incomplete_chunks, 1U) << "the last shard is 50 s old";
  const auto ticket = f.store.begin_write(whole.shard(4, 4).info(), 4096);
  ASSERT_TRUE(ticket.has_value());
  f.clock.advance(std::chrono::seconds(50));
  f.store.sweep();
  EXPECT_EQ(f.store.stats().incomplete_chunks, 1U) << "a shard is under way";
  f.store.abort(*ticket);
  f.store.sweep();
  EXPECT_EQ(f.store.stats().incomplete_chunks, 0U);
  EXPECT_EQ(f.store.stats().used_bytes, 0U);
}

TEST(ChunkStore, RoomIsMadeOfExpiredShardsToo) {
  StoreFixture f(StoreFixture::pages(1));
  ASSERT_TRUE(f.put(ChunkSpec{.prompt = 1}.shard(0, 2)));
  EXPECT_EQ(f.put({.prompt = 2}).error().code(), Code::kBusy);
  f.clock.advance(std::chrono::seconds(61));
  EXPECT_TRUE(f.put({.prompt = 2}).has_value());
}

TEST(ChunkStore, AFingerprintCollisionIsAMiss) {
  StoreFixture f({.slab_bytes = 4 * 4096, .chunk_capacity = 4, .index_slots = 16});
  const ChunkSpec stored{.prompt = 1, .blocks = 1};
  ASSERT_TRUE(f.put(stored));
  const auto fingerprint = block_fingerprint(namespace_of(1), 0, block_hash(1, 0).bytes());
  std::uint64_t prompt = 2;  // another block with the same home in the index, which is then given the same fingerprint
  const auto other = [&] { return block_fingerprint(namespace_of(1), 0, block_hash(prompt, 0).bytes()); };
  while (other() % 16 != fingerprint % 16) ++prompt;
  const auto memory = f.index_memory.span();
  std::byte* slot = memory.data() + memory.size() - (16 - fingerprint % 16) * 16;
  ASSERT_EQ(std::memcmp(slot, &fingerprint, 8), 0);
  const std::uint64_t collision = other();
  std::memcpy(slot, &collision, 8);
  ASSERT_TRUE(f.reader().find(collision).has_value());
  const ChunkSpec never_stored{.prompt = prompt, .blocks = 1};
  EXPECT_FALSE(f.has(never_stored));
  EXPECT_FALSE(f.pin(never_stored).has_value());
  EXPECT_EQ(f.store.presence(never_stored.info().key, never_stored.info().shape), Presence::kAbsent);
}

TEST(ChunkStore, DescribesWhatItHolds) {
  StoreFixture f(StoreFixture::pages(16));
  const ChunkSpec one{.prompt = 1};
  const ChunkSpec two{.prompt = 2, .blocks = 2, .namespace_number = 2};
  ASSERT_TRUE(f.put(one, 1000));
  ASSERT_TRUE(f.put(two.shard(0, 4), 500));
  EXPECT_EQ(f.store.snapshot(NamespaceSet::all(), 100).size(), 1U) << "complete ones only";
  ASSERT_TRUE(f.put(two.shard(4, 4), 600));
  EXPECT_EQ(f.store.snapshot(NamespaceSet::all(), 100).size(), 2U);
  EXPECT_EQ(f.store.snapshot(NamespaceSet::all(), 1).size(), 1U);
  ASSERT_EQ(f.store.snapshot(namespace_of(2), 100).size(), 1U);
  const auto summary = f.store.describe(namespace_of(2), 0, block_hash(2, 0));
  ASSERT_TRUE(summary.has_value());
  EXPECT_EQ(summary->key, two.info().key);
  EXPECT_EQ(summary->blocks, two.info().block_hashes);
  EXPECT_EQ(summary->tokens, 32U);
  EXPECT_EQ(summary->encoded_bytes, 1100U);
  EXPECT_EQ(summary->raw_bytes, two.info().shape.raw_bytes());
  EXPECT_EQ(summary->codec_spec, "raw");
  EXPECT_EQ(summary->shards, 2U);
  EXPECT_FALSE(f.store.describe(namespace_of(2), 0, block_hash(1, 0)).has_value());
}

TEST(ChunkStore, RefusesConfigurationsThatDoNotFit) {
  PageAlignedBytes slab(4 * 4096);
  PageAlignedBytes index(block_index_bytes({4, 64, 1}));
  const auto make = [&](ChunkStoreConfig config) {
    ChunkStore store(config, slab.span(), index.span(), make_lru_policy(), {}, Clock::system());
  };
  EXPECT_NO_THROW(make({.slab_bytes = 4 * 4096, .chunk_capacity = 4, .index_slots = 64}));
  EXPECT_THROW(make({.slab_bytes = 5 * 4096, .chunk_capacity = 4, .index_slots = 64}), std::invalid_argument);
  EXPECT_THROW(make({.slab_bytes = 100, .chunk_capacity = 4, .index_slots = 64}), std::invalid_argument);
  EXPECT_THROW(make({.slab_bytes = 4096, .chunk_capacity = 0, .index_slots = 64}), std::invalid_argument);
  EXPECT_THROW(make({.slab_bytes = 4096, .chunk_capacity = 4, .index_slots = 65}), std::invalid_argument);
  EXPECT_THROW(make({.slab_bytes = 4096, .chunk_capacity = 4, .index_slots = 128}), std::invalid_argument);
  EXPECT_FALSE((ChunkStoreConfig{.slab_bytes = 4096, .incomplete_ttl_ns = 0}.validate().is_ok()));
}

}  // namespace
}  // namespace kvern
