#pragma once

#include <cstdint>
#include <utility>

#include "base/keys.h"
#include "store/chunk_store.h"

namespace kvern {

/// A chunk that stays where it is. Whoever holds it last unpins the chunk.
class Lease {
 public:
  Lease(ChunkStore& store, PinnedChunk chunk, NamespaceId namespace_id, std::uint16_t group, BlockHash block)
      : store_(store), chunk_(std::move(chunk)), namespace_id_(namespace_id), group_(group), block_(block) {}
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease() { store_.unpin(chunk_.pin); }
  const PinnedChunk& chunk() const { return chunk_; }
  const NamespaceId& namespace_id() const { return namespace_id_; }
  std::uint16_t group() const { return group_; }
  const BlockHash& block() const { return block_; }

 private:
  ChunkStore& store_;
  PinnedChunk chunk_;
  NamespaceId namespace_id_;
  std::uint16_t group_;
  BlockHash block_;
};

}  // namespace kvern
