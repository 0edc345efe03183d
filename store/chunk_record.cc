#include "store/chunk_record.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <utility>

#include "kernels/container_layout.h"

namespace kvern {
namespace {

using Interval = std::pair<std::uint64_t, std::uint64_t>;  // [first, second)

Interval layers_of(const ShardRange& range) {
  return {range.layer_begin, std::uint64_t{range.layer_begin} + range.layers};
}
Interval heads_of(const ShardRange& range) { return {range.head_begin, std::uint64_t{range.head_begin} + range.heads}; }

bool contains(const Interval& outer, const Interval& inner) {
  return outer.first <= inner.first && inner.second <= outer.second;
}

bool covered_by(std::vector<Interval> parts, const Interval& whole) {
  std::sort(parts.begin(), parts.end());
  std::uint64_t reached = whole.first;
  for (const auto& part : parts) {
    if (part.first > reached) break;
    reached = std::max(reached, part.second);
  }
  return reached >= whole.second;
}

Status invalid(std::string message) { return {Code::kInvalid, "container info: " + std::move(message)}; }

}  // namespace

const ChunkFamily* FamilyTable::acquire(ChunkFamily family) {
  const auto it = references_.try_emplace(std::move(family), 0).first;
  ++it->second;
  return &it->first;
}

void FamilyTable::release(const ChunkFamily* family) {
  const auto it = references_.find(*family);
  if (--it->second == 0) references_.erase(it);
}

bool FamilyTable::has_namespace(const NamespaceId& namespace_id) const {
  ChunkFamily least;
  least.namespace_id = namespace_id;
  const auto first = references_.lower_bound(least);
  return first != references_.end() && first->first.namespace_id == namespace_id;
}

ShardRange ShardRange::of(const ShardShape& shape) {
  const auto narrow = [](std::uint32_t number) {
    return static_cast<std::uint16_t>(std::min(number, kMaxLayersOrHeads));
  };
  return {narrow(shape.layer_begin), narrow(shape.layers), narrow(shape.head_begin), narrow(shape.heads)};
}

ShardList& ShardList::operator=(ShardList&& other) noexcept {
  if (this == &other) return *this;
  clear();
  here_ = other.here_;
  size_ = std::exchange(other.size_, 0);
  return *this;
}

// The array holds a power of two.
void ShardList::push_back(const ShardRecord& shard) {
  if (size_ == 0) {
    std::construct_at(&here_.one, shard);
  } else if (std::has_single_bit(size_)) {
    auto* const larger = new ShardRecord[std::size_t{2} * size_];
    std::copy(begin(), end(), larger);
    larger[size_] = shard;
    const std::uint32_t size = size_;
    clear();
    here_.several = larger;
    size_ = size;
  } else {
    here_.several[size_] = shard;
  }
  ++size_;
}

void ShardList::clear() {
  if (size_ > 1) delete[] here_.several;
  size_ = 0;
}

const std::uint8_t* find_block_names(std::span<const std::byte> container, std::string_view codec_spec,
                                     std::span<const BlockHash> blocks) {
  const std::size_t begin = block_hashes_offset(codec_spec);
  const std::size_t hash_bytes = blocks.front().size();
  const std::size_t bytes = blocks.size() * (1 + hash_bytes);
  if (container.size() < begin || container.size() - begin < bytes) return nullptr;
  const auto* const names = reinterpret_cast<const std::uint8_t*>(container.data()) + begin;
  for (std::size_t block = 0; block < blocks.size(); ++block) {
    const std::uint8_t* const name = names + block * (1 + hash_bytes);
    if (*name != hash_bytes || std::memcmp(name + 1, blocks[block].bytes().data(), hash_bytes) != 0) {
      return nullptr;
    }
  }
  return names;
}

ChunkKey ChunkRecord::key() const {
  return {family->namespace_id, family->group, BlockHash(hash(blocks - std::size_t{1}))};
}

std::vector<BlockHash> ChunkRecord::block_hashes() const {
  std::vector<BlockHash> all;
  all.reserve(blocks);
  for (std::size_t block = 0; block < blocks; ++block) all.emplace_back(hash(block));
  return all;
}

std::uint64_t ChunkRecord::encoded_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& shard : shards) bytes += shard.extent.bytes;
  return bytes;
}

std::uint64_t ChunkRecord::raw_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& shard : shards) bytes += shard.raw_bytes;
  return bytes;
}

bool ChunkRecord::has_block(std::size_t block, const BlockHash& hash_of_block) const {
  return block < blocks && std::ranges::equal(hash(block), hash_of_block.bytes());
}

bool ChunkRecord::shares_start_with(const ContainerInfo& info) const {
  if (!belongs_to(info.key.namespace_id, info.key.group) || position != info.position) return false;
  const std::size_t common = std::min<std::size_t>(blocks, info.block_hashes.size());
  for (std::size_t block = 0; block < common; ++block) {
    if (!has_block(block, info.block_hashes[block])) return false;
  }
  return true;
}

Status ChunkRecord::check_same_chunk(const ContainerInfo& info) const {
  if (info.block_hashes.size() != blocks || !shares_start_with(info) || info.block_tokens != family->block_tokens ||
      info.group_layers != family->group_layers || info.model_heads != family->model_heads) {
    return invalid("it disagrees with another shard of " + key().to_string());
  }
  return Status::ok();
}

bool ChunkRecord::covers(const ShardRange& range) const {
  const Interval layers = layers_of(range);
  const Interval heads = heads_of(range);
  for (const auto& shard : shards) {
    if (contains(layers_of(shard.range), layers) && contains(heads_of(shard.range), heads)) return true;
  }
  // Between two neighbouring cuts every shard holds all layers or none.
  std::vector<std::uint64_t> cuts{layers.first, layers.second};
  for (const auto& shard : shards) {
    for (const auto cut : {layers_of(shard.range).first, layers_of(shard.range).second}) {
      if (cut > layers.first && cut < layers.second) cuts.push_back(cut);
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    std::vector<Interval> parts;
    for (const auto& shard : shards) {
      if (contains(layers_of(shard.range), {cuts[i], cuts[i + 1]})) parts.push_back(heads_of(shard.range));
    }
    if (!covered_by(std::move(parts), heads)) return false;
  }
  return true;
}

bool ChunkRecord::is_complete() const {
  ShardShape whole;
  whole.layers = family->group_layers;
  whole.heads = family->model_heads;
  return covers(ShardRange::of(whole));
}

Status check_container_info(const ContainerInfo& info) {
  const std::size_t blocks = info.block_hashes.size();
  if (blocks == 0 || blocks > kMaxBlocksPerChunk) {
    return invalid("a chunk has 1 to " + std::to_string(kMaxBlocksPerChunk) + " blocks, not " + std::to_string(blocks));
  }
  for (const auto& hash : info.block_hashes) {
    if (hash.size() == 0 || hash.size() != info.block_hashes[0].size()) {
      return invalid("block hashes must have one length above 0");
    }
  }
  if (!(info.block_hashes.back() == info.key.last_block)) return invalid("the key is not that of the last block");
  if (info.block_tokens == 0 || std::uint64_t{info.block_tokens} * blocks != info.shape.tokens) {
    return invalid(std::to_string(blocks) + " blocks of " + std::to_string(info.block_tokens) + " tokens do not make " +
                   std::to_string(info.shape.tokens) + " tokens");
  }
  if (info.group_layers > kMaxLayersOrHeads || info.model_heads > kMaxLayersOrHeads) {
    return invalid("a model has at most " + std::to_string(kMaxLayersOrHeads) + " layers and heads");
  }
  const ShardShape& shape = info.shape;
  if (shape.layers == 0 || shape.heads == 0 || std::uint64_t{shape.layer_begin} + shape.layers > info.group_layers ||
      std::uint64_t{shape.head_begin} + shape.heads > info.model_heads) {
    return invalid("the shard's layers or heads lie outside the model's");
  }
  return Status::ok();
}

}  // namespace kvern
