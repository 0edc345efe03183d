#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"

namespace kvern {

/// The shared memory of one session: state words, two rings (requests to the daemon, replies to the client) and the
/// hazard slots. The daemon owns the file; both sides map it read-write. The daemon trusts nothing in it: it copies
/// before it validates and bounds every offset by its own copy of the layout.
///
///   SessionHeader (4096 bytes) | hazards: hazard_capacity x atomic<uint32> | request ring | reply ring

enum class SessionState : std::uint32_t {
  kLive = 1,
  kExpired = 2,   ///< heartbeat missed: leases and claims are void, the client must register again
  kStopping = 3,  ///< the daemon drains: no new stores or loads
};

struct SegmentLayout {
  std::uint32_t hazard_capacity = 1U << 14;
  std::uint32_t request_ring_bytes = 4U << 20;  ///< power of two
  std::uint32_t reply_ring_bytes = 4U << 20;    ///< power of two
  std::size_t total_bytes() const;
};

struct alignas(64) SessionHeader {
  static constexpr std::uint64_t kMagic = 0x3153'4e52'4556'4bULL;  // "KVERNS1"
  static constexpr std::uint32_t kVersion = 1;

  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t hazard_capacity;
  std::uint32_t request_ring_bytes;
  std::uint32_t reply_ring_bytes;
  std::uint64_t session_id;
  std::uint64_t epoch;

  alignas(64) std::atomic<std::uint32_t> state;            ///< SessionState, written by the daemon
  alignas(64) std::atomic<std::uint32_t> daemon_sleeping;  ///< 1: ring the doorbell after pushing a request
  alignas(64) std::atomic<std::uint32_t> reply_sequence;   ///< futex word: changes with every reply
  alignas(64) std::atomic<std::uint32_t> client_waiting;   ///< waiters on reply_sequence: the daemon wakes if not 0
  alignas(64) std::atomic<std::int64_t> client_heartbeat_ns;
  alignas(64) std::atomic<std::uint32_t> hazard_high_water;  ///< slots at and above were never used

  alignas(64) std::atomic<std::uint64_t> request_head;  ///< written by the client
  alignas(64) std::atomic<std::uint64_t> request_tail;  ///< written by the daemon
  alignas(64) std::atomic<std::uint64_t> reply_head;    ///< written by the daemon
  alignas(64) std::atomic<std::uint64_t> reply_tail;    ///< written by the client
};
static_assert(sizeof(SessionHeader) <= 4096);

/// A hazard slot holds chunk number + 1, or 0 when free. Owned by the client's claims; read by the evictor.
/// All views below hold plain pointers into the mapping, which must outlive them.
class SegmentView {
 public:
  /// Formats new memory (daemon).
  static SegmentView create(std::span<std::byte> memory, const SegmentLayout& layout, std::uint64_t session_id,
                            std::uint64_t epoch);
  /// Checks magic, version and sizes (client).
  static Result<SegmentView> attach(std::span<std::byte> memory);

  SessionHeader& header() const { return *header_; }
  const SegmentLayout& layout() const { return layout_; }
  std::span<std::atomic<std::uint32_t>> hazards() const;
  std::span<std::byte> request_ring() const;
  std::span<std::byte> reply_ring() const;

 private:
  SessionHeader* header_ = nullptr;
  SegmentLayout layout_;
};

/// Client side of the hazards: hands out slots. Thread-safe. A claim = the slots of the chunks that one look-up found.
class HazardSlots {
 public:
  explicit HazardSlots(const SegmentView& segment);
  /// Publishes the chunk (store + seq_cst fence); returns the slot, or nullopt when all are taken (answer: a miss).
  std::optional<std::uint32_t> publish(std::uint32_t chunk);
  /// Publishes several with one fence; slots gets one entry per chunk. False (nothing published) when too few are free.
  bool publish_all(std::span<const std::uint32_t> chunks, std::span<std::uint32_t> slots);
  void clear(std::uint32_t slot);

 private:
  SegmentView segment_;
  std::mutex mutex_;
  std::vector<std::uint32_t> free_;
  std::uint32_t next_ = 0;
};

}  // namespace kvern
