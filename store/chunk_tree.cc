#include "store/chunk_tree.h"

#include <algorithm>

namespace kvern {

void ChunkTree::insert(std::uint32_t chunk) {
  if (contains(chunk)) return;
  if (chunk >= nodes_.size()) nodes_.resize(chunk + std::size_t{1});
  nodes_[chunk].known = 1;
  ++size_;
}

bool ChunkTree::follow(std::uint32_t chunk, std::uint32_t parent) {
  if (!contains(chunk) || !contains(parent)) return false;
  if (nodes_[chunk].parent == parent) return true;
  if (is_above(chunk, parent)) return false;
  leave_parent(chunk);
  Node& above = nodes_[parent];
  nodes_[chunk].parent = parent;
  nodes_[chunk].next = above.first_child;
  if (above.first_child != kNoChunk) nodes_[above.first_child].previous = chunk;
  above.first_child = chunk;
  ++above.children;
  return true;
}

void ChunkTree::erase(std::uint32_t chunk) {
  if (!contains(chunk)) return;
  leave_parent(chunk);
  while (nodes_[chunk].first_child != kNoChunk) leave_parent(nodes_[chunk].first_child);
  nodes_[chunk] = {};
  --size_;
}

// Also of itself.
bool ChunkTree::is_above(std::uint32_t ancestor, std::uint32_t chunk) const {
  // What nothing follows is above itself alone: the walk is for those that are linked late.
  if (nodes_[ancestor].children == 0) return ancestor == chunk;
  for (; chunk != kNoChunk; chunk = nodes_[chunk].parent) {
    if (chunk == ancestor) return true;
  }
  return false;
}

void ChunkTree::leave_parent(std::uint32_t chunk) {
  Node& node = nodes_[chunk];
  if (node.parent == kNoChunk) return;
  (node.previous == kNoChunk ? nodes_[node.parent].first_child : nodes_[node.previous].next) = node.next;
  if (node.next != kNoChunk) nodes_[node.next].previous = node.previous;
  --nodes_[node.parent].children;
  node.parent = node.previous = node.next = kNoChunk;
}

LeafFirst::LeafFirst(const ChunkTree& tree, std::size_t count) : tree_(tree), count_(std::min(count, tree.size())) {
  chunks_.reserve(count_);
}

bool LeafFirst::add(std::uint32_t chunk) {
  if (listed_.contains(chunk)) return chunks_.size() < count_;  // and all that follows it
  std::uint32_t next = deepest(chunk);
  while (chunks_.size() < count_) {
    if (listed_.insert(next).second) chunks_.push_back(next);
    if (next == chunk) break;
    const std::uint32_t sibling = tree_.next_sibling(next);
    next = sibling == kNoChunk ? tree_.parent(next) : deepest(sibling);
  }
  return chunks_.size() < count_;
}

std::uint32_t LeafFirst::deepest(std::uint32_t chunk) const {
  while (tree_.first_child(chunk) != kNoChunk) chunk = tree_.first_child(chunk);
  return chunk;
}

}  // namespace kvern
