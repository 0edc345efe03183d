#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvern {

/// Where in the slab the containers of complete chunks begin, and when they were last used: a bit and a number per
/// page, in memory that outlives the process. It is all that a warm restart needs, since containers describe themselves
/// and carry their checksums.
///
/// A bit is set after the container is complete and cleared before its bytes are freed, so that a process that dies at
/// any moment leaves no bit on bytes that are being written. Not thread-safe. Views memory that it does not own.
class ContainerMap {
 public:
  /// For a slab of that size.
  static std::size_t bytes_for(std::uint64_t slab_bytes);

  /// Takes over what an earlier process left in the memory, or formats it when that is not a map of this layout and of
  /// a slab that was no larger. Throws std::invalid_argument when the memory is too small.
  ContainerMap(std::span<std::byte> memory, std::uint64_t slab_bytes);
  /// What the memory held was taken over.
  bool adopted() const { return adopted_; }

  /// offset: a multiple of Slab::kAlignment within the slab. used: see touch().
  void set(std::uint64_t offset, std::uint32_t used);
  void clear(std::uint64_t offset);
  /// The container was used then, in whatever measure of time; later uses have larger numbers.
  void touch(std::uint64_t offset, std::uint32_t used);
  std::uint32_t last_use(std::uint64_t offset) const;
  /// In ascending order.
  std::vector<std::uint64_t> offsets() const;

 private:
  static constexpr std::uint64_t kPagesPerGroup = 64;
  /// Side by side, so that the map of a larger slab begins with that of a smaller one.
  struct PageGroup {
    std::uint64_t begins;
    std::uint32_t used[kPagesPerGroup];
  };

  static std::uint64_t groups_for(std::uint64_t slab_bytes);
  void put(std::uint64_t offset, bool begins);

  std::span<PageGroup> groups_;
  bool adopted_ = false;
};

}  // namespace kvern
