#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace kvern {

/// The shared index: every block fingerprint -> (chunk, offset of the block in it), in memory that the daemon writes
/// and that clients map read-only. It is the one structure that both sides of the process boundary know, hence in
/// base/.
///
/// Memory layout (all little-endian, offsets from the start of the mapping):
///   Header (4096 bytes) | ChunkVersion[chunk_capacity] | Slot[slot_count]
///
/// Protocol of a protected hit (what makes a claim safe against eviction without asking the daemon):
///   reader:  find() -> hit (chunk, version even = live)
///            publish the chunk number in a hazard slot of its session (seq_cst store)
///            still_valid(hit) -> if true, the chunk cannot be freed while the hazard stands;
///                                if false, clear the hazard and look again: the block may have moved to a longer chunk
///   evictor: begin_retire(chunk)   version even -> odd (readers now miss), seq_cst
///            look at the hazards of all sessions (seq_cst loads)
///            hazard names the chunk -> cancel_retire(chunk) (version back);  else finish_retire(chunk) (stays odd)
/// A chunk number is reused only after finish_retire(), with a new version. All four steps are seq_cst operations
/// rather than fences, which ThreadSanitizer does not understand.

struct BlockIndexHit {
  std::uint32_t chunk = 0;           ///< number of the chunk in the chunk table
  std::uint32_t version = 0;         ///< even; the chunk's version when it was seen
  std::uint16_t block_in_chunk = 0;  ///< which block of the chunk, from 0
};

struct BlockIndexConfig {
  std::uint32_t chunk_capacity = 1U << 16;
  std::uint32_t slot_count = 1U << 20;  ///< power of two; at most 3/4 of it are used
  std::uint64_t generation = 0;         ///< the daemon's epoch: another value means another index
};

/// Bytes of shared memory that a configuration needs.
std::size_t block_index_bytes(const BlockIndexConfig& config);

/// Read side. Bounded probes and retries; safe under concurrent writers; never reads outside the mapping, whatever
/// the bytes say. Copyable view, owns nothing: the mapping must outlive it.
class BlockIndexReader {
 public:
  /// nullopt when magic, layout version or sizes do not fit the mapping.
  static std::optional<BlockIndexReader> attach(std::span<const std::byte> memory);

  /// A torn or disturbed look-up is repeated, and counts as a miss when that does not help. The hit is a hint until the
  /// chunk is protected and still_valid().
  std::optional<BlockIndexHit> find(std::uint64_t fingerprint) const;
  /// find() for several fingerprints with their memory prefetched; returns how many leading ones were found.
  /// hits[i] is filled for i below the returned count. hits.size() >= fingerprints.size().
  std::size_t find_leading(std::span<const std::uint64_t> fingerprints, std::span<BlockIndexHit> hits) const;
  /// True when the chunk is still live in the version of the hit. Call after publishing the hazard.
  bool still_valid(const BlockIndexHit& hit) const;
  std::uint64_t generation() const;

 private:
  friend class BlockIndexWriter;
  const std::byte* base_ = nullptr;
  std::uint32_t chunk_capacity_ = 0;
  std::uint32_t slot_count_ = 0;
};

/// Write side: one per daemon. Writers are serialised by the caller (the store's lock); readers need no lock.
class BlockIndexWriter {
 public:
  /// Formats the memory (zero-filled or not). Throws std::invalid_argument when it is too small.
  BlockIndexWriter(std::span<std::byte> memory, const BlockIndexConfig& config);

  /// Inserts, or points an existing fingerprint to another chunk. False when there is no room: 3/4 of the slots are
  /// used, or too many fingerprints have their home near this one's.
  bool put(std::uint64_t fingerprint, std::uint32_t chunk, std::uint16_t block_in_chunk);
  /// Removes the fingerprint if it points to this chunk; false otherwise.
  bool erase(std::uint64_t fingerprint, std::uint32_t chunk);
  /// Where the fingerprint points, for the daemon's own use.
  std::optional<BlockIndexHit> find(std::uint64_t fingerprint) const;

  /// Marks a chunk number as live (first publication): version becomes the next even number; returns it.
  std::uint32_t make_live(std::uint32_t chunk);
  void begin_retire(std::uint32_t chunk);   ///< live -> dying (seq_cst)
  void cancel_retire(std::uint32_t chunk);  ///< dying -> live in the same version
  void finish_retire(std::uint32_t chunk);  ///< dying -> free
  bool is_live(std::uint32_t chunk) const;

  std::size_t used_slots() const { return used_slots_; }
  std::size_t slot_limit() const;
  BlockIndexReader reader() const;

 private:
  std::byte* base_ = nullptr;
  std::uint32_t chunk_capacity_ = 0;
  std::uint32_t slot_count_ = 0;
  std::size_t used_slots_ = 0;
};

}  // namespace kvern
