#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "transport/session_segment.h"
#include "transport/shared_memory.h"
#include "transport/wire.h"

namespace kvern {

/// Client side of the hot messages: request and answer, from any number of threads.
class Channel {
 public:
  virtual ~Channel() = default;
  /// Sends the request (its id is overwritten) and waits for the answer. kUnavailable when the daemon is gone or does
  /// not answer in time, kExpired when the session was ended. The reply's own status is left to the caller. A Reserve
  /// or Fetch without an answer closes the channel: what it may be given later is given back with the session.
  Status call(wire::HotRequest& request, wire::HotReply* reply, std::chrono::milliseconds timeout);
  /// False once the daemon is gone or the session expired: nothing will be answered any more.
  virtual bool alive() const = 0;
  /// Ends all waits with kUnavailable.
  virtual void close() = 0;

 protected:
  virtual Status do_call(wire::HotRequest& request, wire::HotReply* reply, std::chrono::milliseconds timeout) = 0;
};

/// Hot messages over the session's rings. Waits spin for spin_us, then sleep on the futex; one of the waiting threads
/// reads the ring for all. doorbell: eventfd that wakes a sleeping daemon.
struct RingChannelConfig {
  std::uint32_t spin_us = 50;
};
/// The segment must outlive the channel, and the channel all calls. Not for use after a fork.
std::unique_ptr<Channel> make_ring_channel(const SegmentView& segment, UniqueFd doorbell,
                                           const RingChannelConfig& config = {});

/// Daemon side. Takes requests of any client and may answer later, from any thread. Calls after the first are ignored;
/// when all copies are gone without a call, the client gets kInternal.
using HotReplyFunction = std::function<void(wire::HotReply reply)>;
class HotHandler {
 public:
  virtual ~HotHandler() = default;
  /// On the server's thread; must not block, also not on a lock that is held while RingServer::remove() is called.
  /// session_id is the authenticated session, request has been parsed and is within kMaxMessageBytes.
  virtual void handle(std::uint64_t session_id, wire::HotRequest request, HotReplyFunction reply) = 0;
  /// The ring of a session is broken, holds what is no message, or its client does not take its replies. Called once
  /// per session, on the server's thread; the rings are no longer served. The handler ends the session.
  virtual void protocol_error(std::uint64_t session_id, const Status& why) = 0;
};

/// One thread that serves the rings of all local sessions: spins while there is work, then sleeps on their doorbells.
class RingServer {
 public:
  struct Config {
    std::uint32_t spin_us = 50;         ///< after the last message; 0 on machines where a core is dear
    std::uint32_t max_in_flight = 256;  ///< unanswered requests per session; more are answered with kBusy
  };
  RingServer(const Config& config, HotHandler& handler);
  ~RingServer();
  /// The segment and doorbell must stay valid until remove() returned. doorbell (an eventfd) stays owned by the caller.
  /// The segment's memory must be sealed against shrinking, since the client has a writable descriptor of it. Throws
  /// std::invalid_argument when the session was already added.
  void add(std::uint64_t session_id, const SegmentView& segment, int doorbell);
  /// After it returns neither the handler is called for the session nor its memory touched; late replies are dropped.
  /// May be called from within the handler.
  void remove(std::uint64_t session_id);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kvern
