#include "transport/ring.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "base/keys.h"

namespace kvern {
namespace {

struct FrameHeader {
  std::uint32_t length;
  std::uint32_t checksum;
};
constexpr std::uint64_t kAlignment = sizeof(FrameHeader);

std::uint64_t frame_bytes(std::uint64_t payload_bytes) {
  return sizeof(FrameHeader) + (payload_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

std::uint32_t frame_checksum(const void* payload, std::size_t bytes) {
  return static_cast<std::uint32_t>(checksum64(payload, bytes));
}

void check_ring(std::span<const std::byte> ring) {
  if (!std::has_single_bit(ring.size()) || ring.size() < 2 * sizeof(FrameHeader) || ring.size() > UINT32_MAX) {
    throw std::invalid_argument("a ring of " + std::to_string(ring.size()) + " bytes is not a power of two");
  }
}

void copy_in(std::span<std::byte> ring, std::uint64_t position, std::span<const std::byte> bytes) {
  const std::size_t offset = position & (ring.size() - 1);
  const std::size_t first = std::min(bytes.size(), ring.size() - offset);
  if (first > 0) std::memcpy(ring.data() + offset, bytes.data(), first);
  if (first < bytes.size()) std::memcpy(ring.data(), bytes.data() + first, bytes.size() - first);
}

void copy_out(std::span<const std::byte> ring, std::uint64_t position, std::span<std::byte> bytes) {
  const std::size_t offset = position & (ring.size() - 1);
  const std::size_t first = std::min(bytes.size(), ring.size() - offset);
  if (first > 0) std::memcpy(bytes.data(), ring.data() + offset, first);
  if (first < bytes.size()) std::memcpy(bytes.data() + first, ring.data(), bytes.size() - first);
}

Status closed() { return Status(Code::kUnavailable, "the ring was closed after an error"); }

}  // namespace

// All accesses to head and tail are sequentially consistent: the sides go to sleep on what they saw of them, after
// having said so in a flag (session_segment.h), which release and acquire alone would not order.

RingProducer::RingProducer(std::span<std::byte> ring, std::atomic<std::uint64_t>& head,
                           const std::atomic<std::uint64_t>& tail)
    : ring_(ring), head_(head), tail_(tail), position_(head.load()) {
  check_ring(ring);
}

Status RingProducer::push(std::span<const std::byte> payload) {
  if (broken_) return closed();
  const std::uint64_t needed = frame_bytes(payload.size());
  if (needed > ring_.size()) {
    return Status(Code::kInvalid, "a message of " + std::to_string(payload.size()) +
                                      " bytes never fits into a ring of " + std::to_string(ring_.size()));
  }
  const std::uint64_t used = position_ - tail_.load();
  if (used > ring_.size() || used % kAlignment != 0) {
    broken_ = true;
    return Status(Code::kCorrupt, "the reader of the ring claims a position that cannot be");
  }
  if (needed > ring_.size() - used) return Status(Code::kBusy, "the ring is full");
  const FrameHeader header{.length = static_cast<std::uint32_t>(payload.size()),
                           .checksum = frame_checksum(payload.data(), payload.size())};
  copy_in(ring_, position_, std::as_bytes(std::span(&header, 1)));
  copy_in(ring_, position_ + sizeof header, payload);
  position_ += needed;
  head_.store(position_);  // last: whoever dies before this line has sent nothing
  return Status::ok();
}

RingConsumer::RingConsumer(std::span<const std::byte> ring, const std::atomic<std::uint64_t>& head,
                           std::atomic<std::uint64_t>& tail)
    : ring_(ring), head_(head), tail_(tail), position_(tail.load()) {
  check_ring(ring);
}

Status RingConsumer::pop(std::string* payload) {
  if (broken_) return closed();
  const std::uint64_t used = head_.load() - position_;
  if (used == 0) return Status(Code::kNotFound, "the ring is empty");
  if (used > ring_.size() || used % kAlignment != 0 || position_ % kAlignment != 0) {
    return broken("the writer of the ring claims a position that cannot be");
  }
  FrameHeader header{};
  copy_out(ring_, position_, std::as_writable_bytes(std::span(&header, 1)));
  const std::uint64_t needed = frame_bytes(header.length);
  if (needed > used) return broken("a frame in the ring is longer than what was written");
  payload->resize(header.length);
  copy_out(ring_, position_ + sizeof header, std::as_writable_bytes(std::span(*payload)));
  if (frame_checksum(payload->data(), payload->size()) != header.checksum) {
    return broken("the checksum of a frame in the ring is wrong");
  }
  position_ += needed;
  tail_.store(position_);
  return Status::ok();
}

bool RingConsumer::empty() const { return broken_ || head_.load() == position_; }

Status RingConsumer::broken(const char* why) {
  broken_ = true;
  return Status(Code::kCorrupt, why);
}

}  // namespace kvern
