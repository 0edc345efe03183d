#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "transport/channel.h"
#include "transport/wire.h"

namespace kvern {

/// A CURVE key pair in Z85 (40 characters each).
struct CurveKeyPair {
  std::string public_key;
  std::string secret_key;
};
Result<CurveKeyPair> generate_curve_keys();

/// Who is at the other end of a control message, as the transport knows it (never what the peer says).
struct ControlPeer {
  bool local = false;      ///< came over the Unix socket
  std::string public_key;  ///< Z85, TCP with CURVE; empty otherwise
};

using ControlReplyFunction = std::function<void(wire::ControlReply reply)>;
class ControlHandler {
 public:
  virtual ~ControlHandler() = default;
  /// On the server's thread; must not block. The reply may come later, from any thread.
  virtual void handle(const ControlPeer& peer, wire::ControlRequest request, ControlReplyFunction reply) = 0;
  /// A frame that is no ControlRequest, too large or has the wrong number of parts. Counted; the peer gets kInvalid.
  virtual void malformed(const ControlPeer& peer, const Status& why) = 0;
};

struct ControlServerConfig {
  std::string unix_path;  ///< ZeroMQ ipc endpoint; empty: none
  unsigned unix_mode = 0660;
  std::string tcp_endpoint;                      ///< "tcp://*:7070"; empty: none
  bool insecure = false;                         ///< TCP without CURVE, only when the operator wrote it out
  std::optional<CurveKeyPair> server_keys;       ///< needed for TCP unless insecure
  std::vector<std::string> allowed_client_keys;  ///< Z85; others are refused by ZAP
  std::size_t max_queued_replies = 4096;         ///< per server; more are dropped and counted
  Status validate() const;
};

/// ZeroMQ ROUTER on its own thread.
class ControlServer {
 public:
  /// Throws std::runtime_error with the endpoint and the reason when it cannot bind.
  ControlServer(const ControlServerConfig& config, ControlHandler& handler);
  ~ControlServer();
  /// The TCP endpoint as it was bound ("tcp://0.0.0.0:7070"), also when the configuration left the port to the system.
  std::string tcp_endpoint() const;
  std::uint64_t dropped_replies() const;
  /// Makes its thread turn once, and how often it has turned: who asks can tell whether it hangs.
  void prod();
  std::uint64_t turns() const;
  /// Ends its thread: nothing is received or sent any more. Once; not concurrently with itself.
  void close();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

struct ControlClientConfig {
  std::string endpoint;    ///< "ipc:///run/kvern/kvernd.sock" or "tcp://host:7070"
  std::string server_key;  ///< Z85; with TCP and CURVE
  std::optional<CurveKeyPair> client_keys;
};

/// ZeroMQ DEALER on its own thread; calls from any number of threads.
class ControlClient {
 public:
  explicit ControlClient(const ControlClientConfig& config);
  ~ControlClient();
  /// Numbers the request (sequence), sends it and waits for its answer. kUnavailable after the time-out.
  Status call(wire::ControlRequest& request, wire::ControlReply* reply, std::chrono::milliseconds timeout);
  void close();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// Hot messages over the control connection, for remote clients. token: of the session.
std::unique_ptr<Channel> make_control_channel(std::shared_ptr<ControlClient> client, std::string session_token);

}  // namespace kvern
