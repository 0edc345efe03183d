#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "tests/store/store_fixture.h"

// Readers that protect what they find by hazards, beside writers that evict and supersede all the time. A hit that was
// claimed and found valid must be had, and its bytes must stay, until the hazard is cleared. Every container is filled
// with a stamp that follows from its first block, so that foreign or torn bytes show.

namespace kvern {
namespace {

using testing::block_hash;
using testing::ChunkSpec;
using testing::namespace_of;
using testing::PageAlignedBytes;

constexpr std::uint64_t kPrompts = 24;
constexpr std::uint32_t kBlocks = 4;
constexpr std::size_t kContainerBytes = 4096;
constexpr int kReaders = 3;

std::uint64_t stamp_of(std::uint64_t prompt) { return 0x1234'5678'0000'0000ULL + prompt; }

void fill(std::span<std::byte> bytes, std::uint64_t stamp) {
  for (std::size_t i = 0; i + sizeof stamp <= bytes.size(); i += sizeof stamp) {
    std::memcpy(bytes.data() + i, &stamp, sizeof stamp);
  }
}

bool is_filled_with(std::span<const std::byte> bytes, std::uint64_t stamp) {
  for (std::size_t i = 0; i + sizeof stamp <= bytes.size(); i += sizeof stamp) {
    if (std::memcmp(bytes.data() + i, &stamp, sizeof stamp) != 0) return false;
  }
  return true;
}

struct SharedStore {
  static constexpr ChunkStoreConfig kConfig{
      .slab_bytes = 10 * kContainerBytes, .chunk_capacity = 16, .index_slots = 128};

  SharedStore()
      : slab_memory(kConfig.slab_bytes),
        index_memory(block_index_bytes({kConfig.chunk_capacity, kConfig.index_slots, kConfig.generation})),
        store(
            kConfig, slab_memory.span(), index_memory.span(), make_lru_policy(),
            [this](std::unordered_set<std::uint32_t>& claimed) {
              for (const auto& hazard : hazards) {
                if (const auto value = hazard.load(std::memory_order_seq_cst); value != 0) claimed.insert(value - 1);
              }
            },
            Clock::system()) {}

  PageAlignedBytes slab_memory;
  PageAlignedBytes index_memory;
  std::array<std::atomic<std::uint32_t>, kReaders> hazards{};  // chunk number + 1, 0: none
  ChunkStore store;
};

struct Outcome {
  std::uint64_t claims = 0;
  std::uint64_t lost = 0;     // claimed, but not to be had
  std::uint64_t foreign = 0;  // another chunk's bytes
  std::uint64_t changed = 0;  // right at first, overwritten while claimed
};

Outcome read_until(SharedStore& shared, std::size_t slot, std::uint64_t wanted_claims) {
  Outcome outcome;
  const auto reader = BlockIndexReader::attach(shared.index_memory.span()).value();
  auto& hazard = shared.hazards[slot];
  std::mt19937_64 random(slot);
  while (outcome.claims < wanted_claims) {
    const std::uint64_t prompt = random() % kPrompts;
    const auto block = block_hash(prompt, random() % kBlocks);
    const auto hit = reader.find(block_fingerprint(namespace_of(1), 0, block.bytes()));
    if (!hit) continue;
    if (random() % 4 == 0) std::this_thread::yield();  // the chunk may go meanwhile, which still_valid() must tell
    hazard.store(hit->chunk + 1, std::memory_order_seq_cst);
    if (reader.still_valid(*hit)) {
      ++outcome.claims;
      if (const auto pinned = shared.store.pin(namespace_of(1), 0, block, PinFor::kClaimed)) {
        // Within a lease the pin would protect the bytes. Here it is the hazard that must, for the chunk that was hit.
        shared.store.unpin(pinned->pin);
        if (pinned->chunk == hit->chunk) {
          const auto bytes = shared.store.bytes(pinned->shards[0]).subspan(testing::kContainerHead);
          outcome.foreign += !is_filled_with(bytes, stamp_of(prompt));
          for (int i = 0; i < 3; ++i) {
            std::this_thread::yield();
            outcome.changed += !is_filled_with(bytes, stamp_of(prompt));
          }
        }
      } else {
        ++outcome.lost;
      }
    }
    hazard.store(0, std::memory_order_release);
  }
  return outcome;
}

void write_until(SharedStore& shared, std::uint64_t seed, const std::atomic<int>& readers_left) {
  std::mt19937_64 random(seed);
  while (readers_left.load() > 0) {
    const std::uint64_t prompt = random() % kPrompts;
    const ChunkSpec spec{.prompt = prompt, .blocks = 1 + static_cast<std::uint32_t>(random() % kBlocks)};
    const auto info = spec.info();
    const auto ticket = shared.store.begin_write(info, kContainerBytes);
    if (!ticket) {
      if (random() % 16 == 0) shared.store.flush(NamespaceSet::all());
      continue;
    }
    fill(shared.store.bytes(*ticket), stamp_of(prompt));
    testing::write_names(shared.store.bytes(*ticket), info);
    if (random() % 8 == 0) {
      shared.store.abort(*ticket);
    } else {
      ASSERT_TRUE(shared.store.publish(*ticket, info, kContainerBytes).has_value());
    }
    if (random() % 8 == 0) shared.store.sweep();
  }
}

TEST(ChunkStoreConcurrency, AClaimedHitKeepsItsBytesBesideAnEvictor) {
  constexpr std::uint64_t kClaims = 1'500;
  SharedStore shared;
  std::array<Outcome, kReaders> outcomes;
  std::atomic<int> readers_left{kReaders};
  std::vector<std::thread> threads;
  for (std::size_t slot = 0; slot < kReaders; ++slot) {
    threads.emplace_back([&, slot] {
      outcomes[slot] = read_until(shared, slot, kClaims);
      --readers_left;
    });
  }
  for (std::uint64_t seed = 0; seed < 2; ++seed) {
    threads.emplace_back([&, seed] { write_until(shared, seed, readers_left); });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& outcome : outcomes) {
    EXPECT_EQ(outcome.lost, 0U);
    EXPECT_EQ(outcome.foreign, 0U);
    EXPECT_EQ(outcome.changed, 0U);
  }
  EXPECT_GT(shared.store.stats().evicted_chunks + shared.store.stats().superseded_chunks, 0U);
  shared.store.flush(NamespaceSet::all());
  EXPECT_EQ(shared.store.stats().used_bytes, 0U);
  EXPECT_EQ(shared.store.stats().index_slots_used, 0U);
}

}  // namespace
}  // namespace kvern
