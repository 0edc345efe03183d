#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "service/hazards.h"
#include "service/session.h"

namespace kvern {

/// Why a session ended; a label of kvern_sessions_ended_total.
enum class SessionEnd { kGoodbye, kDisconnected, kExpired, kProtocolError, kStopping };
constexpr std::string_view end_name(SessionEnd end) {
  switch (end) {
    case SessionEnd::kGoodbye:
      return "goodbye";
    case SessionEnd::kDisconnected:
      return "disconnected";
    case SessionEnd::kExpired:
      return "expired";
    case SessionEnd::kProtocolError:
      return "protocol_error";
    case SessionEnd::kStopping:
      return "stopping";
  }
  return "unknown";
}

struct SessionLimits {
  std::uint64_t max_sessions = 256;
  std::uint64_t staging_bytes_max = 1ULL << 30;
  std::int64_t timeout_ns = 10'000'000'000;
  std::int64_t tick_ns = 250'000'000;  ///< how often tick() is called at least
  SegmentLayout segment = {};
};

/// What others do when a session comes and goes. Called without the lock that look-ups take; admitted
/// and ending must not call back.
struct SessionHooks {
  std::function<void(const Session&)> admitted;               ///< a local one: its rings can be served
  std::function<void(const Session&)> ending;                 ///< after it, its rings are not touched any more
  std::function<void(const Session&, SessionEnd why)> ended;  ///< all is given back
  std::function<void(std::uint64_t connection)> disconnect;   ///< close its admission connection
  std::function<void()> wake;                                 ///< somebody called end_soon(): call tick() now
};

/// All sessions, from hello to the end. A session ends by goodbye, by the end of its process (connection or pidfd) and
/// by silence. One that fell silent is expired: it holds nothing any more, but its memory is kept until its process is
/// gone, for a stopped process may wake up and write. Thread-safe.
class Sessions {
 public:
  Sessions(const SessionLimits& limits, std::uint64_t epoch, HazardRegistry& hazards, const Clock& clock);
  ~Sessions();
  /// Before the first session.
  void set_hooks(SessionHooks hooks);

  /// A new session with a token of 32 random bytes. kRefused when it stops or is full.
  Result<std::shared_ptr<Session>> open(SessionIdentity identity, std::uint64_t first_sequence);
  /// The live session of that token; kExpired otherwise. Counts as a sign of life.
  Result<std::shared_ptr<Session>> authenticate(const std::string& token);
  std::shared_ptr<Session> find(std::uint64_t id) const;
  std::vector<std::shared_ptr<Session>> list() const;
  /// Sessions that expired and whose process still lives.
  std::size_t lingering() const;

  /// Gives a local session its segment, staging and doorbell.
  Result<std::shared_ptr<Session>> admit(std::uint64_t connection, const std::string& token, PeerProcess peer);
  void connection_closed(std::uint64_t connection);

  /// Ends it now. Not from the thread that serves the rings: that one calls end_soon().
  void end(std::uint64_t id, SessionEnd why);
  void end_soon(std::uint64_t id, SessionEnd why);
  /// Ends what should end: called every now and then, and after a wake. When it was not called for several ticks, the
  /// process was stopped or starved, and no session is blamed for its silence.
  void tick();
  /// No new sessions; those that are there learn that the daemon stops.
  void begin_stop();
  void end_all();

 private:
  std::shared_ptr<Session> remove(std::uint64_t id, SessionEnd why);

  const SessionLimits limits_;
  const std::uint64_t epoch_;
  HazardRegistry& hazards_;
  const Clock& clock_;
  std::atomic<std::int64_t> last_tick_ns_;
  SessionHooks hooks_;

  /// Held while a session is admitted or ended, so that no ring is served of a session that is gone. Taken before
  /// mutex_.
  std::mutex lifecycle_mutex_;
  mutable std::mutex mutex_;
  bool stopping_ = false;
  std::uint64_t next_id_ = 1;
  std::unordered_map<std::uint64_t, std::shared_ptr<Session>> by_id_;
  std::unordered_map<std::string, std::shared_ptr<Session>> by_token_;
  std::unordered_map<std::uint64_t, std::shared_ptr<Session>> by_connection_;  ///< live and lingering ones
  std::unordered_map<std::uint64_t, std::shared_ptr<Session>> lingering_;      ///< by id
  std::vector<std::pair<std::uint64_t, SessionEnd>> doomed_;
};

}  // namespace kvern
