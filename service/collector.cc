#include "service/collector.h"

#include <prometheus/client_metric.h>
#include <prometheus/metric_family.h>
#include <prometheus/metric_type.h>

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "service/log.h"
#include "service/metrics.h"
#include "transport/wire.h"

namespace kvern {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

// More forms than ladders and sensible chains have go under one label.
constexpr std::size_t kMaxForms = 32;

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

double breaker_number(BreakerState state) {
  return state == BreakerState::kClosed ? 0 : state == BreakerState::kHalfOpen ? 1 : 2;
}

}  // namespace

std::vector<MetricFamily> Collector::Collect() const {
  Families out;
  const Families::Labels dram = {{"tier", "dram"}};
  const ChunkStoreStats stats = parts_.store.stats();
  const TieredStoreStats lower = parts_.tiers.stats();
  // Samples of a family must lie together: one family after the other, over all tiers.
  const auto of_tiers = [&](auto add, auto value) {
    for (const auto& tier : lower.tiers) add(value(tier), Families::Labels{{"tier", tier.name}});
  };
  const auto gauges = [&](const char* name, const char* help, std::optional<std::uint64_t> of_dram, auto value) {
    if (of_dram) out.gauge(name, help, number(*of_dram), dram);
    of_tiers([&](double each, Families::Labels labels) { out.gauge(name, help, each, std::move(labels)); }, value);
  };
  const auto counters = [&](const char* name, const char* help, std::uint64_t TieredStoreStats::OfTier::*field) {
    for (const auto& tier : lower.tiers) out.counter(name, help, tier.*field, {{"tier", tier.name}});
  };
  gauges("kvern_tier_capacity_bytes", "Size of a tier; 0: not known", stats.capacity_bytes,
         [](const auto& tier) { return number(tier.tier.capacity_bytes); });
  gauges("kvern_tier_used_bytes", "Bytes of a tier in use", stats.used_bytes,
         [](const auto& tier) { return number(tier.tier.used_bytes); });
  gauges("kvern_tier_chunks", "Complete chunks in a tier", stats.chunks,
         [](const auto& tier) { return number(tier.tier.objects); });
  gauges("kvern_tier_queued_bytes", "Bytes that wait to be written to a tier", std::nullopt,
         [](const auto& tier) { return number(tier.tier.queued_bytes); });
  gauges("kvern_tier_outstanding_operations", "Operations of a tier that have not ended", std::nullopt,
         [](const auto& tier) { return number(tier.tier.outstanding); });
  gauges("kvern_tier_breaker_state", "0: closed, 1: half open, 2: open, the tier is not asked", std::nullopt,
         [](const auto& tier) { return breaker_number(tier.tier.breaker); });
  counters("kvern_promoted_chunks_total", "Chunks that came up from a tier",
           &TieredStoreStats::OfTier::promoted_chunks);
  counters("kvern_promoted_bytes_total", "Bytes that came up from a tier", &TieredStoreStats::OfTier::promoted_bytes);
  counters("kvern_promoted_tokens_total", "Tokens that came up from a tier",
           &TieredStoreStats::OfTier::promoted_tokens);
  counters("kvern_saved_chunks_total", "Chunks that were written to a tier", &TieredStoreStats::OfTier::saved_chunks);
  counters("kvern_unsaved_chunks_total", "Chunks whose writing to a tier was given up",
           &TieredStoreStats::OfTier::unsaved_chunks);
  counters("kvern_corrupt_objects_total", "Chunks that a tier gave back damaged, and that were erased there",
           &TieredStoreStats::OfTier::corrupt_chunks);
  out.gauge("kvern_prefetches", "Look-ups for which chunks are on their way up", number(lower.prefetches));
  out.gauge("kvern_tier_raw_bytes", "Bytes of the stored chunks before encoding", number(stats.raw_bytes), dram);
  out.gauge("kvern_tier_encoded_bytes", "Bytes of the stored chunks after encoding", number(stats.encoded_bytes), dram);
  out.gauge("kvern_retained_chunks", "Chunks that requests want kept", number(stats.retained_chunks), dram);
  out.gauge("kvern_retained_bytes", "Bytes of the chunks that requests want kept", number(stats.retained_bytes), dram);
  // Chains that clients choose are not labels; forms with one label are one series.
  std::map<std::string, StoredFormStats> forms;
  for (const StoredFormStats& form : parts_.store.forms()) {
    const std::string label = rung_label(form.codec_spec);
    StoredFormStats& sum = forms.contains(label) || forms.size() < kMaxForms ? forms[label] : forms["other"];
    sum.chunks += form.chunks;
    sum.bytes += form.bytes;
  }
  for (const auto& [label, form] : forms) {
    out.gauge("kvern_form_chunks", "Complete chunks by the form in which they are stored", number(form.chunks),
              {{"codec", label}, {"tier", "dram"}});
  }
  for (const auto& [label, form] : forms) {
    out.gauge("kvern_form_bytes", "Bytes of complete chunks by the form in which they are stored", number(form.bytes),
              {{"codec", label}, {"tier", "dram"}});
  }
  for (std::size_t i = 0; i < stats.of_lossy_generations.size(); ++i) {
    out.gauge("kvern_lossy_generation_chunks", "Complete chunks by the number of lossy encodings behind them",
              number(stats.of_lossy_generations[i]), {{"generations", std::to_string(i)}, {"tier", "dram"}});
  }
  // Tenants are those of the configuration and the keys, and few.
  const auto tenants = parts_.store.tenants();
  for (const auto& tenant : tenants) {
    out.gauge("kvern_tenant_used_bytes", "Bytes of the DRAM tier that a tenant with a quota holds",
              number(tenant.used_bytes), {{"tenant", tenant.tenant}});
  }
  for (const auto& tenant : tenants) {
    out.gauge("kvern_tenant_limit_bytes", "What a tenant may hold", number(tenant.limit_bytes),
              {{"tenant", tenant.tenant}});
  }
  for (const auto& tenant : tenants) {
    out.counter("kvern_tenant_refused_total", "Containers for which a tenant had no room left", tenant.refused,
                {{"tenant", tenant.tenant}});
  }
  const auto compact = parts_.compactions.figures();
  const char* handles = "Compact caches by state";
  out.gauge("kvern_compact_caches", handles, number(compact.pending), {{"state", "pending"}});
  out.gauge("kvern_compact_caches", handles, number(compact.ready), {{"state", "ready"}});
  out.gauge("kvern_compact_caches", handles, number(compact.failed), {{"state", "failed"}});
  out.gauge("kvern_compact_bytes", "Bytes of compact caches that are ready, as they were stored",
            number(compact.stored_bytes));
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
  out.gauge("kvern_dram_huge_page_bytes", "Of the DRAM tier's memory, what is in huge pages",
            number(parts_.huge_page_bytes()));
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
  std::uint64_t to_host = 0;
  std::uint64_t to_device = 0;
  std::uint64_t pinned = 0;
  for (const auto& device : parts_.devices.figures()) {
    to_host += device.moved.to_host;
    to_device += device.moved.to_device;
    pinned += device.pinned_bytes;
  }
  const char* bus = "Bytes between devices and host memory, as they crossed the bus";
  out.counter("kvern_device_bus_bytes_total", bus, to_host, {{"direction", "to_host"}});
  out.counter("kvern_device_bus_bytes_total", bus, to_device, {{"direction", "to_device"}});
  out.gauge("kvern_device_pinned_bytes", "Host memory that devices reach without copies in between", number(pinned));
  out.gauge("kvern_encode_queue_length", "Chunks that wait for an encode thread", number(parts_.encoders.queued()));
  out.counter("kvern_dropped_replies_total", "Control replies that nobody took", parts_.dropped_replies());
  out.counter("kvern_log_lines_left_out_total", "Lines of the log that were one too many of their kind in a second",
              process_log().left_out());
  out.gauge("kvern_uptime_seconds", "Time since the start",
            static_cast<double>(parts_.clock.now_ns() - parts_.started_ns) * 1e-9);
  out.gauge("kvern_build_info", "1; what is running is in the labels", 1,
            {{"version", KVERN_VERSION}, {"protocol", std::to_string(kProtocolVersion)}});
  return out.take();
}

}  // namespace kvern
