#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/keys.h"
#include "base/status.h"
#include "base/trace.h"
#include "kernels/container.h"
#include "service/device_pages.h"
#include "service/in_flight.h"
#include "service/namespaces.h"
#include "service/staging.h"
#include "store/chunk_store.h"
#include "store/lease.h"
#include "store/tiered_store.h"
#include "transport/admission.h"
#include "transport/session_segment.h"
#include "transport/shared_memory.h"

namespace kvern {

enum class SessionRole { kScheduler, kWorker, kTool };
enum class SessionPlane { kNone, kShm, kUcx };  ///< how its bytes travel; kNone: it moves none

constexpr std::string_view role_name(SessionRole role) {
  return role == SessionRole::kScheduler ? "scheduler" : role == SessionRole::kWorker ? "worker" : "tool";
}
constexpr std::string_view plane_name(SessionPlane plane) {
  return plane == SessionPlane::kShm ? "shm" : plane == SessionPlane::kUcx ? "ucx" : "none";
}

/// What a session is from its first message on.
struct SessionIdentity {
  SessionRole role = SessionRole::kTool;
  SessionPlane plane = SessionPlane::kNone;
  bool local = false;  ///< came over the Unix socket
  std::string tenant;
  std::string client_name;
  std::map<std::string, std::string> attributes;  ///< for people only; see Session::attributes()
  std::uint64_t staging_bytes = 0;                ///< 0: none
  std::string public_key = {};                    ///< Z85, over TCP with CURVE; empty otherwise
};

class Session;
/// The namespace of that id, which the session must have registered. kInvalid otherwise, and for an id that is none or
/// a group that cannot be.
Result<std::shared_ptr<const Namespace>> named_namespace(const Session& session, const std::string& id_bytes,
                                                         std::uint32_t group);
/// Tells a span whose work it is.
void describe(Span& span, const Session& session);

/// Staging that waits for a shard. Whoever holds it last gives the extent back and ends the claim on the key.
struct Reservation {
  std::uint64_t id = 0;
  ContainerInfo info;
  std::optional<BlockHash> previous;  ///< the block before the chunk in its prompt
  std::shared_ptr<const Codec> codec;
  Staging::Block block;
  InFlight::Claim claim;
  SpanPtr span;                        ///< of the request that stores it; null: not recorded
  std::atomic<int> running_pushes{0};  ///< of the remote data plane, which still write to the block
};

/// One connected client and all that it holds. Thread-safe. Once closed it takes nothing any more (kExpired), and what
/// it held is given back, except its memory: that lives as long as this object, since the process may still write to
/// it.
class Session {
 public:
  static constexpr std::size_t kMaxNamespaces = 256;
  static constexpr std::size_t kMaxReservations = 1U << 16;
  static constexpr std::size_t kMaxLeases = 1U << 16;  ///< those under matches included
  static constexpr std::size_t kMaxPrefetches = 1024;
  static constexpr std::size_t kMaxDevicePages = 64;
  static constexpr std::size_t kMaxAttributes = 16;

  Session(std::uint64_t id, std::string token, SessionIdentity identity, std::int64_t now_ns);

  std::uint64_t id() const { return id_; }
  const std::string& token() const { return token_; }
  const SessionIdentity& identity() const { return identity_; }
  std::int64_t created_ns() const { return created_ns_; }

  /// Those of the identity and what was told since. At most kMaxAttributes names; further ones are passed over.
  std::map<std::string, std::string> attributes() const;
  void add_attributes(const std::map<std::string, std::string>& told);

  /// kInvalid unless the number is larger than all before.
  Status accept_sequence(std::uint64_t sequence);

  /// A sign of life at this time.
  void touch(std::int64_t now_ns) { last_seen_ns_.store(now_ns, std::memory_order_relaxed); }
  /// The time of the last sign of life; looks at the heartbeat word of the segment, where any change counts and the
  /// value, which the client writes, does not.
  std::int64_t last_seen_ns(std::int64_t now_ns);

  Status add_namespace(std::shared_ptr<const Namespace> space);
  std::shared_ptr<const Namespace> find_namespace(const NamespaceId& id) const;
  std::vector<std::shared_ptr<const Namespace>> namespaces() const;

  /// kExpired when closed, kBusy at the limit. Numbers the reservation.
  Status add_reservation(const std::shared_ptr<Reservation>& reservation);
  std::shared_ptr<Reservation> find_reservation(std::uint64_t id) const;
  /// Takes it out; nullptr when there is none of that number.
  std::shared_ptr<Reservation> take_reservation(std::uint64_t id);

  /// kExpired when closed, kBusy at the limit.
  Result<std::uint64_t> add_lease(std::shared_ptr<Lease> lease);
  std::shared_ptr<Lease> find_lease(std::uint64_t id) const;
  std::shared_ptr<Lease> take_lease(std::uint64_t id);
  /// Leases of a look-up, under the client's number.
  Status add_match(std::uint64_t match_id, std::vector<std::shared_ptr<Lease>> leases);
  /// The prefetch of a look-up in one KV-cache group; nullptr when there is none.
  std::shared_ptr<Prefetch> find_prefetch(std::uint64_t match_id, std::uint16_t group) const;
  Status add_prefetch(std::uint64_t match_id, std::uint16_t group, std::shared_ptr<Prefetch> prefetch);
  /// Gives the leases of a look-up back and ends its prefetches.
  void drop_match(std::uint64_t match_id);

  /// Descriptors of device memory that the next registration takes; those of an earlier offer are closed.
  Status offer(std::vector<UniqueFd> descriptors);
  std::vector<UniqueFd> take_offered();
  /// kExpired when closed, kBusy at the limit. Numbers the pages.
  Result<std::uint64_t> add_pages(std::shared_ptr<DevicePages> pages);
  std::shared_ptr<DevicePages> find_pages(std::uint64_t id) const;
  /// After it no device touches pages of the session; waits for what is under way. Idempotent.
  void revoke_pages();

  /// Set once when the session is admitted.
  struct LocalResources {
    std::uint64_t connection = 0;  ///< on the admission socket
    pid_t pid = 0;
    uid_t uid = 0;
    UniqueFd pidfd;
    SharedMemory segment_memory;
    SegmentView segment;
    UniqueFd doorbell;
  };
  Status admit(LocalResources resources);
  void set_staging(std::shared_ptr<Staging> staging);
  std::shared_ptr<Staging> staging() const;
  /// nullptr before admit(). The resources stay until the session is destroyed.
  const LocalResources* local() const;

  /// Gives back everything but memory. Idempotent.
  void close();
  bool closed() const;

  struct Holdings {
    std::size_t namespaces = 0, reservations = 0, leases = 0;
    std::uint64_t staging_bytes = 0, staging_used_bytes = 0;
    std::vector<std::string> devices;  ///< on which it has registered pages
  };
  Holdings holdings() const;

 private:
  const std::uint64_t id_;
  const std::string token_;
  const SessionIdentity identity_;
  const std::int64_t created_ns_;
  std::atomic<std::int64_t> last_seen_ns_;

  mutable std::mutex mutex_;
  bool closed_ = false;
  std::map<std::string, std::string> attributes_;
  std::uint64_t last_sequence_ = 0;
  std::int64_t last_heartbeat_ = 0;
  std::unordered_map<NamespaceId, std::shared_ptr<const Namespace>> namespaces_;
  std::uint64_t next_id_ = 1;
  std::unordered_map<std::uint64_t, std::shared_ptr<Reservation>> reservations_;
  std::unordered_map<std::uint64_t, std::shared_ptr<Lease>> leases_;
  std::unordered_map<std::uint64_t, std::vector<std::shared_ptr<Lease>>> matches_;
  std::size_t matched_ = 0;                                                                  ///< leases in matches_
  std::map<std::pair<std::uint64_t, std::uint16_t>, std::shared_ptr<Prefetch>> prefetches_;  ///< by look-up and group
  std::vector<UniqueFd> offered_;
  std::unordered_map<std::uint64_t, std::shared_ptr<DevicePages>> pages_;
  std::shared_ptr<Staging> staging_;
  std::optional<LocalResources> local_;
};

}  // namespace kvern
