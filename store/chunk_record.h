#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/keys.h"
#include "base/status.h"
#include "kernels/container.h"
#include "store/chunk_store.h"

namespace kvern {

/// What the chunks of one namespace, group and codec have in common; kept once for all of them.
struct ChunkFamily {
  NamespaceId namespace_id;
  std::uint16_t group = 0;
  std::uint32_t block_tokens = 0;
  std::uint32_t group_layers = 0;
  std::uint32_t model_heads = 0;
  std::string codec_spec;
  auto operator<=>(const ChunkFamily&) const = default;
};

/// Families by value, counted. Not thread-safe.
class FamilyTable {
 public:
  /// Stays valid until as many release() calls as acquire() calls.
  const ChunkFamily* acquire(ChunkFamily family);
  void release(const ChunkFamily* family);
  bool has_namespace(const NamespaceId& namespace_id) const;

 private:
  std::map<ChunkFamily, std::uint64_t> references_;
};

/// The range of layers and heads that a shard covers: [layer_begin, layer_begin + layers) x [head_begin, ...). Models
/// have at most kMaxLayersOrHeads of either.
struct ShardRange {
  std::uint16_t layer_begin = 0;
  std::uint16_t layers = 0;
  std::uint16_t head_begin = 0;
  std::uint16_t heads = 0;
  bool operator==(const ShardRange&) const = default;

  /// Numbers that are too large, which check_container_info() refuses, are cut.
  static ShardRange of(const ShardShape& shape);
};

struct ShardRecord {
  Extent extent;
  ShardRange range;
  std::uint64_t raw_bytes = 0;
};

/// Mostly one shard, which lies here; several, one for each rank, lie in an array of their own. Move-only.
class ShardList {
 public:
  ShardList() = default;
  ShardList(ShardList&& other) noexcept : here_(other.here_), size_(std::exchange(other.size_, 0)) {}
  ShardList& operator=(ShardList&& other) noexcept;
  ~ShardList() { clear(); }

  void push_back(const ShardRecord& shard);
  std::size_t size() const { return size_; }
  const ShardRecord& operator[](std::size_t i) const { return begin()[i]; }
  const ShardRecord* begin() const { return size_ > 1 ? here_.several : &here_.one; }
  const ShardRecord* end() const { return begin() + size_; }

 private:
  void clear();

  union Here {
    ShardRecord one = {};
    ShardRecord* several;  ///< owned; once there is more than one
  } here_;
  std::uint32_t size_ = 0;
};

enum class ChunkState : std::uint8_t {
  kIncomplete,   ///< shards are missing; not in the index
  kLive,         ///< in the index and known to the eviction policy
  kLeaving,      ///< a longer chunk took over its blocks, or it was flushed; waits until nobody holds it, and can still
                 ///< be pinned by who claimed it before
  kQuarantined,  ///< corrupt or dropped; waits until nobody holds it
};

/// Where a container of this codec chain names its blocks, at least one, whose hashes have one length; nullptr when it
/// does not name these.
const std::uint8_t* find_block_names(std::span<const std::byte> container, std::string_view codec_spec,
                                     std::span<const BlockHash> blocks);

/// The store's private record of one chunk. Block hashes are kept once, in the chunk's first container.
struct ChunkRecord {
  const ChunkFamily* family = nullptr;  ///< null: the record is not in use
  const std::uint8_t* names = nullptr;  ///< find_block_names() of the first shard
  ShardList shards;
  std::uint64_t position = 0;
  std::uint32_t previous_tag = 0;
  std::uint32_t pins = 0;
  std::uint16_t blocks = 0;
  std::uint8_t hash_bytes = 0;
  ChunkState state = ChunkState::kIncomplete;
  std::uint8_t saved_in = 0;  ///< bit i: lower tier i has it too, as far as is known
  std::uint8_t lossy_generations = 0;
  std::uint8_t form = 0;  ///< counts the containers that replaced one another here
  bool charged = false;   ///< to the quota of its tenant

  std::span<const std::uint8_t> hash(std::size_t block) const {
    return {names + block * (1U + hash_bytes) + 1, hash_bytes};
  }
  std::uint64_t fingerprint(std::size_t block) const {
    return block_fingerprint(family->namespace_id, family->group, hash(block));
  }
  ChunkKey key() const;
  std::vector<BlockHash> block_hashes() const;
  std::uint32_t tokens() const { return blocks * family->block_tokens; }
  std::uint64_t encoded_bytes() const;
  std::uint64_t raw_bytes() const;

  bool belongs_to(const NamespaceId& namespace_id, std::uint16_t group) const {
    return family->namespace_id == namespace_id && family->group == group;
  }
  bool has_block(std::size_t block, const BlockHash& hash_of_block) const;
  /// The first blocks of both are the same, for as long as the shorter of the two goes.
  bool shares_start_with(const ContainerInfo& info) const;
  /// Whether the info is that of another shard of this very chunk; kInvalid with a sentence otherwise.
  Status check_same_chunk(const ContainerInfo& info) const;
  /// The shards of the record cover the range, together.
  bool covers(const ShardRange& range) const;
  bool is_complete() const;
};
static_assert(sizeof(ChunkRecord) == 80);

/// The largest number of blocks in a chunk and of shards under one key that the store accepts: far more than a chunk of
/// 256 tokens or a rank layout has, few enough that a hostile client cannot make bookkeeping slow.
inline constexpr std::size_t kMaxBlocksPerChunk = 4096;
inline constexpr std::size_t kMaxShardsPerChunk = 1024;
inline constexpr std::uint32_t kMaxLayersOrHeads = std::numeric_limits<std::uint16_t>::max();

/// What a container takes up in the slab, and in a chunk object of a lower tier: whole pages.
constexpr std::uint64_t padded_bytes(std::uint64_t container_bytes) {
  return (container_bytes + Slab::kAlignment - 1) / Slab::kAlignment * Slab::kAlignment;
}

/// Whether the store can keep a container that says this of itself; kInvalid with a sentence otherwise.
Status check_container_info(const ContainerInfo& info);

}  // namespace kvern
