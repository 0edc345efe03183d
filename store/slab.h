#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

namespace kvern {

/// A piece of the slab. offset is a multiple of Slab::kAlignment.
struct Extent {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;  ///< as asked for; the allocator may hold more
  bool operator==(const Extent&) const = default;
};

/// Offset allocator over memory that it never touches: bookkeeping lies outside, so that the memory can be mapped
/// read-only by others or lie on a device. Not thread-safe. O(1) allocate and free (binned free lists with neighbour
/// merging), no compaction.
class Slab {
 public:
  static constexpr std::uint64_t kAlignment = 4096;
  explicit Slab(std::uint64_t capacity_bytes);
  /// A slab in which these extents are in use already: within the capacity, aligned, in ascending order without
  /// overlap. Throws std::invalid_argument when they are not.
  Slab(std::uint64_t capacity_bytes, std::span<const Extent> used);
  ~Slab();
  Slab(Slab&&) noexcept;
  Slab& operator=(Slab&&) noexcept;

  std::optional<Extent> allocate(std::uint64_t bytes);
  /// The extent must come from allocate() and not have been freed.
  void release(const Extent& extent);
  /// Gives the end of an extent back: new_bytes <= extent.bytes. Returns the smaller extent.
  Extent shrink(const Extent& extent, std::uint64_t new_bytes);
  /// Cuts an extent in two that are freed one by one. head_bytes: a multiple of kAlignment, 0 < head_bytes <
  /// extent.bytes.
  std::pair<Extent, Extent> split(const Extent& extent, std::uint64_t head_bytes);

  /// Memory from this offset on cannot be had after all: what is free of it, or is released later, is never allocated
  /// again, and no part of the capacity.
  void cut_off(std::uint64_t offset);

  std::uint64_t capacity_bytes() const;
  std::uint64_t used_bytes() const;  ///< rounded up to kAlignment
  std::uint64_t largest_free_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvern
