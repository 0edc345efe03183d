#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/status.h"
#include "transport/data_plane.h"

namespace kvern {

/// UCX data plane for other hosts: active messages with rendezvous (which UCX turns into RDMA reads where the wire has
/// them), each bound to an admitted session by its token. The bytes are not encrypted, and UCX itself trusts its peers:
/// for trusted networks alone. UCX is loaded and initialised only by these classes' users (transport/ucx_module.h).

/// Sets the variables (UCX_*) that Kvern needs otherwise than UCX has them, where the user did not: UCX reads them from
/// the environment alone. To change it while another thread reads it is undefined, and crashes: called before UCX is
/// used, by a thread beside which nothing reads the environment. Idempotent; UcxServer calls it.
void prepare_ucx_environment();

/// "1.13.1" of the library that is loaded; checked against the headers: an older library is kRefused. kUnavailable when
/// Kvern's UCX module or UCX itself is not installed.
Result<std::string> ucx_version();

struct UcxServerConfig {
  std::string listen_address = "0.0.0.0";
  std::uint16_t port = 0;  ///< 0: chosen by the system
  std::string transports;  ///< UCX_TLS; empty: what UCX finds, without shared memory (that is our own path)
  std::string devices;     ///< UCX_NET_DEVICES; empty: all
  std::size_t max_pull_bytes = 1U << 30;           ///< of one push or pull
  std::chrono::milliseconds stall_timeout{30000};  ///< a peer that takes or gives nothing for so long is cut off
};

/// Called on the server's thread; must not block. Every begin_ that gave a span is followed by one -ed, also when the
/// peer dies; by then nothing touches the span any more.
class UcxServerHandler {
 public:
  virtual ~UcxServerHandler() = default;
  /// Where the payload of a push goes: checks token and reservation; the span stays valid until pushed() was called.
  virtual Result<std::span<std::byte>> begin_push(const std::string& session_token, std::uint64_t reservation_id,
                                                  std::uint64_t offset, std::size_t bytes) = 0;
  virtual void pushed(const std::string& session_token, std::uint64_t reservation_id, const Status& status) = 0;
  /// Readable bytes for a pull: checks token and lease; stays valid until pulled() was called.
  virtual Result<std::span<const std::byte>> begin_pull(const std::string& session_token, std::uint64_t lease_id,
                                                        std::uint64_t offset, std::size_t bytes) = 0;
  virtual void pulled(const std::string& session_token, std::uint64_t lease_id, const Status& status) = 0;
};

/// Listener and worker on an own thread.
class UcxServer {
 public:
  /// Throws std::runtime_error with a sentence when UCX cannot start or the address is taken.
  UcxServer(const UcxServerConfig& config, UcxServerHandler& handler);
  ~UcxServer();
  std::uint16_t port() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct UcxClientConfig {
  std::string host;
  std::uint16_t port = 0;
  std::string session_token;
  std::size_t staging_bytes = 0;
  std::string transports;
  std::string devices;
  std::chrono::milliseconds timeout{30000};  ///< without any transfer ending: the daemon is taken for dead
};
/// Connects; prepare_ucx_environment() was called before. A plane whose connection broke answers kUnavailable for good:
/// register again and make another. The plane keeps its own staging memory, laid out like the daemon's.
Result<std::unique_ptr<DataPlane>> make_ucx_data_plane(const UcxClientConfig& config);

}  // namespace kvern
