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

/// Bits of SessionHeader::daemon_sleeping. The daemon sets them, looks at the rings once more and sleeps; the client
/// looks at them after it has moved a ring's head or tail, clears them and rings the doorbell.
constexpr std::uint32_t kDaemonAwaitsRequest = 1;  ///< after pushing a request
constexpr std::uint32_t kDaemonAwaitsRoom = 2;     ///< after taking replies: more of them wait in the daemon

struct SegmentLayout {
  std::uint32_t hazard_capacity = 1U << 14;
  std::uint32_t request_ring_bytes = 4U << 20;  ///< power of two
  std::uint32_t reply_ring_bytes = 4U << 20;    ///< power of two
  std::size_t total_bytes() const;
  Status validate() const;
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
  alignas(64) std::atomic<std::uint32_t> daemon_sleeping;  ///< kDaemonAwaits…: the doorbell is needed
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
  /// Formats new memory (daemon). Throws std::invalid_argument when the layout is invalid or larger than the memory.
  static SegmentView create(std::span<std::byte> memory, const SegmentLayout& layout, std::uint64_t session_id,
                            std::uint64_t epoch);
  /// Checks magic, version and sizes (client).
  static Result<SegmentView> attach(std::span<std::byte> memory);

  SessionHeader& header() const { return *header_; }
  const SegmentLayout& layout() const { return layout_; }
  /// Daemon: tells the client, waking those that wait for an answer.
  void set_state(SessionState state) const;
  std::span<std::atomic<std::uint32_t>> hazards() const;
  /// The slots that were ever used (what the client says of them, bounded by the layout): all that an evictor reads.
  std::span<const std::atomic<std::uint32_t>> used_hazards() const;
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
  /// Publishes the chunk (seq_cst store); returns the slot, or nullopt when all are taken (answer: a miss).
  std::optional<std::uint32_t> publish(std::uint32_t chunk);
  /// Publishes several at once; slots gets one entry per chunk. False (nothing published) when too few are free.
  bool publish_all(std::span<const std::uint32_t> chunks, std::span<std::uint32_t> slots);
  /// Clearing a free slot does nothing.
  void clear(std::uint32_t slot);

 private:
  std::uint32_t take_locked();

  SegmentView segment_;
  std::mutex mutex_;
  std::vector<std::uint32_t> free_;
  std::uint32_t next_ = 0;  ///< slots from here on were never used
};

}  // namespace kvern
