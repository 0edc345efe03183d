#include "store/ancestry.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>

namespace kvern {
namespace {

std::uint32_t tag_of(const ChunkKey& key) { return block_tag(key.namespace_id, key.group, key.last_block.bytes()); }

}  // namespace

ChunkAncestry ChunkAncestry::of(const ContainerInfo& info, const BlockHash& block) {
  return {.key = info.key,
          .position = info.position,
          .end = info.position + info.shape.tokens,
          .previous_tag = info.previous_tag,
          .holds_block = std::ranges::find(info.block_hashes, block) != info.block_hashes.end()};
}

std::vector<bool> continue_prefix(std::span<const ChunkAncestry> chunks, const BlockHash& block) {
  std::vector<std::size_t> order(chunks.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::sort(order, {}, [&](std::size_t i) { return chunks[i].position; });
  std::map<NamespaceId, std::uint64_t> found_at;
  for (const std::size_t i : order) {
    if (chunks[i].holds_block) found_at.try_emplace(chunks[i].key.namespace_id, chunks[i].position);
  }
  // A chunk follows the last block of a full cell. The end beside the tag makes it 32 bits and a place that must agree.
  using End = std::tuple<NamespaceId, std::uint16_t, std::uint64_t, std::uint32_t>;
  std::map<End, bool> goes_at;
  std::vector<bool> goes(chunks.size());
  for (const std::size_t i : order) {
    const ChunkAncestry& chunk = chunks[i];
    const auto& [namespace_id, group, last_block] = chunk.key;
    const auto parent = goes_at.find({namespace_id, group, chunk.position, chunk.previous_tag});
    if (chunk.holds_block || block_tag(namespace_id, group, block.bytes()) == chunk.previous_tag) {
      goes[i] = true;
    } else if (parent != goes_at.end()) {
      goes[i] = parent->second;
    } else {
      const auto found = found_at.find(namespace_id);
      goes[i] = found != found_at.end() && chunk.position > found->second;
    }
    bool& at_end = goes_at[{namespace_id, group, chunk.end, tag_of(chunk.key)}];
    at_end = at_end || goes[i];
  }
  return goes;
}

}  // namespace kvern
