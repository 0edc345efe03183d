#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/executor.h"
#include "service/compactions.h"
#include "service/config.h"
#include "service/device_service.h"
#include "service/event_log.h"
#include "service/inspector.h"
#include "service/metrics.h"
#include "service/namespaces.h"
#include "service/sessions.h"
#include "store/chunk_store.h"
#include "store/tiered_store.h"
#include "transport/admission.h"
#include "transport/channel.h"
#include "transport/control.h"

namespace kvern {

/// Set-up and administration: who may come in, as what, and what operators ask. Thread-safe.
class ControlService final : public ControlHandler, public AdmissionHandler {
 public:
  /// Where remote clients find the bytes; empty version: UCX is off.
  struct UcxEndpoint {
    std::string version;
    std::string host;  ///< empty: the client takes the host that it reached us by
    std::uint16_t port = 0;
  };
  struct Parts {
    const ServiceConfig& config;
    std::uint64_t epoch;
    UcxEndpoint ucx;
    std::map<std::string, std::string> tenants;  ///< by public key
    std::set<std::string> admins;                ///< public keys
    int slab_fd;                                 ///< read-only, of slab_bytes
    int index_fd;
    std::uint64_t slab_bytes;
    std::uint64_t index_bytes;
    Sessions& sessions;
    NamespaceRegistry& namespaces;
    ChunkStore& store;
    TieredStore& tiers;
    EventLog& events;
    Inspector& inspector;
    HotHandler& hot;
    Executor& administration;  ///< for what takes long
    Metrics& metrics;
    DeviceService* devices = nullptr;    ///< nullptr: pages on devices are refused
    Compactions* compactions = nullptr;  ///< nullptr: compact caches are refused
    const Tracer* tracer = nullptr;      ///< nullptr: nothing is recorded
    std::function<std::string()> metrics_text = [] { return std::string(); };  ///< for StatusQuery.with_metrics
  };
  explicit ControlService(Parts parts) : parts_(std::move(parts)) {}

  void handle(const ControlPeer& peer, wire::ControlRequest request, ControlReplyFunction reply) override;
  void malformed(const ControlPeer& peer, const Status& why) override;
  void admit(std::uint64_t connection, const wire::Admit& request, PeerProcess peer, wire::Admitted* answer,
             std::vector<int>* descriptors) override;
  Status offer(const wire::Admit& request, std::vector<UniqueFd> descriptors) override;
  void closed(std::uint64_t connection) override;

  void begin_stop() { stopping_.store(true); }

 private:
  Result<SessionIdentity> hello(const ControlPeer& peer, const wire::Hello& request);
  /// May allocate the session's staging, which takes a tenth of a second.
  Status open_session(SessionIdentity identity, const wire::ControlRequest& request, wire::ControlReply* reply);
  Result<SessionIdentity> identify(const ControlPeer& peer, const wire::Hello& hello) const;
  Result<std::shared_ptr<Session>> authenticate(const ControlPeer& peer, const wire::ControlRequest& request);
  Status register_device_pages(Session& session, const wire::RegisterDevicePages& request,
                               wire::DevicePagesRegistered* answer);
  Status register_namespace(Session& session, const wire::RegisterNamespace& request,
                            wire::NamespaceRegistered* answer);
  Status poll_events(const Session& session, const wire::PollEvents& request, wire::Events* answer) const;
  Status snapshot(const Session& session, const wire::SnapshotQuery& request, wire::Snapshot* answer) const;
  Status compact(const Session& session, const wire::ControlRequest& request);
  Status layer_slots(const Session& session, const wire::LayerSlotsQuery& request, wire::LayerSlots* answer) const;
  void find_compactions(const Session& session, const wire::ControlRequest& request, ControlReplyFunction reply);
  /// Status and explain.
  Status administrate(const wire::ControlRequest& request, wire::ControlReply* reply);
  static Result<FlushScope> flush_scope(const wire::FlushQuery& request);
  void flush(const FlushScope& scope, wire::ControlReply answer, ControlReplyFunction reply);

  Parts parts_;
  std::atomic<bool> stopping_{false};
  std::shared_ptr<Session> last_admitted_;  ///< of the admission thread alone, as its connection
  std::uint64_t last_connection_ = 0;
};

}  // namespace kvern
