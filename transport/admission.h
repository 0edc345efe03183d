#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "transport/shared_memory.h"
#include "transport/wire.h"

namespace kvern {

/// The Unix socket (SOCK_SEQPACKET) that hands out descriptors to admitted sessions of this host and stays connected:
/// its end tells each side that the other is gone. One Admit in, one Admitted with five descriptors out.

struct PeerProcess {
  pid_t pid = 0;  ///< 0 when the peer lives in a PID namespace that we cannot see
  uid_t uid = 0;
  gid_t gid = 0;
  UniqueFd pidfd;  ///< readable when the process is gone; empty when the kernel or the namespace does not give one
};

class AdmissionHandler {
 public:
  virtual ~AdmissionHandler() = default;
  /// Called on the server's thread; must not block. Fills the answer and the descriptors (owned by the handler: they
  /// are sent, not closed). connection identifies the connection in closed(); it stays open if the answer's status is
  /// ok.
  virtual void admit(std::uint64_t connection, const wire::Admit& request, PeerProcess peer, wire::Admitted* answer,
                     std::vector<int>* descriptors) = 0;
  /// The same for a packet that brings descriptors of device memory to a session that was admitted before.
  virtual Status offer(const wire::Admit& request, std::vector<UniqueFd> descriptors) = 0;
  /// On the server's thread: the peer of an admitted connection closed its end, died, or broke the protocol. Not called
  /// after disconnect() took effect.
  virtual void closed(std::uint64_t connection) = 0;
};

/// What bounds the harm that a peer with access to the socket can do.
struct AdmissionLimits {
  std::size_t max_connections = 1024;  ///< admitted ones; more are answered with kBusy
  std::size_t max_silent = 64;         ///< connections that have not sent their packet yet; the oldest makes room
  std::chrono::milliseconds first_packet_timeout{2000};
};

class AdmissionServer {
 public:
  /// Binds and listens; an old socket file of that path is removed if nobody listens on it. mode: permissions of the
  /// socket file. Throws std::system_error.
  AdmissionServer(const std::string& path, unsigned mode, AdmissionHandler& handler,
                  const AdmissionLimits& limits = {});
  /// Closes all connections without telling the handler.
  ~AdmissionServer();
  /// Closes a connection (the session was ended). From any thread; returns before it has taken effect.
  void disconnect(std::uint64_t connection);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Client side: what a session gets from the daemon. Keep connection open for the session's life; it becomes readable
/// (end of file) when the daemon has ended the session or is gone.
struct AdmittedSession {
  UniqueFd connection;
  wire::Admitted answer;
  UniqueFd slab, index, segment, staging, doorbell;
  UniqueFd daemon;  ///< pidfd of the process that listens; empty where the kernel gives none
};
/// The daemon's refusal comes back as the failure; kUnavailable when no daemon listens or it does not answer in time.
Result<AdmittedSession> request_admission(const std::string& path, const std::string& session_token,
                                          std::chrono::milliseconds timeout);

/// Descriptors that one packet can carry (SCM_MAX_FD of Linux).
inline constexpr std::size_t kMaxOfferedDescriptors = 253;
/// Client side: hands descriptors to the daemon for a session that was admitted. The daemon's refusal comes back as the
/// failure.
Status offer_descriptors(const std::string& path, const std::string& session_token, const std::vector<int>& descriptors,
                         std::chrono::milliseconds timeout);

}  // namespace kvern
