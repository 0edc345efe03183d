#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"

namespace kvern {

/// One direction of a session: a byte ring in shared memory, one producer, one consumer, frames of
/// [u32 length][u32 checksum (low half of XXH3-64)][payload], each starting at a multiple of 8. Head and tail are
/// ever-growing byte counts. Either side may be hostile: lengths and positions are checked against the own layout, and
/// a broken ring is reported (kCorrupt) once and then stays closed (kUnavailable). A producer or consumer belongs to
/// one thread at a time.

class RingProducer {
 public:
  /// Goes on where head stands. Throws std::invalid_argument unless the size is a power of two.
  RingProducer(std::span<std::byte> ring, std::atomic<std::uint64_t>& head, const std::atomic<std::uint64_t>& tail);
  /// kBusy when there is no room, kInvalid when the frame could never fit, kCorrupt when the peer's tail is impossible.
  Status push(std::span<const std::byte> payload);

 private:
  std::span<std::byte> ring_;
  std::atomic<std::uint64_t>& head_;
  const std::atomic<std::uint64_t>& tail_;
  std::uint64_t position_;
  bool broken_ = false;
};

class RingConsumer {
 public:
  /// Goes on where tail stands. Throws std::invalid_argument unless the size is a power of two.
  RingConsumer(std::span<const std::byte> ring, const std::atomic<std::uint64_t>& head,
               std::atomic<std::uint64_t>& tail);
  /// Copies the next frame out. kNotFound when the ring is empty, kCorrupt when a length, position or checksum is
  /// wrong.
  Status pop(std::string* payload);
  /// True when pop() has nothing to deliver: no frame, or a broken ring.
  bool empty() const;

 private:
  Status broken(const char* why);

  std::span<const std::byte> ring_;
  const std::atomic<std::uint64_t>& head_;
  std::atomic<std::uint64_t>& tail_;
  std::uint64_t position_;
  bool broken_ = false;
};

}  // namespace kvern
