#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/executor.h"
#include "service/compactions.h"
#include "service/config.h"
#include "service/device_service.h"
#include "service/event_log.h"
#include "service/in_flight.h"
#include "service/namespaces.h"
#include "service/sessions.h"
#include "service/store_pipeline.h"
#include "store/chunk_store.h"
#include "store/tiered_store.h"

namespace kvern {

/// Answers the questions of operators. Reads only; may take milliseconds, so it is not called from threads that serve
/// messages.
class Inspector {
 public:
  struct Parts {
    const ServiceConfig& config;
    const Sessions& sessions;
    const NamespaceRegistry& namespaces;
    const ChunkStore& store;
    const TieredStore& tiers;
    const StorePipeline& pipeline;
    const ThreadPool* encoders;  ///< for the length of its queue
    const InFlight& in_flight;
    const EventLog& events;
    const Clock& clock;
    std::uint64_t epoch;
    std::int64_t started_ns;
    const DeviceService* devices = nullptr;
    const Compactions* compactions = nullptr;
  };
  explicit Inspector(const Parts& parts) : parts_(parts) {}

  /// One JSON object for kvernctl status.
  std::string status_json(bool stopping) const;
  /// Why this block is (not) found, in sentences. No namespace: in all of them.
  std::vector<std::string> explain(const BlockHash& block, const std::optional<NamespaceId>& namespace_id) const;

 private:
  const Parts parts_;
};

}  // namespace kvern
