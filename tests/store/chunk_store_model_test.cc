#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "tests/store/store_fixture.h"

// Random operations on a store with little room, against a naive model that learns of evictions through the removal
// listener. Every container is filled with a number of its own, so that bytes that move or are overwritten show.

namespace kvern {
namespace {

using testing::ChunkSpec;
using testing::namespace_of;
using testing::StoreFixture;

constexpr std::uint64_t kPrompts = 3;
constexpr std::uint32_t kMaxBlocks = 3;
constexpr std::uint64_t kSlabPages = 6;

struct ModelTicket {
  WriteTicket ticket;
  ChunkSpec spec;
  std::uint8_t stamp = 0;
};

struct ModelChunk {
  std::uint32_t blocks = 0;
  std::vector<std::uint8_t> stamps;  // one per shard, in the order in which they came
};

struct ModelPin {
  PinnedChunk pinned;
  std::vector<std::uint8_t> stamps;
};

using Cell = std::uint64_t;                            // a prompt has one grid cell
using IncompleteKey = std::pair<Cell, std::uint32_t>;  // cell, blocks

struct IncompleteChunk {
  std::vector<std::uint8_t> stamps;
  bool has_left = false;
  bool has_right = false;
  std::int64_t last_shard_ns = 0;
};

// (action, prompt and length, shard and index)
using Operation = std::tuple<std::uint8_t, std::uint8_t, std::uint8_t>;

class Harness {
 public:
  Harness() : f_({.slab_bytes = kSlabPages * 4096, .chunk_capacity = 16, .index_slots = 64}) {
    f_.store.set_removal_listener(
        [this](const ChunkKey& key, std::span<const BlockHash> blocks, std::string_view reason) {
          removals_.emplace_back(cell_of(key), static_cast<std::uint32_t>(blocks.size()), std::string(reason));
        });
  }

  void step(const Operation& operation) {
    const auto [action, what, which] = operation;
    const ChunkSpec whole{.prompt = what % kPrompts, .blocks = 1 + what / 16U % kMaxBlocks};
    const ChunkSpec spec = which % 3 == 0 ? whole : whole.shard(which % 3 == 1 ? 0 : 4, 4);
    switch (action % 12) {
      case 0:
      case 1:
      case 2:
        begin(spec, 1 + which / 3U % 2);
        break;
      case 3:
      case 4:
      case 5:
        publish(which);
        break;
      case 6:
        abort(which);
        break;
      case 7:
        pin(whole);
        break;
      case 8:
        unpin(which);
        break;
      case 9:
        claim(whole);
        break;
      case 10:
        f_.claimed.clear();
        claims_.clear();
        break;
      case 11:
        if (which % 4 == 0) f_.clock.advance(std::chrono::seconds(61));
        if (which % 4 == 1) quarantine(whole);
        drop_expired();
        break;
    }
    learn_evictions();
    check();
  }

  void finish() {
    while (!tickets_.empty()) abort(0);
    while (!pins_.empty()) unpin(0);
    f_.claimed.clear();
    f_.store.flush(NamespaceSet::all());
    const auto stats = f_.store.stats();
    RC_ASSERT(stats.used_bytes == 0U);
    RC_ASSERT(stats.chunks == 0U);
    RC_ASSERT(stats.incomplete_chunks == 0U);
    RC_ASSERT(stats.pinned_chunks == 0U);
    RC_ASSERT(stats.index_slots_used == 0U);
    RC_ASSERT(stats.encoded_bytes == 0U);
    RC_ASSERT(stats.raw_bytes == 0U);
  }

 private:
  Cell cell_of(const ChunkKey& key) const {
    for (Cell cell = 0; cell < kPrompts; ++cell) {
      for (std::uint32_t block = 0; block < kMaxBlocks; ++block) {
        if (testing::block_hash(cell, block) == key.last_block) return cell;
      }
    }
    return kPrompts;
  }
  static bool is_left(const ChunkSpec& spec) { return spec.head_begin == 0; }
  static bool is_right(const ChunkSpec& spec) { return spec.head_begin + spec.heads == 8; }

  bool is_stored(const ChunkSpec& spec) const {
    const auto it = stored_.find(spec.prompt);
    return it != stored_.end() && it->second.blocks >= spec.blocks;
  }
  bool is_shard_there(const ChunkSpec& spec) const {
    const auto it = incomplete_.find({spec.prompt, spec.blocks});
    return it != incomplete_.end() && (it->second.has_left || !is_left(spec)) &&
           (it->second.has_right || !is_right(spec));
  }
  bool is_in_flight(const ChunkSpec& spec) const {
    return std::ranges::any_of(tickets_, [&](const ModelTicket& ticket) {
      return ticket.spec.prompt == spec.prompt && ticket.spec.blocks == spec.blocks &&
             ticket.spec.head_begin == spec.head_begin && ticket.spec.heads == spec.heads;
    });
  }

  void begin(const ChunkSpec& spec, std::size_t pages) {
    drop_expired();
    const auto info = spec.info();
    const Presence presence = f_.store.presence(info.key, info.shape);
    const bool there = is_stored(spec) || is_shard_there(spec);
    const auto expected = there                                              ? Presence::kStored
                          : is_in_flight(spec)                               ? Presence::kInFlight
                          : incomplete_.contains({spec.prompt, spec.blocks}) ? Presence::kPartlyStored
                                                                             : Presence::kAbsent;
    RC_ASSERT(presence == expected);
    const auto ticket = f_.store.begin_write(info, pages * 4096);
    learn_evictions();
    if (!ticket) {
      RC_ASSERT(ticket.error().code() == Code::kBusy);
      const bool refusal_is_right = there || expected == Presence::kInFlight || everything_is_held();
      RC_ASSERT(refusal_is_right);
      return;
    }
    RC_ASSERT(!there);
    RC_ASSERT(expected != Presence::kInFlight);
    const std::uint8_t stamp = next_stamp_++;
    std::ranges::fill(f_.store.bytes(*ticket), std::byte{stamp});
    tickets_.push_back({*ticket, spec, stamp});
  }

  void publish(std::size_t which) {
    if (tickets_.empty()) return;
    const ModelTicket ticket = take_ticket(which);
    const ChunkSpec& spec = ticket.spec;
    const std::size_t bytes =
        testing::kContainerHead + (ticket.stamp * 64U) % (ticket.ticket.extent.bytes - testing::kContainerHead);
    testing::write_names(f_.store.bytes(ticket.ticket), spec.info());
    const auto outcome = f_.store.publish(ticket.ticket, spec.info(), bytes);
    // Numbers and index slots suffice for all chunks that the slab can hold, so that nothing has to go here.
    RC_ASSERT(outcome.has_value());
    const IncompleteKey key{spec.prompt, spec.blocks};
    if (is_stored(spec)) {
      RC_ASSERT(*outcome);
      incomplete_.erase(key);
      return;
    }
    if (is_shard_there(spec)) {
      RC_ASSERT(!*outcome);
      return;
    }
    auto& chunk = incomplete_[key];
    chunk.stamps.push_back(ticket.stamp);
    chunk.last_shard_ns = f_.clock.now_ns();
    chunk.has_left |= is_left(spec);
    chunk.has_right |= is_right(spec);
    const bool complete = chunk.has_left && chunk.has_right;
    RC_ASSERT(*outcome == complete);
    if (!complete) return;
    if (stored_.contains(spec.prompt)) {
      RC_ASSERT(removals_.size() == 1U);
      RC_ASSERT(std::get<2>(removals_[0]) == "superseded");
      RC_ASSERT(std::get<0>(removals_[0]) == spec.prompt);
      removals_.clear();
    }
    stored_[spec.prompt] = {spec.blocks, chunk.stamps};
    incomplete_.erase(key);
  }

  void abort(std::size_t which) {
    if (!tickets_.empty()) f_.store.abort(take_ticket(which).ticket);
  }

  void pin(const ChunkSpec& spec) {
    const auto pinned = f_.pin(spec, PinFor::kClaimed);
    if (!is_stored(spec)) {
      if (!pinned) return;
      // A superseded chunk that somebody holds can still be had.
      const bool is_held = std::ranges::any_of(pins_, [&](const auto& p) { return p.pinned.chunk == pinned->chunk; }) ||
                           f_.claimed.contains(pinned->chunk) || ever_held_.contains(pinned->chunk);
      RC_ASSERT(is_held);
      f_.store.unpin(pinned->pin);
      return;
    }
    RC_ASSERT(pinned.has_value());
    const auto& chunk = stored_.at(spec.prompt);
    RC_ASSERT(pinned->tokens == chunk.blocks * 16);
    pins_.push_back({*pinned, chunk.stamps});
  }

  void unpin(std::size_t which) {
    if (pins_.empty()) return;
    const auto it = pins_.begin() + static_cast<std::ptrdiff_t>(which % pins_.size());
    f_.store.unpin(it->pinned.pin);
    ever_held_.insert(it->pinned.chunk);
    pins_.erase(it);
  }

  void claim(const ChunkSpec& spec) {
    if (!is_stored(spec)) return;
    const auto pinned = f_.pin(spec);
    RC_ASSERT(pinned.has_value());
    f_.store.unpin(pinned->pin);
    f_.claimed.insert(pinned->chunk);
    ever_held_.insert(pinned->chunk);
    claims_.push_back({*pinned, stored_.at(spec.prompt).stamps});
  }

  void quarantine(const ChunkSpec& spec) {
    if (!is_stored(spec)) return;
    f_.store.quarantine(namespace_of(1), 0, spec.info().key.last_block);
    RC_ASSERT(removals_.size() == 1U);
    RC_ASSERT(std::get<2>(removals_[0]) == "quarantined");
    removals_.clear();
    stored_.erase(spec.prompt);
  }

  void drop_expired() {
    f_.store.sweep();
    std::erase_if(incomplete_, [&](const auto& item) {
      const auto& [key, chunk] = item;
      return chunk.last_shard_ns + f_.config.incomplete_ttl_ns <= f_.clock.now_ns() &&
             std::ranges::none_of(tickets_, [&](const ModelTicket& ticket) {
               return ticket.spec.prompt == key.first && ticket.spec.blocks == key.second;
             });
    });
  }

  void learn_evictions() {
    for (const auto& [cell, blocks, reason] : removals_) {
      RC_ASSERT(reason == "evicted");
      RC_ASSERT(stored_.contains(cell));
      RC_ASSERT(stored_.at(cell).blocks == blocks);
      stored_.erase(cell);
    }
    removals_.clear();
  }

  // What a store that has no room may be left with: chunks that are pinned or claimed.
  bool everything_is_held() {
    return std::ranges::all_of(stored_, [&](const auto& item) {
      const ChunkSpec spec{.prompt = item.first, .blocks = item.second.blocks};
      const auto number = f_.number_of(spec);
      return f_.claimed.contains(number) ||
             std::ranges::any_of(pins_, [&](const auto& pin) { return pin.pinned.chunk == number; });
    });
  }

  void check() {
    for (const auto& pin : pins_) check_bytes(pin.pinned, pin.stamps);
    for (const auto& claim : claims_) check_bytes(claim.pinned, claim.stamps);
    for (const auto& ticket : tickets_) {
      const auto bytes = f_.store.bytes(ticket.ticket);
      const bool intact = std::ranges::all_of(bytes, [&](std::byte byte) { return byte == std::byte{ticket.stamp}; });
      RC_ASSERT(intact);
    }
    for (Cell cell = 0; cell < kPrompts; ++cell) {
      const auto it = stored_.find(cell);
      const std::uint32_t blocks = it == stored_.end() ? 0 : it->second.blocks;
      const auto info = ChunkSpec{.prompt = cell, .blocks = kMaxBlocks}.info();
      const auto found = f_.store.describe(namespace_of(1), 0, info.block_hashes[0]);
      RC_ASSERT(found.has_value() == (blocks > 0));
      if (blocks == 0) continue;
      RC_ASSERT(found->blocks.size() == blocks);
      const auto pinned = f_.store.pin(namespace_of(1), 0, info.block_hashes[blocks - 1]);
      RC_ASSERT(pinned.has_value());
      check_bytes(*pinned, it->second.stamps);
      f_.store.unpin(pinned->pin);
    }
    RC_ASSERT(f_.store.stats().chunks == stored_.size());
    RC_ASSERT(f_.store.stats().incomplete_chunks == incomplete_.size());
  }

  void check_bytes(const PinnedChunk& pinned, const std::vector<std::uint8_t>& stamps) {
    RC_ASSERT(pinned.shards.size() == stamps.size());
    for (std::size_t shard = 0; shard < stamps.size(); ++shard) {
      const auto bytes = f_.store.bytes(pinned.shards[shard]).subspan(testing::kContainerHead);
      const bool intact = std::ranges::all_of(bytes, [&](std::byte byte) { return byte == std::byte{stamps[shard]}; });
      RC_ASSERT(intact);
    }
  }

  ModelTicket take_ticket(std::size_t which) {
    const auto it = tickets_.begin() + static_cast<std::ptrdiff_t>(which % tickets_.size());
    ModelTicket ticket = *it;
    tickets_.erase(it);
    return ticket;
  }

  StoreFixture f_;
  std::vector<ModelTicket> tickets_;
  std::vector<ModelPin> pins_;
  std::vector<ModelPin> claims_;
  std::map<Cell, ModelChunk> stored_;
  std::map<IncompleteKey, IncompleteChunk> incomplete_;
  std::set<std::uint32_t> ever_held_;  // chunk numbers that were pinned or claimed
  std::vector<std::tuple<Cell, std::uint32_t, std::string>> removals_;
  std::uint8_t next_stamp_ = 1;
};

RC_GTEST_PROP(ChunkStore, AgreesWithANaiveModel, ()) {
  const auto operations =
      *rc::gen::scale(8.0, rc::gen::container<std::vector<Operation>>(rc::gen::arbitrary<Operation>()));
  Harness harness;
  for (const auto& operation : operations) harness.step(operation);
  harness.finish();
}

}  // namespace
}  // namespace kvern
