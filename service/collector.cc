#include "service/collector.h"

#include <prometheus/client_metric.h>
#include <prometheus/metric_family.h>
#include <prometheus/metric_type.h>

#include <map>
#include <string>
#include <utility>

#include "transport/wire.h"

namespace kvern {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

/// Samples of one family come one after the other.
class Families {
 public:
  using Labels = std::vector<ClientMetric::Label>;

  void gauge(const char* name, const char* help, double value, Labels labels = {}) {
    ClientMetric& metric = add(name, help, MetricType::Gauge, std::move(labels));
    metric.gauge.value = value;
  }
  void counter(const char* name, const char* help, std::uint64_t value, Labels labels = {}) {
    ClientMetric& metric = add(name, help, MetricType::Counter, std::move(labels));
    metric.counter.value = static_cast<double>(value);
  }
  std::vector<MetricFamily> take() { return std::move(families_); }

 private:
  ClientMetric& add(const char* name, const char* help, MetricType type, Labels labels) {
    if (families_.empty() || families_.back().name != name) {
      MetricFamily& family = families_.emplace_back();
      family.name = name;
      family.help = help;
      family.type = type;
    }
    families_.back().metric.emplace_back().label = std::move(labels);
    return families_.back().metric.back();
  }
  std::vector<MetricFamily> families_;
};

double number(std::uint64_t value) { return static_cast<double>(value); }

}  // namespace

std::vector<MetricFamily> Collector::Collect() const {
  Families out;
  const Families::Labels dram = {{"tier", "dram"}};
  const ChunkStoreStats stats = parts_.store.stats();
  out.gauge("kvern_tier_capacity_bytes", "Size of a tier", number(stats.capacity_bytes), dram);
  out.gauge("kvern_tier_used_bytes", "Bytes of a tier in use", number(stats.used_bytes), dram);
  out.gauge("kvern_tier_chunks", "Complete chunks in a tier", number(stats.chunks), dram);
  out.gauge("kvern_tier_raw_bytes", "Bytes of the stored chunks before encoding", number(stats.raw_bytes), dram);
  out.gauge("kvern_tier_encoded_bytes", "Bytes of the stored chunks after encoding", number(stats.encoded_bytes), dram);
  out.gauge("kvern_incomplete_chunks", "Chunks of which some ranks have not stored their part",
            number(stats.incomplete_chunks));
  out.gauge("kvern_pinned_chunks", "Chunks that a lease holds", number(stats.pinned_chunks));
  out.counter("kvern_evicted_chunks_total", "Chunks that made room for others", stats.evicted_chunks, dram);
  out.counter("kvern_evicted_bytes_total", "Bytes that made room for others", stats.evicted_bytes, dram);
  out.counter("kvern_quarantined_chunks_total", "Chunks that failed verification", stats.quarantined_chunks);
  out.gauge("kvern_recovered_chunks", "Chunks that the last start took over from the run before",
            number(stats.recovered_chunks));
  out.gauge("kvern_recovery_dropped_containers", "Damaged or incomplete containers that the last start found",
            number(stats.dropped_containers));
  out.gauge("kvern_index_slots_used", "Blocks in the index", number(stats.index_slots_used));
  out.gauge("kvern_index_slots", "Slots of the index, of which 3/4 are used at most", number(parts_.index_slots));

  std::map<std::pair<SessionRole, SessionPlane>, std::uint64_t> sessions;
  // All pairs are there from the start, so that a rate or an alert never meets a series that is missing.
  for (const auto role : {SessionRole::kScheduler, SessionRole::kWorker}) {
    for (const auto plane : {SessionPlane::kShm, SessionPlane::kUcx}) sessions[{role, plane}] = 0;
  }
  sessions[{SessionRole::kTool, SessionPlane::kNone}] = 0;
  Session::Holdings total;
  for (const auto& session : parts_.sessions.list()) {
    ++sessions[{session->identity().role, session->identity().plane}];
    const auto holdings = session->holdings();
    total.leases += holdings.leases;
    total.reservations += holdings.reservations;
    total.staging_bytes += holdings.staging_bytes;
    total.staging_used_bytes += holdings.staging_used_bytes;
  }
  for (const auto& [kind, count] : sessions) {
    out.gauge("kvern_sessions", "Connected sessions by role and data plane", number(count),
              {{"role", std::string(role_name(kind.first))}, {"data_plane", std::string(plane_name(kind.second))}});
  }
  out.gauge("kvern_lingering_sessions", "Expired sessions whose process still lives",
            number(parts_.sessions.lingering()));
  out.gauge("kvern_leases", "Leases that sessions hold", number(total.leases));
  out.gauge("kvern_reservations", "Reservations that sessions hold", number(total.reservations));
  out.gauge("kvern_in_flight_shards", "Shards that are reserved or being encoded", number(parts_.in_flight.size()));
  out.gauge("kvern_staging_bytes", "Staging memory of all sessions", number(total.staging_bytes));
  out.gauge("kvern_staging_used_bytes", "Staging memory in use", number(total.staging_used_bytes));
  out.gauge("kvern_encode_queue_length", "Chunks that wait for an encode thread", number(parts_.encoders.queued()));
  out.counter("kvern_dropped_replies_total", "Control replies that nobody took", parts_.dropped_replies());
  out.gauge("kvern_uptime_seconds", "Time since the start",
            static_cast<double>(parts_.clock.now_ns() - parts_.started_ns) * 1e-9);
  out.gauge("kvern_build_info", "1; what is running is in the labels", 1,
            {{"version", KVERN_VERSION}, {"protocol", std::to_string(kProtocolVersion)}});
  return out.take();
}

}  // namespace kvern
