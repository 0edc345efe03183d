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
// How often a look-up that the writer disturbed starts again before it counts as a miss.
constexpr int kMaxRetries = 16;
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
  // Odd while an occupied slot is being moved or pointed elsewhere, so that a look-up that came by at that moment and
  // found nothing knows that it must look again. On a line of its own, since the writer changes it often.
  alignas(kLineBytes) Word changes;
};
static_assert(sizeof(Header) <= kHeaderBytes);

// An empty slot is (0, 0). Otherwise the second word says where the block is, and the first is the fingerprint XOR the
// second: two words that do not belong together yield some other fingerprint, so that a torn read is a miss.
struct Slot {
  Word key;
  Word place;
};
static_assert(sizeof(Slot) == 16);

struct SlotValue {
  std::uint64_t key = 0;
  std::uint64_t place = 0;
  bool empty() const { return key == 0 && place == 0; }
  std::uint64_t fingerprint() const { return key ^ place; }
  std::uint32_t chunk() const { return static_cast<std::uint32_t>(place); }
  std::uint16_t block() const { return static_cast<std::uint16_t>(place >> 32); }
};

std::uint64_t place_of(std::uint32_t chunk, std::uint16_t block) { return chunk | std::uint64_t{block} << 32; }

SlotValue load(const Slot& slot) {
  return {slot.key.load(std::memory_order_acquire), slot.place.load(std::memory_order_acquire)};
}

void store(Slot& slot, std::uint64_t fingerprint, std::uint64_t place) {
  slot.key.store(fingerprint ^ place, std::memory_order_release);
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

// Where the fingerprint lies, or slot_count when it is nowhere.
std::size_t probe(const Slot* slots, std::uint32_t slot_count, std::uint64_t fingerprint, SlotValue& value) {
  const std::size_t mask = slot_count - 1;
  std::size_t at = fingerprint & mask;
  for (std::size_t step = 0, end = std::min<std::size_t>(kMaxProbe, slot_count); step < end; ++step) {
    value = load(slots[at]);
    if (value.empty()) break;
    if (value.fingerprint() == fingerprint) return at;
    at = (at + 1) & mask;
  }
  return slot_count;
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
  const Word& changes = header_at(base_).changes;
  const Slot* slots = slots_at(base_, chunk_capacity_);
  const Version* versions = versions_at(base_);
  for (int attempt = 0; attempt < kMaxRetries; ++attempt) {
    const std::uint64_t before = changes.load(std::memory_order_acquire);
    SlotValue value;
    const std::size_t at = probe(slots, slot_count_, fingerprint, value);
    if (at == slot_count_) {
      if (before % 2 == 0 && changes.load(std::memory_order_acquire) == before) return std::nullopt;
      continue;
    }
    if (value.chunk() >= chunk_capacity_) return std::nullopt;
    const std::uint32_t version = versions[value.chunk()].load(std::memory_order_acquire);
    // Read again: when the slot still says the same, the version is one of the chunk that the slot means, not of
    // another that took over its number in between.
    const SlotValue again = load(slots[at]);
    if (again.key != value.key || again.place != value.place) continue;
    if (!is_live_version(version)) return std::nullopt;
    return BlockIndexHit{value.chunk(), version, value.block()};
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
  header.changes.store(0);
  Version* versions = versions_at(base_);
  for (std::uint32_t i = 0; i < chunk_capacity_; ++i) versions[i].store(1, std::memory_order_relaxed);
  Slot* slots = slots_at(base_, chunk_capacity_);
  for (std::uint32_t i = 0; i < slot_count_; ++i) {
    slots[i].key.store(0, std::memory_order_relaxed);
    slots[i].place.store(0, std::memory_order_relaxed);
  }
  header.magic.store(kMagic, std::memory_order_release);
}

void BlockIndexWriter::begin_change() {
  Word& changes = header_at(base_).changes;
  changes.store(changes.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

void BlockIndexWriter::end_change() {
  Word& changes = header_at(base_).changes;
  changes.store(changes.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

bool BlockIndexWriter::put(std::uint64_t fingerprint, std::uint32_t chunk, std::uint16_t block_in_chunk) {
  Slot* slots = slots_at(base_, chunk_capacity_);
  const std::uint64_t place = place_of(chunk, block_in_chunk);
  SlotValue value;
  const std::size_t found = probe(slots, slot_count_, fingerprint, value);
  if (found < slot_count_) {
    begin_change();
    store(slots[found], fingerprint, place);
    end_change();
    return true;
  }
  if (used_slots_ >= slot_limit()) return false;
  const std::size_t mask = slot_count_ - 1;
  std::size_t at = fingerprint & mask;
  for (std::size_t step = 0, end = std::min<std::size_t>(kMaxProbe, slot_count_); step < end; ++step) {
    if (load(slots[at]).empty()) {
      store(slots[at], fingerprint, place);
      ++used_slots_;
      return true;
    }
    at = (at + 1) & mask;
  }
  return false;
}

bool BlockIndexWriter::erase(std::uint64_t fingerprint, std::uint32_t chunk) {
  Slot* slots = slots_at(base_, chunk_capacity_);
  SlotValue value;
  std::size_t hole = probe(slots, slot_count_, fingerprint, value);
  if (hole == slot_count_ || value.chunk() != chunk) return false;
  // No tombstones: what follows in the run moves up, so that runs never grow longer than their live entries make them.
  const std::size_t mask = slot_count_ - 1;
  begin_change();
  for (std::size_t at = (hole + 1) & mask;; at = (at + 1) & mask) {
    const SlotValue next = load(slots[at]);
    if (next.empty()) break;
    const std::size_t home = next.fingerprint() & mask;
    const bool reaches_hole = ((at - home) & mask) >= ((at - hole) & mask);
    if (!reaches_hole) continue;
    store(slots[hole], next.fingerprint(), next.place);
    hole = at;
  }
  slots[hole].key.store(0, std::memory_order_release);
  slots[hole].place.store(0, std::memory_order_release);
  end_change();
  --used_slots_;
  return true;
}

std::optional<BlockIndexHit> BlockIndexWriter::find(std::uint64_t fingerprint) const {
  SlotValue value;
  if (probe(slots_at(base_, chunk_capacity_), slot_count_, fingerprint, value) == slot_count_) return std::nullopt;
  return BlockIndexHit{value.chunk(), versions_at(base_)[value.chunk()].load(std::memory_order_relaxed), value.block()};
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
