#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/keys.h"
#include "store/region_format.h"
#include "store/tier.h"

namespace kvern {

/// Which objects a log holds: every block hash -> object, in about 64 bytes per object and 16 per block (what the
/// vectors of open regions hold in reserve comes on top). Not thread-safe.
///
/// Blocks are known by 40 bits of their fingerprint. An answer rests on more: namespace and group are compared, the
/// last block of an object in full, and all blocks of the query up to the one that was found by their 40 bits. What is
/// left is for the reader of the containers, which name their blocks.
class ObjectIndex {
 public:
  /// A region has at most this many objects, and a log this many regions.
  static constexpr std::size_t kMostObjects = 1U << 16;
  static constexpr std::size_t kMostRegions = (1U << 16) - 1;

  struct Location {
    std::uint32_t region = 0;
    std::uint32_t page = 0;
    std::uint32_t pages = 0;
    std::uint64_t first_page_checksum = 0;
    bool operator==(const Location&) const = default;
  };

  explicit ObjectIndex(std::size_t regions);

  /// Takes the place of what is known under the same key, and of a shorter object that ends in one of its blocks. The
  /// region has fewer than kMostObjects.
  void insert(std::uint32_t region, const LogEntry& object);
  /// The longest object known for the leading blocks; bytes == 0: none.
  TierHit find(const CellQuery& query) const;
  std::optional<Location> locate(const ChunkKey& key) const;
  bool erase(const ChunkKey& key);
  /// Marks the object as read since it was written.
  void touch(const ChunkKey& key);
  bool touched(const ChunkKey& key) const;

  /// Number of objects ever inserted into the region, gone ones too.
  std::size_t inserted(std::uint32_t region) const { return regions_[region].objects.size(); }
  /// Those numbered [begin, begin + count) in the region, of one namespace (nullopt: of all), are no longer known.
  void erase_range(std::uint32_t region, std::size_t begin, std::size_t count,
                   const std::optional<NamespaceId>& namespace_id);
  /// The known ones of them, of these namespaces.
  std::vector<TierHit> list(std::uint32_t region, std::size_t begin, std::size_t count,
                            const NamespaceSet& namespaces) const;
  /// All namespaces that ever had an object here.
  std::span<const NamespaceId> namespaces() const { return namespaces_; }
  /// The region gets no more objects until it is cleared: gives reserves back.
  void close(std::uint32_t region);
  /// Forgets the numbering, too. All its objects were erased.
  void clear(std::uint32_t region);

  std::uint64_t objects() const { return objects_; }
  std::uint64_t bytes() const { return pages_ * kBlockAlignment; }
  std::uint64_t memory_bytes() const;

 private:
  struct Tag {
    std::uint32_t low = 0;
    std::uint8_t shard = 0;
    bool operator==(const Tag&) const = default;
  };
  struct Slot {
    std::uint32_t low = 0;
    std::uint16_t region = kNoRegion;
    std::uint16_t object = 0;
  };
  // Small tables grow at different times and by little each, so that no call takes long and little lies empty.
  struct Shard {
    std::vector<Slot> slots;
    std::size_t used = 0;
  };
  struct Object {
    std::array<std::uint8_t, 32> last_block{};  ///< a longer one lies in Region::long_hashes
    std::uint64_t first_page_checksum = 0;
    std::uint32_t page = 0;
    std::uint32_t pages = 0;
    std::uint32_t first_tag = 0;  ///< in Region::tags
    std::uint32_t namespace_number = 0;
    std::uint16_t blocks = 0;
    std::uint16_t group = 0;
    std::uint8_t last_block_bytes = 0;
    bool known : 1 = false;
    bool touched : 1 = false;
  };
  static_assert(sizeof(Object) == 64);
  struct Region {
    std::vector<Object> objects;
    std::vector<std::uint32_t> tags;
    std::vector<std::uint8_t> tag_shards;
    std::unordered_map<std::uint16_t, BlockHash> long_hashes;
  };
  static constexpr std::uint16_t kNoRegion = 0xffff;

  static Tag tag_of(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& block);
  static Tag tag_at(const Region& region, std::size_t index);
  std::optional<std::uint32_t> namespace_number(const NamespaceId& namespace_id) const;
  const Slot* look_up(const Tag& tag) const;
  void prefetch(const Tag& tag) const;
  void put(const Tag& tag, std::uint16_t region, std::uint16_t object);
  void remove(const Tag& tag, std::uint16_t region, std::uint16_t object);
  static void place(Shard& shard, const Slot& slot);
  static void grow(Shard& shard);
  const Slot* find_object(const ChunkKey& key) const;
  BlockHash last_block(const Region& region, std::size_t object) const;
  void forget(std::uint16_t region, std::uint16_t object);

  std::vector<Shard> shards_;
  std::vector<Region> regions_;
  std::vector<NamespaceId> namespaces_;
  std::unordered_map<NamespaceId, std::uint32_t> namespace_numbers_;
  std::uint64_t objects_ = 0;
  std::uint64_t pages_ = 0;
};

}  // namespace kvern
