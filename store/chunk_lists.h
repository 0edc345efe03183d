#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "store/eviction_policy.h"

namespace kvern {

/// Some lists of chunk numbers, kMaxLists at most, linked by number: no allocation per chunk. A chunk is in one of them
/// at most.
class ChunkLists {
 public:
  explicit ChunkLists(std::size_t lists) : heads_(lists) {}

  /// Moves the chunk there from wherever it is.
  void push_back(std::uint32_t list, std::uint32_t chunk) {
    detach(list, chunk);
    Head& head = heads_[list];
    links_[chunk] = {.previous = head.last, .next = kNoChunk};
    (head.last == kNoChunk ? head.first : links_[head.last].next) = chunk;
    head.last = chunk;
  }

  void push_front(std::uint32_t list, std::uint32_t chunk) {
    detach(list, chunk);
    Head& head = heads_[list];
    links_[chunk] = {.previous = kNoChunk, .next = head.first};
    (head.first == kNoChunk ? head.last : links_[head.first].previous) = chunk;
    head.first = chunk;
  }

  /// In front of another one, in its list.
  void insert_before(std::uint32_t other, std::uint32_t chunk) {
    const std::uint32_t list = list_of(other);
    const std::uint32_t previous = links_[other].previous;
    if (previous == kNoChunk) return push_front(list, chunk);
    detach(list, chunk);
    links_[chunk] = {.previous = previous, .next = other};
    links_[previous].next = chunk;
    links_[other].previous = chunk;
  }

  void remove(std::uint32_t chunk) {
    if (!contains(chunk)) return;
    const Links links = links_[chunk];
    Head& head = heads_[lists_[chunk]];
    (links.previous == kNoChunk ? head.first : links_[links.previous].next) = links.next;
    (links.next == kNoChunk ? head.last : links_[links.next].previous) = links.previous;
    --head.size;
    links_[chunk] = {};
    lists_[chunk] = kNoListNumber;
  }

  bool contains(std::uint32_t chunk) const { return list_of(chunk) != kNoList; }
  /// kNoList when it is in none.
  std::uint32_t list_of(std::uint32_t chunk) const {
    return chunk < lists_.size() && lists_[chunk] != kNoListNumber ? lists_[chunk] : kNoList;
  }
  std::uint32_t front(std::uint32_t list) const { return heads_[list].first; }
  std::uint32_t back(std::uint32_t list) const { return heads_[list].last; }
  std::uint32_t next(std::uint32_t chunk) const { return links_[chunk].next; }
  std::uint32_t previous(std::uint32_t chunk) const { return links_[chunk].previous; }
  std::size_t size(std::uint32_t list) const { return heads_[list].size; }
  std::size_t lists() const { return heads_.size(); }

  static constexpr std::uint32_t kNoList = kNoChunk;
  static constexpr std::size_t kMaxLists = std::numeric_limits<std::uint16_t>::max();

 private:
  static constexpr std::uint16_t kNoListNumber = kMaxLists;
  struct Links {
    std::uint32_t previous = kNoChunk;
    std::uint32_t next = kNoChunk;
  };
  struct Head {
    std::uint32_t first = kNoChunk;
    std::uint32_t last = kNoChunk;
    std::size_t size = 0;
  };

  // Room for the chunk in the list, and in that alone.
  void detach(std::uint32_t list, std::uint32_t chunk) {
    if (chunk >= links_.size()) {
      links_.resize(chunk + std::size_t{1});
      lists_.resize(chunk + std::size_t{1}, kNoListNumber);
    }
    remove(chunk);
    lists_[chunk] = static_cast<std::uint16_t>(list);
    ++heads_[list].size;
  }

  std::vector<Head> heads_;
  std::vector<Links> links_;          // of those in a list
  std::vector<std::uint16_t> lists_;  // that each is in
};

}  // namespace kvern
