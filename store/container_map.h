#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvern {

/// Where in the slab the containers of complete chunks begin: one bit per page, in memory that outlives the process. It
/// is all that a warm restart needs, since containers describe themselves and carry their checksums.
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

  /// offset: a multiple of Slab::kAlignment within the slab.
  void set(std::uint64_t offset);
  void clear(std::uint64_t offset);
  /// In ascending order.
  std::vector<std::uint64_t> offsets() const;

 private:
  std::uint64_t& word_of(std::uint64_t offset);

  std::span<std::uint64_t> words_;
  bool adopted_ = false;
};

}  // namespace kvern
