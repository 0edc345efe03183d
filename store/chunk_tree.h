#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_set>
#include <utility>
#include <vector>

#include "store/eviction_policy.h"

namespace kvern {

/// Which chunk follows which: a forest over chunk numbers, in arrays.
class ChunkTree {
 public:
  /// A chunk that is known already keeps its place.
  void insert(std::uint32_t chunk);
  /// False, and nothing is changed, when one of them is unknown or the parent would come to follow itself.
  bool follow(std::uint32_t chunk, std::uint32_t parent);
  /// Its children have no parent from then on.
  void erase(std::uint32_t chunk);

  bool contains(std::uint32_t chunk) const { return chunk < nodes_.size() && nodes_[chunk].known; }
  std::size_t size() const { return size_; }
  std::uint32_t parent(std::uint32_t chunk) const { return nodes_[chunk].parent; }
  std::uint32_t children(std::uint32_t chunk) const { return nodes_[chunk].children; }
  std::uint32_t first_child(std::uint32_t chunk) const { return nodes_[chunk].first_child; }
  std::uint32_t next_sibling(std::uint32_t chunk) const { return nodes_[chunk].next; }
  /// A mark on a known chunk, for EvictionPolicy::withhold(); gone with the chunk.
  bool is_withheld(std::uint32_t chunk) const { return nodes_[chunk].withheld; }
  void set_withheld(std::uint32_t chunk, bool withheld) { nodes_[chunk].withheld = withheld ? 1 : 0; }

 private:
  struct Node {
    std::uint32_t parent = kNoChunk;
    std::uint32_t first_child = kNoChunk;  ///< the one that came last
    std::uint32_t previous = kNoChunk;     ///< sibling
    std::uint32_t next = kNoChunk;         ///< sibling
    std::uint32_t children : 30 = 0;
    std::uint32_t withheld : 1 = 0;
    std::uint32_t known : 1 = 0;
  };

  bool is_above(std::uint32_t ancestor, std::uint32_t chunk) const;
  void leave_parent(std::uint32_t chunk);

  std::vector<Node> nodes_;
  std::size_t size_ = 0;
};

/// A victim list in the making: a chunk brings along what follows it, and goes last.
class LeafFirst {
 public:
  LeafFirst(const ChunkTree& tree, std::size_t count);
  /// The chunk is next in the order. False once the list is full.
  bool add(std::uint32_t chunk);
  std::vector<std::uint32_t> take() { return std::move(chunks_); }

 private:
  std::uint32_t deepest(std::uint32_t chunk) const;

  const ChunkTree& tree_;
  const std::size_t count_;
  std::vector<std::uint32_t> chunks_;
  std::unordered_set<std::uint32_t> listed_;
};

}  // namespace kvern
