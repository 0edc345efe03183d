#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <unordered_map>
#include <vector>

namespace kvern {

/// Which chunks somebody wants kept, until when, and how many bytes of whom. Pure bookkeeping, not thread-safe: the
/// store withholds from its policies what is in here. A chunk is kept at least as long as what follows it in its
/// prompt; the caller sees to that.
class Retention {
 public:
  struct Wish {
    std::int64_t until_ns = 0;
    std::uint64_t position = 0;  ///< of the chunk's first token in its prompt
    std::uint64_t bytes = 0;
    std::uint32_t tenant = 0;
  };

  /// Puts it in, or changes what is known of it.
  void put(std::uint32_t chunk, const Wish& wish);
  void remove(std::uint32_t chunk);
  /// Null when it is not kept.
  const Wish* find(std::uint32_t chunk) const;

  /// The one whose time ends first; of those of one time that which is furthest on in its prompt.
  std::optional<std::uint32_t> first() const;
  /// All, in that order: what follows a chunk stands before it.
  std::vector<std::uint32_t> all() const;

  std::size_t size() const { return wishes_.size(); }
  std::uint64_t bytes() const { return bytes_; }
  std::uint64_t bytes_of(std::uint32_t tenant) const;

 private:
  struct Turn {
    std::int64_t until_ns = 0;
    std::uint64_t position = 0;
    std::uint32_t chunk = 0;
    bool operator<(const Turn& other) const {
      if (until_ns != other.until_ns) return until_ns < other.until_ns;
      if (position != other.position) return position > other.position;
      return chunk < other.chunk;
    }
  };

  std::unordered_map<std::uint32_t, Wish> wishes_;
  std::set<Turn> turns_;
  std::unordered_map<std::uint32_t, std::uint64_t> bytes_of_tenant_;
  std::uint64_t bytes_ = 0;
};

}  // namespace kvern
