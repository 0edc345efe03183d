#pragma once

#include <prometheus/collectable.h>

#include <functional>
#include <vector>

#include "base/clock.h"
#include "base/executor.h"
#include "service/compactions.h"
#include "service/device_service.h"
#include "service/in_flight.h"
#include "service/sessions.h"
#include "store/chunk_store.h"
#include "store/tiered_store.h"

namespace kvern {

/// Figures that others keep, read when Prometheus asks: occupancy, sessions, leases, queues.
class Collector final : public prometheus::Collectable {
 public:
  struct Parts {
    const Sessions& sessions;
    const ChunkStore& store;
    const TieredStore& tiers;
    const ThreadPool& encoders;
    const InFlight& in_flight;
    const Clock& clock;
    std::int64_t started_ns;
    std::uint64_t index_slots;
    std::function<std::uint64_t()> huge_page_bytes;  ///< of the slab
    std::function<std::uint64_t()> dropped_replies;
    const DeviceService& devices;
    const Compactions& compactions;
  };
  explicit Collector(Parts parts) : parts_(std::move(parts)) {}
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const Parts parts_;
};

}  // namespace kvern
