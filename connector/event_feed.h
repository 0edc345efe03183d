#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/keys.h"
#include "base/status.h"

namespace kvern {

struct Session;

/// A chunk that left the store.
struct RemovedBlocks {
  NamespaceId namespace_id;
  std::uint16_t group = 0;
  std::vector<BlockHash> hashes;
  std::string reason;
};
struct RemovedEvents {
  bool lost = false;  ///< some were missed: take a snapshot
  std::vector<RemovedBlocks> removed;
};

/// What the daemon holds of a namespace.
struct HeldBlocks {
  std::uint16_t group = 0;
  std::vector<BlockHash> hashes;
  std::uint32_t tokens = 0;
};
struct NamespaceSnapshot {
  int handle = 0;
  std::vector<HeldBlocks> chunks;
  bool complete = true;  ///< false: there are more, which the daemon does not name
};

/// What the scheduler side tells routers about the store: removals since the last call and snapshots. Callers never
/// wait: the client's own thread asks the daemon. Nothing is asked until somebody wants to know. Thread-safe.
class EventFeed {
 public:
  RemovedEvents take_removed();
  void request_snapshot(int handle);
  std::optional<NamespaceSnapshot> take_snapshot();

  /// For the client's thread.
  bool wanted() const;
  /// Snapshots are waiting to be asked for.
  bool snapshot_wanted() const;
  /// Asks for what is wanted over the session; kExpired or kUnavailable when it has ended.
  Status refresh(const Session& session, std::uint32_t timeout_ms);
  /// A new session begins: its events are numbered anew.
  void reset();

 private:
  Status fetch_snapshot(const Session& session, int handle, std::uint32_t timeout_ms);
  Status fetch_removed(const Session& session, std::uint32_t timeout_ms);

  mutable std::mutex mutex_;
  bool wanted_ = false;
  std::optional<std::uint64_t> cursor_;
  RemovedEvents removed_;
  std::deque<int> requested_;
  std::deque<NamespaceSnapshot> snapshots_;
};

}  // namespace kvern
