#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

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
  ~Slab();
  Slab(Slab&&) noexcept;
  Slab& operator=(Slab&&) noexcept;

  std::optional<Extent> allocate(std::uint64_t bytes);
  /// The extent must come from allocate() and not have been freed.
  void free(const Extent& extent);
  /// Gives the end of an extent back: new_bytes <= extent.bytes. Returns the smaller extent.
  Extent shrink(const Extent& extent, std::uint64_t new_bytes);

  std::uint64_t capacity_bytes() const;
  std::uint64_t used_bytes() const;  ///< rounded up to kAlignment
  std::uint64_t largest_free_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvern
