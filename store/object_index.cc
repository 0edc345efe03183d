#include "store/object_index.h"

#include <algorithm>
#include <utility>

namespace kvern {
namespace {

constexpr std::size_t kShards = 256;
constexpr std::size_t kSmallestShard = 16;
// 85 % full at most, and a quarter larger when that is reached: 10.5 bytes for an entry of 8 on average. Linear probing
// then looks at 4 slots for a hit and 22 for a miss on average when it is fullest, all within a few cache lines.
constexpr std::size_t load_limit(std::size_t slots) { return slots * 85 / 100; }

std::size_t home_of(std::uint32_t low, std::size_t slots) {
  return static_cast<std::size_t>((std::uint64_t{low} * slots) >> 32);
}

}  // namespace

ObjectIndex::ObjectIndex(std::size_t regions) : shards_(kShards), regions_(regions) {}

ObjectIndex::Tag ObjectIndex::tag_of(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& block) {
  const std::uint64_t fingerprint = block_fingerprint(namespace_id, group, block.bytes());
  return {static_cast<std::uint32_t>(fingerprint), static_cast<std::uint8_t>(fingerprint >> 56)};
}

ObjectIndex::Tag ObjectIndex::tag_at(const Region& region, std::size_t index) {
  return {region.tags[index], region.tag_shards[index]};
}

std::optional<std::uint32_t> ObjectIndex::namespace_number(const NamespaceId& namespace_id) const {
  const auto found = namespace_numbers_.find(namespace_id);
  if (found == namespace_numbers_.end()) return std::nullopt;
  return found->second;
}

BlockHash ObjectIndex::last_block(const Region& region, std::size_t object) const {
  const Object& entry = region.objects[object];
  if (entry.last_block_bytes > entry.last_block.size()) {
    return region.long_hashes.at(static_cast<std::uint16_t>(object));
  }
  return BlockHash(std::span(entry.last_block).first(entry.last_block_bytes));
}

// The slots of the blocks of one object lie apart: their memory is fetched at once rather than one after another.
void ObjectIndex::prefetch(const Tag& tag) const {
  const Shard& shard = shards_[tag.shard];
  if (shard.used > 0) __builtin_prefetch(&shard.slots[home_of(tag.low, shard.slots.size())]);
}

const ObjectIndex::Slot* ObjectIndex::look_up(const Tag& tag) const {
  const Shard& shard = shards_[tag.shard];
  if (shard.used == 0) return nullptr;
  std::size_t at = home_of(tag.low, shard.slots.size());
  while (shard.slots[at].region != kNoRegion) {
    if (shard.slots[at].low == tag.low) return &shard.slots[at];
    at = at + 1 == shard.slots.size() ? 0 : at + 1;
  }
  return nullptr;
}

void ObjectIndex::place(Shard& shard, const Slot& slot) {
  std::size_t at = home_of(slot.low, shard.slots.size());
  while (shard.slots[at].region != kNoRegion) at = at + 1 == shard.slots.size() ? 0 : at + 1;
  shard.slots[at] = slot;
}

void ObjectIndex::grow(Shard& shard) {
  const std::size_t size = std::max(kSmallestShard, shard.slots.size() * 5 / 4);
  std::vector<Slot> old(size);
  old.swap(shard.slots);
  for (const auto& slot : old) {
    if (slot.region != kNoRegion) place(shard, slot);
  }
}

void ObjectIndex::put(const Tag& tag, std::uint16_t region, std::uint16_t object) {
  Shard& shard = shards_[tag.shard];
  if (const Slot* const found = look_up(tag)) {
    const Slot former = *found;
    const Object& other = regions_[former.region].objects[former.object];
    shard.slots[static_cast<std::size_t>(found - shard.slots.data())] = {tag.low, region, object};
    // Nobody can ask for it by its key any more.
    const std::size_t last = std::size_t{other.first_tag} + other.blocks - 1U;
    const bool same = former.region == region && former.object == object;
    if (!same && other.known && tag_at(regions_[former.region], last) == tag) forget(former.region, former.object);
    return;
  }
  if (shard.used + 1 > load_limit(shard.slots.size())) grow(shard);
  place(shard, {tag.low, region, object});
  ++shard.used;
}

void ObjectIndex::remove(const Tag& tag, std::uint16_t region, std::uint16_t object) {
  Shard& shard = shards_[tag.shard];
  const Slot* const found = look_up(tag);
  if (found == nullptr || found->region != region || found->object != object) return;
  // Moves up what could not lie nearer to its home because of this one.
  const std::size_t size = shard.slots.size();
  auto hole = static_cast<std::size_t>(found - shard.slots.data());
  for (std::size_t at = hole + 1 == size ? 0 : hole + 1; shard.slots[at].region != kNoRegion;
       at = at + 1 == size ? 0 : at + 1) {
    const std::size_t from_home = (at + size - home_of(shard.slots[at].low, size)) % size;
    const std::size_t from_hole = (at + size - hole) % size;
    if (from_home < from_hole) continue;
    shard.slots[hole] = shard.slots[at];
    hole = at;
  }
  shard.slots[hole] = Slot{};
  --shard.used;
}

void ObjectIndex::insert(std::uint32_t region_number, const LogEntry& entry) {
  Region& region = regions_[region_number];
  const auto number = static_cast<std::uint16_t>(region.objects.size());
  const auto [found, is_new] =
      namespace_numbers_.try_emplace(entry.namespace_id, static_cast<std::uint32_t>(namespaces_.size()));
  if (is_new) namespaces_.push_back(entry.namespace_id);
  const BlockHash& last = entry.blocks.back();
  Object object;
  if (last.size() > object.last_block.size()) {
    region.long_hashes.emplace(number, last);
  } else {
    std::ranges::copy(last.bytes(), object.last_block.begin());
  }
  object.first_page_checksum = entry.first_page_checksum;
  object.page = entry.page;
  object.pages = entry.pages;
  object.first_tag = static_cast<std::uint32_t>(region.tags.size());
  object.blocks = static_cast<std::uint16_t>(entry.blocks.size());
  object.group = entry.group;
  object.namespace_number = found->second;
  object.last_block_bytes = static_cast<std::uint8_t>(last.size());
  object.known = true;
  region.objects.push_back(object);
  ++objects_;
  pages_ += entry.pages;
  for (const auto& block : entry.blocks) {
    const Tag tag = tag_of(entry.namespace_id, entry.group, block);
    region.tags.push_back(tag.low);
    region.tag_shards.push_back(tag.shard);
    prefetch(tag);
  }
  for (std::size_t i = 0; i < entry.blocks.size(); ++i) {
    put(tag_at(region, object.first_tag + i), static_cast<std::uint16_t>(region_number), number);
  }
}

TierHit ObjectIndex::find(const CellQuery& query) const {
  const auto number = namespace_number(query.namespace_id);
  if (!number) return {};
  std::vector<Tag> tags;
  tags.reserve(query.blocks.size());
  for (const auto& block : query.blocks) tags.push_back(tag_of(query.namespace_id, query.group, block));
  for (std::size_t last = tags.size(); last-- > 0;) {
    const Slot* const slot = look_up(tags[last]);
    if (slot == nullptr) continue;
    const Region& region = regions_[slot->region];
    const Object& object = region.objects[slot->object];
    if (object.namespace_number != *number || object.group != query.group || object.blocks <= last) continue;
    bool same = true;
    for (std::size_t i = 0; same && i <= last; ++i) same = tag_at(region, object.first_tag + i) == tags[i];
    const BlockHash block = last_block(region, slot->object);
    if (!same || (object.blocks == last + 1 && !(block == query.blocks[last]))) continue;
    return {{query.namespace_id, query.group, block},
            std::uint64_t{object.pages} * kBlockAlignment,
            static_cast<std::uint32_t>(last + 1)};
  }
  return {};
}

const ObjectIndex::Slot* ObjectIndex::find_object(const ChunkKey& key) const {
  const auto number = namespace_number(key.namespace_id);
  if (!number) return nullptr;
  const Slot* const slot = look_up(tag_of(key.namespace_id, key.group, key.last_block));
  if (slot == nullptr) return nullptr;
  const Region& region = regions_[slot->region];
  const Object& object = region.objects[slot->object];
  const bool same = object.namespace_number == *number && object.group == key.group &&
                    last_block(region, slot->object) == key.last_block;
  return same ? slot : nullptr;
}

std::optional<ObjectIndex::Location> ObjectIndex::locate(const ChunkKey& key) const {
  const Slot* const slot = find_object(key);
  if (slot == nullptr) return std::nullopt;
  const Object& object = regions_[slot->region].objects[slot->object];
  return Location{slot->region, object.page, object.pages, object.first_page_checksum};
}

bool ObjectIndex::erase(const ChunkKey& key) {
  const Slot* const slot = find_object(key);
  if (slot == nullptr) return false;
  forget(slot->region, slot->object);
  return true;
}

void ObjectIndex::touch(const ChunkKey& key) {
  if (const Slot* const slot = find_object(key)) regions_[slot->region].objects[slot->object].touched = true;
}

bool ObjectIndex::touched(const ChunkKey& key) const {
  const Slot* const slot = find_object(key);
  return slot != nullptr && regions_[slot->region].objects[slot->object].touched;
}

void ObjectIndex::forget(std::uint16_t region_number, std::uint16_t number) {
  Region& region = regions_[region_number];
  Object& object = region.objects[number];
  object.known = false;
  --objects_;
  pages_ -= object.pages;
  for (std::size_t i = 0; i < object.blocks; ++i) {
    remove(tag_at(region, object.first_tag + i), region_number, number);
  }
}

void ObjectIndex::erase_range(std::uint32_t region_number, std::size_t begin, std::size_t count,
                              const std::optional<NamespaceId>& namespace_id) {
  const auto wanted = namespace_id ? namespace_number(*namespace_id) : std::nullopt;
  if (namespace_id && !wanted) return;
  const Region& region = regions_[region_number];
  const std::size_t end = std::min(region.objects.size(), begin + count);
  for (std::size_t i = begin; i < end; ++i) {
    const Object& object = region.objects[i];
    if (!object.known || (wanted && object.namespace_number != *wanted)) continue;
    forget(static_cast<std::uint16_t>(region_number), static_cast<std::uint16_t>(i));
  }
}

std::vector<TierHit> ObjectIndex::list(std::uint32_t region_number, std::size_t begin, std::size_t count,
                                       const NamespaceSet& namespaces) const {
  std::vector<TierHit> hits;
  const Region& region = regions_[region_number];
  const std::size_t end = std::min(region.objects.size(), begin + count);
  for (std::size_t i = begin; i < end; ++i) {
    const Object& object = region.objects[i];
    const NamespaceId& namespace_id = namespaces_[object.namespace_number];
    if (!object.known || !namespaces.contains(namespace_id)) continue;
    hits.push_back({.key = {namespace_id, object.group, last_block(region, i)},
                    .bytes = std::uint64_t{object.pages} * kBlockAlignment,
                    .blocks = object.blocks});
  }
  return hits;
}

void ObjectIndex::close(std::uint32_t region_number) {
  Region& region = regions_[region_number];
  region.objects.shrink_to_fit();
  region.tags.shrink_to_fit();
  region.tag_shards.shrink_to_fit();
}

void ObjectIndex::clear(std::uint32_t region) { regions_[region] = Region{}; }

std::uint64_t ObjectIndex::memory_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& shard : shards_) bytes += shard.slots.capacity() * sizeof(Slot);
  for (const auto& region : regions_) {
    bytes += sizeof(Region) + region.objects.capacity() * sizeof(Object) +
             region.tags.capacity() * sizeof(std::uint32_t) + region.tag_shards.capacity() +
             region.long_hashes.size() * (sizeof(std::pair<std::uint16_t, BlockHash>) + 4 * sizeof(void*));
  }
  return bytes;
}

}  // namespace kvern
