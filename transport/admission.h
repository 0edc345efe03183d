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
  /// Called on the server's thread. Fills the answer and the descriptors (dup'ed or owned by the handler: they are
  /// sent, not closed). connection identifies the connection in closed().
  virtual void admit(std::uint64_t connection, const wire::Admit& request, PeerProcess peer, wire::Admitted* answer,
                     std::vector<int>* descriptors) = 0;
  /// The peer closed its end or died.
  virtual void closed(std::uint64_t connection) = 0;
};

class AdmissionServer {
 public:
  /// Binds and listens; an old socket file of that path is removed if nobody listens on it. mode: permissions of the
  /// socket file. Throws std::system_error.
  AdmissionServer(const std::string& path, unsigned mode, AdmissionHandler& handler);
  ~AdmissionServer();
  /// Closes a connection (the session was ended).
  void disconnect(std::uint64_t connection);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Client side: what a session gets from the daemon. Keep connection open for the session's life.
struct AdmittedSession {
  UniqueFd connection;
  wire::Admitted answer;
  UniqueFd slab, index, segment, staging, doorbell;
};
Result<AdmittedSession> request_admission(const std::string& path, const std::string& session_token,
                                          std::chrono::milliseconds timeout);

}  // namespace kvern
