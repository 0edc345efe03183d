#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvern {

/// XXH3-64 with seed 0 (equal to checksum64() of base/keys.h) on the widest vectors of this machine, over a stream of
/// pieces, optionally copied on the way. A piece that is a multiple of 64 bytes costs nothing extra. Not thread-safe.
class Checksum64 {
 public:
  Checksum64();

  void update(const void* source, std::size_t bytes);
  /// Hashes what it copies, reading each source byte once. For destinations that are read again soon.
  void copy(void* destination, const void* source, std::size_t bytes);
  /// copy() with non-temporal stores where the destination is aligned to 64 bytes. Other threads see the bytes after
  /// digest().
  void stream_copy(void* destination, const void* source, std::size_t bytes);

  /// The checksum of all bytes so far. More may follow.
  std::uint64_t digest() const;

 private:
  enum class Mode { kRead, kCopy, kStream };
  static constexpr std::size_t kStripeBytes = 64;
  /// Inputs up to 240 bytes follow other rules, so the beginning of a stream is held until it is longer than this.
  static constexpr std::size_t kHeldBytes = 256;

  void consume(Mode mode, std::uint8_t* destination, const std::uint8_t* source, std::size_t bytes);
  void accumulate(Mode mode, std::uint8_t* destination, const std::uint8_t* source, std::size_t stripes);
  void drop_held();

  alignas(64) std::array<std::uint64_t, 8> lanes_;
  std::uint64_t total_bytes_ = 0;
  std::size_t stripe_in_block_ = 0;
  std::size_t held_ = 0;
  bool streamed_ = false;
  /// The stripe consumed last (the digest looks at the last 64 bytes), then the held_ bytes that are not consumed yet.
  alignas(64) std::array<std::uint8_t, kStripeBytes + kHeldBytes> buffer_;
};

/// checksum64() of base/keys.h, faster on long inputs.
std::uint64_t fast_checksum64(const void* data, std::size_t bytes);

}  // namespace kvern
