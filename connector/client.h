#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/block_index.h"
#include "base/keys.h"
#include "base/status.h"
#include "connector/event_feed.h"
#include "transport/channel.h"
#include "transport/control.h"
#include "transport/data_plane.h"
#include "transport/session_segment.h"

namespace kvern {

struct ClientConfig {
  std::string address;                            ///< "unix:///run/kvern/kvernd.sock" or "tcp://host:7070"
  std::string data_plane = "auto";                ///< auto | shm | ucx
  std::string server_key_file;                    ///< public CURVE key of the daemon (TCP)
  std::string client_key_file;                    ///< own CURVE key pair (TCP), as `kvernctl keygen` writes it
  bool insecure = false;                          ///< TCP without CURVE
  std::string profiles;                           ///< folder of model profiles, for the whole process; empty: as it is
  std::string client_name;                        ///< for logs and `kvernctl status`
  std::map<std::string, std::string> attributes;  ///< of the engine, for `kvernctl status` and `doctor`: vllm, model, …
  bool scheduler = false;                         ///< role in the handshake: scheduler, otherwise worker
  std::uint64_t staging_bytes = 256U << 20;
  std::uint32_t connect_timeout_ms = 2000;
  std::uint32_t call_timeout_ms = 10'000;
  std::uint32_t backoff_min_ms = 100;
  std::uint32_t backoff_max_ms = 5000;
  Status validate() const;
};

/// A namespace as the client knows it: the facts, and how its chunks are cut.
struct NamespaceSpec {
  std::map<std::string, std::string> fields;  ///< sent to the daemon; see service/namespaces.h for the required names
};

/// One admitted session: all that is needed to talk to the daemon until it, or the daemon, ends. Immutable and shared
/// by those who use it; thread-safe. When a namespace is added later, a copy with the same number takes its place.
struct Session {
  std::shared_ptr<void> resources;  ///< mappings; first, so that they are released last
  std::uint64_t session_id = 0;
  std::uint64_t epoch = 0;
  std::uint64_t number = 0;  ///< counts sessions of this client: 1 for the first
  bool local = false;
  bool lower_tiers = false;  ///< the daemon has more than its index shows
  std::shared_ptr<Channel> channel;
  std::shared_ptr<DataPlane> data_plane;
  std::shared_ptr<ControlClient> control;
  std::string token;
  std::string admission_path;                ///< local sessions: where descriptors are offered
  std::shared_ptr<std::atomic<bool>> ended;  ///< set by the client when it gives the session up
  // Local sessions only:
  std::shared_ptr<UniqueFd> connection;  ///< its end tells that the daemon is gone
  std::shared_ptr<UniqueFd> daemon;      ///< its pidfd; empty where the kernel gives none
  std::optional<BlockIndexReader> index;
  std::optional<SegmentView> segment;
  std::shared_ptr<HazardSlots> hazards;
  /// nullopt for a namespace that the daemon refused (the reason is in refusals).
  std::vector<std::optional<NamespaceId>> namespace_ids;  ///< by handle
  std::vector<std::string> codec_specs;                   ///< by handle: the daemon's choice
  std::vector<std::string> refusals;                      ///< by handle

  /// True while leases and claims of this session mean something: read it after decoding, before reporting success.
  bool alive() const;
  /// Waits until the daemon's process is gone, or as long as that: one that lives on has ended the session in order.
  void wait_for_daemons_end(std::chrono::milliseconds at_most) const;
  /// nullopt when the daemon refused it or does not know it yet.
  std::optional<NamespaceId> namespace_id(int handle) const;
  /// Why a namespace has no id, in a sentence; empty when it has one.
  std::string refusal(int handle) const;
};

enum class ClientState { kConnecting, kReady, kRefused, kClosed };

/// Counts and durations that only the client sees, for the daemon's metrics.
struct UsageReport {
  std::uint64_t hit_tokens = 0;
  std::uint64_t requested_tokens = 0;
  std::uint64_t loaded_tokens = 0;
  std::uint64_t loaded_raw_bytes = 0;
  std::uint64_t loaded_encoded_bytes = 0;
  std::uint64_t failed_loads = 0;
  std::vector<double> load_seconds;
  std::vector<double> match_seconds;
  std::string codec_spec;  ///< of what was loaded, by add_codec()
};

/// A connection that heals itself. A thread connects, registers the namespaces, sends heartbeats, notices the daemon's
/// death (end of the admission connection) and comes back with back-off. Nothing here blocks the caller, but
/// wait_ready() and close(). What a user should know (which data plane, a namespace that is refused, a lost daemon)
/// goes to standard error, once, on lines that begin with "kvern: ".
class Client {
 public:
  /// Throws std::invalid_argument when the configuration does not validate.
  explicit Client(ClientConfig config);
  ~Client();

  /// Registers a namespace now and after each reconnect; returns its handle. Thread-safe, does not wait.
  int add_namespace(NamespaceSpec spec);
  /// The live session, or nullptr. Holding it keeps its memory mapped, not the daemon alive.
  std::shared_ptr<const Session> session() const;
  ClientState state() const;
  /// Why it is not ready, in a sentence; empty when it is.
  std::string problem() const;
  /// Waits for a session that knows all namespaces added so far; for tools and tests, never for engine callbacks.
  bool wait_ready(std::uint32_t timeout_ms) const;
  /// Sessions so far: the caller that sees a new number takes a snapshot.
  std::uint64_t session_count() const;
  const ClientConfig& config() const;
  EventFeed& events();
  /// Adds to what goes to the daemon with the next heartbeat.
  void report(const UsageReport& usage);
  /// Adds to the attributes; they go to the daemon with the next heartbeat, and to every later session.
  void describe(const std::string& attribute, std::string value);
  /// Says goodbye to the daemon and ends the thread. Idempotent.
  void close();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvern
