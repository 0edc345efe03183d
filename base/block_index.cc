#include "base/block_index.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace kvern {
namespace {

// "KVERNIDX", read as a little-endian number.
constexpr std::uint64_t kMagic = 0x5844494e5245564bULL;
constexpr std::uint32_t kLayoutVersion = 1;
constexpr std::size_t kHeaderBytes = 4096;
constexpr std::size_t kLineBytes = 64;
// A fingerprint lies at most this many slots after its home. In a table that is 3/4 full, runs longer than this have a
// probability below 1e-8; the bound keeps look-ups short whatever fingerprints a client makes up.
constexpr std::size_t kMaxProbe = 512;
// How often a look-up that the writer disturbs starts over before it counts as a miss. One disturbance needs an entry
// to move past the probe within some 50 ns.
constexpr int kMaxAttempts = 16;
// Look-ups whose slots are fetched ahead: enough to cover a memory access of 100 ns at some 10 ns per look-up.
constexpr std::size_t kPrefetchDistance = 16;

using Word = std::atomic<std::uint64_t>;
using Version = std::atomic<std::uint32_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 8);
static_assert(Version::is_always_lock_free && sizeof(Version) == 4);
static_assert(std::endian::native == std::endian::little);

struct Header {
  Word magic;  // written last
  std::uint32_t layout_version;
  std::uint32_t chunk_capacity;
  std::uint32_t slot_count;
  std::uint32_t reserved;
  std::uint64_t generation;
  // Counts entries that were moved. A look-up that came by while an entry moved may have missed it at both places; it
  // sees the count changed and looks again. On a line of its own, since the writer changes it often.
  alignas(kLineBytes) Word moves;
};
static_assert(sizeof(Header) <= kHeaderBytes);

// key is the fingerprint, 0 in an empty slot; place says where the block is, 0 while the slot changes its key. The
// writer sets place to 0 before it changes key and writes the new place after it, so that a reader that sees the same
// key and place around other loads has seen one entry. Pointing an entry elsewhere is one store to place.
struct Slot {
  Word key;
  Word place;
};
static_assert(sizeof(Slot) == 16);

constexpr std::uint64_t kNoPlace = 0;
constexpr std::uint64_t kNoFingerprint = 0;

std::uint64_t place_of(std::uint32_t chunk, std::uint16_t block) {
  return (std::uint64_t{chunk} + 1) | std::uint64_t{block} << 48;
}
std::uint64_t chunk_of(std::uint64_t place) { return (place & 0xffff'ffff'ffffULL) - 1; }
std::uint16_t block_of(std::uint64_t place) { return static_cast<std::uint16_t>(place >> 48); }

void overwrite(Slot& slot, std::uint64_t fingerprint, std::uint64_t place) {
  slot.place.store(kNoPlace, std::memory_order_release);
  slot.key.store(fingerprint, std::memory_order_release);
  slot.place.store(place, std::memory_order_release);
}

std::size_t versions_bytes(std::uint32_t chunk_capacity) {
  const std::size_t bytes = std::size_t{chunk_capacity} * sizeof(Version);
  return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
}

std::size_t total_bytes(std::uint32_t chunk_capacity, std::uint32_t slot_count) {
  return kHeaderBytes + versions_bytes(chunk_capacity) + std::size_t{slot_count} * sizeof(Slot);
}

bool sizes_make_sense(std::uint32_t chunk_capacity, std::uint32_t slot_count) {
  return chunk_capacity > 0 && slot_count >= 4 && std::has_single_bit(slot_count);
}

bool is_aligned(const void* memory) { return reinterpret_cast<std::uintptr_t>(memory) % kLineBytes == 0; }

// Byte is std::byte or const std::byte.
template <typename Byte, typename T>
using SameConst = std::conditional_t<std::is_const_v<Byte>, const T, T>;

template <typename Byte>
SameConst<Byte, Header>& header_at(Byte* base) {
  return *reinterpret_cast<SameConst<Byte, Header>*>(base);
}
template <typename Byte>
SameConst<Byte, Version>* versions_at(Byte* base) {
  return reinterpret_cast<SameConst<Byte, Version>*>(base + kHeaderBytes);
}
template <typename Byte>
SameConst<Byte, Slot>* slots_at(Byte* base, std::uint32_t chunk_capacity) {
  return reinterpret_cast<SameConst<Byte, Slot>*>(base + kHeaderBytes + versions_bytes(chunk_capacity));
}

constexpr bool is_live_version(std::uint32_t version) { return version % 2 == 0; }

struct Found {
  std::size_t at = 0;
  std::uint64_t place = kNoPlace;  // kNoPlace: nowhere
};

Found probe(const Slot* slots, std::uint32_t slot_count, std::uint64_t fingerprint) {
  const std::size_t mask = slot_count - 1;
  std::size_t at = fingerprint & mask;
  for (std::size_t step = 0, end = std::min<std::size_t>(kMaxProbe, slot_count); step < end; ++step) {
    const std::uint64_t key = slots[at].key.load(std::memory_order_acquire);
    if (key == kNoFingerprint) break;
    if (key == fingerprint) {
      // Without a place the entry is being moved here: it is still whole further along.
      const std::uint64_t place = slots[at].place.load(std::memory_order_acquire);
      if (place != kNoPlace) return {at, place};
    }
    at = (at + 1) & mask;
  }
  return {};
}

}  // namespace

std::size_t block_index_bytes(const BlockIndexConfig& config) {
  return total_bytes(config.chunk_capacity, config.slot_count);
}

std::optional<BlockIndexReader> BlockIndexReader::attach(std::span<const std::byte> memory) {
  if (memory.size() < kHeaderBytes || !is_aligned(memory.data())) return std::nullopt;
  const Header& header = header_at(memory.data());
  if (header.magic.load(std::memory_order_acquire) != kMagic || header.layout_version != kLayoutVersion) {
    return std::nullopt;
  }
  BlockIndexReader reader;
  reader.base_ = memory.data();
  reader.chunk_capacity_ = header.chunk_capacity;
  reader.slot_count_ = header.slot_count;
  if (!sizes_make_sense(reader.chunk_capacity_, reader.slot_count_) ||
      total_bytes(reader.chunk_capacity_, reader.slot_count_) > memory.size()) {
    return std::nullopt;
  }
  return reader;
}

std::optional<BlockIndexHit> BlockIndexReader::find(std::uint64_t fingerprint) const {
  const Word& moves = header_at(base_).moves;
  const Slot* slots = slots_at(base_, chunk_capacity_);
  const Version* versions = versions_at(base_);
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    const std::uint64_t moves_before = moves.load(std::memory_order_acquire);
    const Found found = probe(slots, slot_count_, fingerprint);
    if (found.place == kNoPlace) {
      if (moves.load(std::memory_order_acquire) == moves_before) return std::nullopt;
      continue;
    }
    const std::uint64_t chunk = chunk_of(found.place);
    if (chunk >= chunk_capacity_) return std::nullopt;
    const std::uint32_t version = versions[chunk].load(std::memory_order_acquire);
    // Read again: when the slot still says the same, the place is this fingerprint's, and the version is one of the
    // chunk that it means, not of another that took over the number in between.
    const Slot& slot = slots[found.at];
    if (slot.key.load(std::memory_order_acquire) != fingerprint ||
        slot.place.load(std::memory_order_acquire) != found.place) {
      continue;
    }
    if (!is_live_version(version)) return std::nullopt;
    return BlockIndexHit{static_cast<std::uint32_t>(chunk), version, block_of(found.place)};
  }
  return std::nullopt;
}

std::size_t BlockIndexReader::find_leading(std::span<const std::uint64_t> fingerprints,
                                           std::span<BlockIndexHit> hits) const {
  const Slot* slots = slots_at(base_, chunk_capacity_);
  const std::size_t mask = slot_count_ - 1;
  const std::size_t count = std::min(fingerprints.size(), hits.size());
  const auto prefetch = [&](std::size_t i) { __builtin_prefetch(&slots[fingerprints[i] & mask]); };
  for (std::size_t i = 0; i < std::min(kPrefetchDistance, count); ++i) prefetch(i);
  for (std::size_t i = 0; i < count; ++i) {
    if (i + kPrefetchDistance < count) prefetch(i + kPrefetchDistance);
    const auto hit = find(fingerprints[i]);
    if (!hit) return i;
    hits[i] = *hit;
  }
  return count;
}

bool BlockIndexReader::still_valid(const BlockIndexHit& hit) const {
  if (hit.chunk >= chunk_capacity_ || !is_live_version(hit.version)) return false;
  return versions_at(base_)[hit.chunk].load(std::memory_order_seq_cst) == hit.version;
}

std::uint64_t BlockIndexReader::generation() const { return header_at(base_).generation; }

BlockIndexWriter::BlockIndexWriter(std::span<std::byte> memory, const BlockIndexConfig& config)
    : base_(memory.data()), chunk_capacity_(config.chunk_capacity), slot_count_(config.slot_count) {
  if (!sizes_make_sense(chunk_capacity_, slot_count_)) {
    throw std::invalid_argument(
        "block index: slot_count must be a power of two, at least 4, and chunk_capacity above 0");
  }
  const std::size_t bytes = block_index_bytes(config);
  if (memory.size() < bytes || !is_aligned(memory.data())) {
    throw std::invalid_argument("block index: needs " + std::to_string(bytes) + " bytes at a multiple of 64");
  }
  Header& header = header_at(base_);
  header.magic.store(0);
  header.layout_version = kLayoutVersion;
  header.chunk_capacity = chunk_capacity_;
  header.slot_count = slot_count_;
  header.reserved = 0;
  header.generation = config.generation;
  header.moves.store(0);
  Version* versions = versions_at(base_);
  for (std::uint32_t i = 0; i < chunk_capacity_; ++i) versions[i].store(1, std::memory_order_relaxed);
  Slot* slots = slots_at(base_, chunk_capacity_);
  for (std::uint32_t i = 0; i < slot_count_; ++i) {
    slots[i].key.store(0, std::memory_order_relaxed);
    slots[i].place.store(0, std::memory_order_relaxed);
  }
  header.magic.store(kMagic, std::memory_order_release);
}

bool BlockIndexWriter::put(std::uint64_t fingerprint, std::uint32_t chunk, std::uint16_t block_in_chunk) {
  Slot* slots = slots_at(base_, chunk_capacity_);
  const std::uint64_t place = place_of(chunk, block_in_chunk);
  if (const Found found = probe(slots, slot_count_, fingerprint); found.place != kNoPlace) {
    slots[found.at].place.store(place, std::memory_order_release);
    return true;
  }
  if (used_slots_ >= slot_limit()) return false;
  const std::size_t mask = slot_count_ - 1;
  std::size_t at = fingerprint & mask;
  for (std::size_t step = 0, end = std::min<std::size_t>(kMaxProbe, slot_count_); step < end; ++step) {
    if (slots[at].key.load(std::memory_order_relaxed) == kNoFingerprint) {
      overwrite(slots[at], fingerprint, place);
      ++used_slots_;
      return true;
    }
    at = (at + 1) & mask;
  }
  return false;
}

bool BlockIndexWriter::erase(std::uint64_t fingerprint, std::uint32_t chunk) {
  Slot* slots = slots_at(base_, chunk_capacity_);
  const Found found = probe(slots, slot_count_, fingerprint);
  if (found.place == kNoPlace || chunk_of(found.place) != chunk) return false;
  // No tombstones: what follows in the run moves up, so that runs are never longer than their live entries make them.
  // An entry is complete at its new place, and the move counted, before its old place is overwritten.
  Word& moves = header_at(base_).moves;
  const std::size_t mask = slot_count_ - 1;
  std::size_t hole = found.at;
  for (std::size_t at = (hole + 1) & mask;; at = (at + 1) & mask) {
    const std::uint64_t key = slots[at].key.load(std::memory_order_relaxed);
    if (key == kNoFingerprint) break;
    const bool may_move = ((at - (key & mask)) & mask) >= ((at - hole) & mask);  // its home is not after the hole
    if (!may_move) continue;
    overwrite(slots[hole], key, slots[at].place.load(std::memory_order_relaxed));
    moves.store(moves.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    hole = at;
  }
  overwrite(slots[hole], kNoFingerprint, kNoPlace);
  --used_slots_;
  return true;
}

std::optional<BlockIndexHit> BlockIndexWriter::find(std::uint64_t fingerprint) const {
  const Found found = probe(slots_at(base_, chunk_capacity_), slot_count_, fingerprint);
  if (found.place == kNoPlace) return std::nullopt;
  const auto chunk = static_cast<std::uint32_t>(chunk_of(found.place));
  return BlockIndexHit{chunk, versions_at(base_)[chunk].load(std::memory_order_relaxed), block_of(found.place)};
}

// Versions: even is live, odd is not. A life goes 2k (live), 2k+1 (dying), 2k+3 (free), 2k+4 (live again).

std::uint32_t BlockIndexWriter::make_live(std::uint32_t chunk) {
  return versions_at(base_)[chunk].fetch_add(1, std::memory_order_acq_rel) + 1;
}

void BlockIndexWriter::begin_retire(std::uint32_t chunk) {
  versions_at(base_)[chunk].fetch_add(1, std::memory_order_seq_cst);
}

void BlockIndexWriter::cancel_retire(std::uint32_t chunk) {
  versions_at(base_)[chunk].fetch_sub(1, std::memory_order_acq_rel);
}

void BlockIndexWriter::finish_retire(std::uint32_t chunk) {
  versions_at(base_)[chunk].fetch_add(2, std::memory_order_acq_rel);
}

bool BlockIndexWriter::is_live(std::uint32_t chunk) const {
  return is_live_version(versions_at(base_)[chunk].load(std::memory_order_relaxed));
}

std::size_t BlockIndexWriter::slot_limit() const { return std::size_t{slot_count_} / 4 * 3; }

BlockIndexReader BlockIndexWriter::reader() const {
  BlockIndexReader reader;
  reader.base_ = base_;
  reader.chunk_capacity_ = chunk_capacity_;
  reader.slot_count_ = slot_count_;
  return reader;
}

}  // namespace kvern
