#include "service/sessions.h"

#include <openssl/rand.h>
#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <utility>

namespace kvern {
namespace {

constexpr std::size_t kTokenBytes = 32;

Result<std::string> make_token() {
  std::string token(kTokenBytes, '\0');
  if (RAND_bytes(reinterpret_cast<unsigned char*>(token.data()), static_cast<int>(token.size())) != 1) {
    return failure(Code::kInternal, "the system gives no random bytes for a session token");
  }
  return token;
}

/// Whether the process of a pidfd has ended.
bool is_gone(int pidfd) {
  pollfd entry{.fd = pidfd, .events = POLLIN, .revents = 0};
  return ::poll(&entry, 1, 0) == 1 && (entry.revents & POLLIN) != 0;
}

void tell_state(const Session& session, SessionState state) {
  if (const auto* local = session.local()) local->segment.set_state(state);
}

}  // namespace

Sessions::Sessions(const SessionLimits& limits, std::uint64_t epoch, HazardRegistry& hazards, const Clock& clock)
    : limits_(limits), epoch_(epoch), hazards_(hazards), clock_(clock), last_tick_ns_(clock.now_ns()) {}

Sessions::~Sessions() { end_all(); }

void Sessions::set_hooks(SessionHooks hooks) { hooks_ = std::move(hooks); }

Result<std::shared_ptr<Session>> Sessions::open(SessionIdentity identity, std::uint64_t first_sequence) {
  auto token = make_token();
  if (!token) return failure(token.error());
  identity.staging_bytes = std::min(identity.staging_bytes, limits_.staging_bytes_max);
  const bool local_memory = identity.local && identity.plane == SessionPlane::kShm;

  std::shared_ptr<Session> session;
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return failure(Code::kUnavailable, "the daemon is stopping");
    if (by_id_.size() + lingering_.size() >= limits_.max_sessions) {
      return failure(Code::kBusy,
                     "all " + std::to_string(limits_.max_sessions) + " sessions are in use ([sessions] max_sessions)");
    }
    session = std::make_shared<Session>(next_id_++, *token, std::move(identity), clock_.now_ns());
    by_id_.emplace(session->id(), session);
  }
  if (const Status status = session->accept_sequence(first_sequence); !status) {
    remove(session->id(), SessionEnd::kProtocolError);  // nobody has heard of it yet
    return failure(status);
  }
  // A remote client pushes into staging that only we map; a local one gets its own when it is admitted.
  if (!local_memory && session->identity().staging_bytes > 0 && session->identity().plane == SessionPlane::kUcx) {
    auto staging = Staging::create("kvern-staging", session->identity().staging_bytes);
    if (!staging) {
      remove(session->id(), SessionEnd::kProtocolError);
      return failure(staging.error());
    }
    session->set_staging(std::move(*staging));
  }
  std::lock_guard lock(mutex_);
  // Only now can the client name it, with all that belongs to it in place.
  if (by_id_.contains(session->id())) by_token_.emplace(session->token(), session);
  return session;
}

Result<std::shared_ptr<Session>> Sessions::authenticate(const std::string& token) {
  std::shared_ptr<Session> session;
  {
    std::lock_guard lock(mutex_);
    const auto found = by_token_.find(token);
    if (found == by_token_.end()) {
      return failure(Code::kExpired, "no session has this token: it has ended, or the daemon was started again");
    }
    session = found->second;
  }
  session->touch(clock_.now_ns());
  return session;
}

std::shared_ptr<Session> Sessions::find(std::uint64_t id) const {
  std::lock_guard lock(mutex_);
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<Session>> Sessions::list() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Session>> result;
  result.reserve(by_id_.size());
  for (const auto& [id, session] : by_id_) result.push_back(session);
  std::ranges::sort(result, {}, &Session::id);
  return result;
}

std::size_t Sessions::lingering() const {
  std::lock_guard lock(mutex_);
  return lingering_.size();
}

Result<std::shared_ptr<Session>> Sessions::admit(std::uint64_t connection, const std::string& token, PeerProcess peer) {
  auto session = authenticate(token);
  if (!session) return session;
  if (!(*session)->identity().local || (*session)->identity().plane != SessionPlane::kShm) {
    return failure(Code::kRefused, "this session does not use shared memory");
  }
  if ((*session)->local() != nullptr) {
    return failure(Code::kRefused, "the session was admitted before; it belongs to one process");
  }
  const std::string name = "kvern-session-" + std::to_string((*session)->id());
  auto segment_memory = SharedMemory::create_anonymous(name, limits_.segment.total_bytes());
  if (!segment_memory) return failure(segment_memory.error());
  // A session without staging gets the smallest file there is, so that admission always hands out five descriptors.
  auto staging = Staging::create(name + "-staging",
                                 std::max<std::uint64_t>((*session)->identity().staging_bytes, Slab::kAlignment));
  if (!staging) return failure(staging.error());
  UniqueFd doorbell(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!doorbell) return failure(Code::kInternal, "no eventfd: too many open files? (LimitNOFILE)");
  const auto segment = SegmentView::create(segment_memory->bytes(), limits_.segment, (*session)->id(), epoch_);
  const Status admitted = (*session)->admit({.connection = connection,
                                             .pid = peer.pid,
                                             .uid = peer.uid,
                                             .pidfd = std::move(peer.pidfd),
                                             .segment_memory = std::move(*segment_memory),
                                             .segment = segment,
                                             .doorbell = std::move(doorbell)});
  if (!admitted) return failure(admitted);
  (*session)->set_staging(std::move(*staging));
  std::lock_guard lifecycle(lifecycle_mutex_);
  {
    std::lock_guard lock(mutex_);
    if (!by_id_.contains((*session)->id())) return failure(Code::kExpired, "the session ended while it was admitted");
    by_connection_.emplace(connection, *session);
    hazards_.add((*session)->id(), segment);
  }
  if (hooks_.admitted) hooks_.admitted(**session);
  return session;
}

void Sessions::connection_closed(std::uint64_t connection) {
  std::uint64_t id = 0;
  {
    std::lock_guard lock(mutex_);
    const auto found = by_connection_.find(connection);
    if (found == by_connection_.end()) return;
    id = found->second->id();
    by_connection_.erase(found);
    lingering_.erase(id);
  }
  end(id, SessionEnd::kDisconnected);
}

std::shared_ptr<Session> Sessions::remove(std::uint64_t id, SessionEnd why) {
  std::lock_guard lock(mutex_);
  auto node = by_id_.extract(id);
  if (!node) return nullptr;
  auto session = std::move(node.mapped());
  by_token_.erase(session->token());
  const auto* local = session->local();
  const bool connected = local != nullptr && by_connection_.contains(local->connection);
  if (why == SessionEnd::kExpired && connected) lingering_.emplace(id, session);
  return session;
}

void Sessions::end(std::uint64_t id, SessionEnd why) {
  std::shared_ptr<Session> session;
  bool disconnect = false;
  {
    std::lock_guard lifecycle(lifecycle_mutex_);
    // A client that learns that its session has ended may give its pages to others at once.
    if (const auto ending = find(id)) ending->revoke_pages();
    session = remove(id, why);
    if (!session) return;
    // First the word, then the deed: a client that reads "live" after it decoded has read bytes that were held for it.
    // After a graceful stop nobody writes to the slab any more: what the client still reads, and answers that wait in
    // its ring, stay good.
    tell_state(*session, why == SessionEnd::kStopping ? SessionState::kStopping : SessionState::kExpired);
    if (hooks_.ending) hooks_.ending(*session);
    hazards_.remove(id);
    session->close();
    const auto* local = session->local();
    std::lock_guard lock(mutex_);
    disconnect = local != nullptr && !lingering_.contains(id) && by_connection_.erase(local->connection) > 0;
  }
  if (disconnect && hooks_.disconnect) hooks_.disconnect(session->local()->connection);
  if (hooks_.ended) hooks_.ended(*session, why);
}

void Sessions::end_soon(std::uint64_t id, SessionEnd why) {
  {
    std::lock_guard lock(mutex_);
    if (!by_id_.contains(id)) return;
    doomed_.emplace_back(id, why);
  }
  if (hooks_.wake) hooks_.wake();
}

void Sessions::tick() {
  std::vector<std::pair<std::uint64_t, SessionEnd>> ends;
  std::vector<std::uint64_t> gone;  // connections of lingering sessions whose process has ended
  {
    std::lock_guard lock(mutex_);
    ends.swap(doomed_);
    for (const auto& [id, session] : lingering_) {
      if (is_gone(session->local()->pidfd.get())) gone.push_back(session->local()->connection);
    }
  }
  for (const auto connection : gone) {
    connection_closed(connection);
    if (hooks_.disconnect) hooks_.disconnect(connection);
  }
  const std::int64_t now = clock_.now_ns();
  // What a session said while this process was not run may still wait to be read.
  const bool was_not_run = now - last_tick_ns_.exchange(now) > 4 * limits_.tick_ns;
  for (const auto& session : list()) {
    if (was_not_run) session->touch(now);
    const auto* local = session->local();
    if (local != nullptr && local->pidfd && is_gone(local->pidfd.get())) {
      ends.emplace_back(session->id(), SessionEnd::kDisconnected);
    } else if (now - session->last_seen_ns(now) > limits_.timeout_ns) {
      ends.emplace_back(session->id(), SessionEnd::kExpired);
    }
  }
  for (const auto& [id, why] : ends) end(id, why);
}

void Sessions::begin_stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  for (const auto& session : list()) tell_state(*session, SessionState::kStopping);
}

void Sessions::end_all() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  for (const auto& session : list()) end(session->id(), SessionEnd::kStopping);
  std::lock_guard lock(mutex_);
  lingering_.clear();
  by_connection_.clear();
}

}  // namespace kvern
