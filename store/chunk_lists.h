#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "store/eviction_policy.h"

namespace kvern {

/// Some lists of chunk numbers, linked by number: no allocation per chunk. A chunk is in one of them at most.
class ChunkLists {
 public:
  explicit ChunkLists(std::size_t lists) : heads_(lists) {}

  /// Moves the chunk there from wherever it is.
  void push_back(std::uint32_t list, std::uint32_t chunk) {
    detach(list, chunk);
    Head& head = heads_[list];
    links_[chunk] = {.previous = head.last, .next = kNoChunk, .list = list};
    (head.last == kNoChunk ? head.first : links_[head.last].next) = chunk;
    head.last = chunk;
  }

  void push_front(std::uint32_t list, std::uint32_t chunk) {
    detach(list, chunk);
    Head& head = heads_[list];
    links_[chunk] = {.previous = kNoChunk, .next = head.first, .list = list};
    (head.first == kNoChunk ? head.last : links_[head.first].previous) = chunk;
    head.first = chunk;
  }

  /// In front of another one, in its list.
  void insert_before(std::uint32_t other, std::uint32_t chunk) {
    const std::uint32_t list = list_of(other);
    const std::uint32_t previous = links_[other].previous;
    if (previous == kNoChunk) return push_front(list, chunk);
    detach(list, chunk);
    links_[chunk] = {.previous = previous, .next = other, .list = list};
    links_[previous].next = chunk;
    links_[other].previous = chunk;
  }

  void remove(std::uint32_t chunk) {
    if (!contains(chunk)) return;
    const Links links = links_[chunk];
    Head& head = heads_[links.list];
    (links.previous == kNoChunk ? head.first : links_[links.previous].next) = links.next;
    (links.next == kNoChunk ? head.last : links_[links.next].previous) = links.previous;
    --head.size;
    links_[chunk] = {};
  }

  bool contains(std::uint32_t chunk) const { return list_of(chunk) != kNoList; }
  /// kNoList when it is in none.
  std::uint32_t list_of(std::uint32_t chunk) const { return chunk < links_.size() ? links_[chunk].list : kNoList; }
  std::uint32_t front(std::uint32_t list) const { return heads_[list].first; }
  std::uint32_t back(std::uint32_t list) const { return heads_[list].last; }
  std::uint32_t next(std::uint32_t chunk) const { return links_[chunk].next; }
  std::uint32_t previous(std::uint32_t chunk) const { return links_[chunk].previous; }
  std::size_t size(std::uint32_t list) const { return heads_[list].size; }
  std::size_t lists() const { return heads_.size(); }

  static constexpr std::uint32_t kNoList = kNoChunk;

 private:
  struct Links {
    std::uint32_t previous = kNoChunk;
    std::uint32_t next = kNoChunk;
    std::uint32_t list = kNoList;
  };
  struct Head {
    std::uint32_t first = kNoChunk;
    std::uint32_t last = kNoChunk;
    std::size_t size = 0;
  };

  // Room for the chunk in the list, and in that alone.
  void detach(std::uint32_t list, std::uint32_t chunk) {
    if (chunk >= links_.size()) links_.resize(chunk + std::size_t{1});
    remove(chunk);
    ++heads_[list].size;
  }

  std::vector<Head> heads_;
  std::vector<Links> links_;
};

}  // namespace kvern
