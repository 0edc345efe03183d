#include "service/inspector.h"

#include <unistd.h>

#include <nlohmann/json.hpp>
#include <string_view>

#include "service/tiers.h"
#include "transport/wire.h"

namespace kvern {
namespace {

// Namespaces and sessions that a report shows; an answer must fit into a message.
constexpr std::size_t kMaxShown = 256;
// Groups of a model that explanations look through.
constexpr std::uint16_t kMaxGroups = 16;

double seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

nlohmann::json session_json(Session& session, std::int64_t now_ns) {
  const auto& identity = session.identity();
  const auto holdings = session.holdings();
  const auto* local = session.local();
  return {{"id", session.id()},
          {"client_name", identity.client_name},
          {"role", role_name(identity.role)},
          {"data_plane", plane_name(identity.plane)},
          {"devices", holdings.devices},
          {"tenant", identity.tenant},
          {"local", identity.local},
          {"pid", local == nullptr ? 0 : local->pid},
          {"age_seconds", seconds(now_ns - session.created_ns())},
          {"silent_seconds", seconds(now_ns - session.last_seen_ns(now_ns))},
          {"namespaces", holdings.namespaces},
          {"reservations", holdings.reservations},
          {"leases", holdings.leases},
          {"staging_bytes", holdings.staging_bytes},
          {"staging_used_bytes", holdings.staging_used_bytes},
          {"attributes", session.attributes()}};
}

nlohmann::json tier_json(const TieredStoreStats::OfTier& tier) {
  return {{"name", tier.name},
          {"write", write_policy_name(tier.write)},
          {"capacity_bytes", tier.tier.capacity_bytes},
          {"used_bytes", tier.tier.used_bytes},
          {"chunks", tier.tier.objects},
          {"queued_bytes", tier.tier.queued_bytes},
          {"breaker", breaker_state_name(tier.tier.breaker)},
          {"promoted_chunks", tier.promoted_chunks},
          {"saved_chunks", tier.saved_chunks},
          {"unsaved_chunks", tier.unsaved_chunks},
          {"corrupt_chunks", tier.corrupt_chunks}};
}

std::string about_namespace(const Namespace& space) {
  return "namespace " + space.id.to_hex() + " (model " + space.fact("model") + ", tenant " + space.tenant + ")";
}

}  // namespace

std::string Inspector::status_json(bool stopping) const {
  const std::int64_t now = parts_.clock.now_ns();
  const ChunkStoreStats stats = parts_.store.stats();
  auto sessions = nlohmann::json::array();
  for (const auto& session : parts_.sessions.list()) {
    if (sessions.size() < kMaxShown) sessions.push_back(session_json(*session, now));
  }
  auto namespaces = nlohmann::json::array();
  for (const auto& space : parts_.namespaces.all()) {
    if (namespaces.size() >= kMaxShown) break;
    namespaces.push_back({{"id", space->id.to_hex()},
                          {"model", space->fact("model")},
                          {"tenant", space->tenant},
                          {"codec", space->codec_spec},
                          {"ladder", space->storage.ladder ? space->storage.ladder->name() : std::string(kNoLadder)},
                          {"max_relative_error", space->storage.max_relative_error},
                          {"block_tokens", space->shape.block_tokens},
                          {"chunk_tokens", space->shape.chunk_tokens}});
  }
  auto forms = nlohmann::json::array();
  for (const auto& form : parts_.store.forms()) {
    if (forms.size() < kMaxShown) {
      forms.push_back({{"codec", form.codec_spec}, {"chunks", form.chunks}, {"bytes", form.bytes}});
    }
  }
  auto tenants = nlohmann::json::array();
  for (const auto& tenant : parts_.store.tenants()) {
    if (tenants.size() >= kMaxShown) break;
    tenants.push_back({{"name", tenant.tenant},
                       {"used_bytes", tenant.used_bytes},
                       {"limit_bytes", tenant.limit_bytes},
                       {"refused", tenant.refused}});
  }
  auto tiers = nlohmann::json::array();
  for (const auto& tier : parts_.tiers.stats().tiers) tiers.push_back(tier_json(tier));
  auto devices = nlohmann::json::array();
  if (parts_.devices != nullptr) {
    for (const auto& device : parts_.devices->figures()) {
      devices.push_back({{"uuid", device.uuid},
                         {"pinned_bytes", device.pinned_bytes},
                         {"bytes_to_host", device.moved.to_host},
                         {"bytes_to_device", device.moved.to_device}});
    }
  }
  const auto compact = parts_.compactions == nullptr ? Compactions::Figures() : parts_.compactions->figures();
  const nlohmann::json report = {{"version", KVERN_VERSION},
                                 {"protocol", kProtocolVersion},
                                 {"container", kContainerVersion},
                                 {"pid", ::getpid()},
                                 {"epoch", parts_.epoch},
                                 {"state", stopping ? "stopping" : "running"},
                                 {"uptime_seconds", seconds(now - parts_.started_ns)},
                                 {"socket", parts_.config.server.socket},
                                 {"shm_dir", parts_.config.server.run_dir},
                                 {"tcp_listen", parts_.config.server.tcp_listen},
                                 {"data_plane", parts_.config.server.data_plane},
                                 {"ucx_listen", parts_.config.server.ucx_listen},
                                 {"store",
                                  {{"capacity_bytes", stats.capacity_bytes},
                                   {"used_bytes", stats.used_bytes},
                                   {"chunks", stats.chunks},
                                   {"incomplete_chunks", stats.incomplete_chunks},
                                   {"retained_chunks", stats.retained_chunks},
                                   {"retained_bytes", stats.retained_bytes},
                                   {"pinned_chunks", stats.pinned_chunks},
                                   {"raw_bytes", stats.raw_bytes},
                                   {"encoded_bytes", stats.encoded_bytes},
                                   {"evicted_chunks", stats.evicted_chunks},
                                   {"evicted_bytes", stats.evicted_bytes},
                                   {"superseded_chunks", stats.superseded_chunks},
                                   {"quarantined_chunks", stats.quarantined_chunks},
                                   {"demoted_chunks", stats.demoted_chunks},
                                   {"demoted_bytes", stats.demoted_bytes},
                                   {"forms", std::move(forms)},
                                   {"index_slots_used", stats.index_slots_used},
                                   {"index_slots", parts_.config.index_slots()},
                                   {"eviction", parts_.config.store.eviction}}},
                                 {"tenants", std::move(tenants)},
                                 {"lower_tiers", std::move(tiers)},
                                 {"devices", std::move(devices)},
                                 {"compact_caches",
                                  {{"pending", compact.pending},
                                   {"ready", compact.ready},
                                   {"failed", compact.failed},
                                   {"stored_bytes", compact.stored_bytes}}},
                                 {"pipeline",
                                  {{"threads", parts_.config.encode_threads()},
                                   {"queued", parts_.encoders == nullptr ? 0 : parts_.encoders->queued()},
                                   {"in_flight", parts_.in_flight.size()},
                                   {"stored", parts_.pipeline.stored()},
                                   {"failed", parts_.pipeline.failed()}}},
                                 {"sessions", std::move(sessions)},
                                 {"lingering_sessions", parts_.sessions.lingering()},
                                 {"namespaces", std::move(namespaces)}};
  // Names come from clients: what is no UTF-8 is shown as such, not thrown at us.
  return report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::vector<std::string> Inspector::explain(const BlockHash& block,
                                            const std::optional<NamespaceId>& namespace_id) const {
  std::vector<std::string> lines;
  auto spaces = parts_.namespaces.all();
  if (namespace_id) {
    std::erase_if(spaces, [&](const auto& space) { return space->id != *namespace_id; });
    if (spaces.empty()) {
      return {"No session has registered the namespace " + namespace_id->to_hex() +
              " since the daemon started: nothing can "
              "be found in it."};
    }
  }
  for (const auto& space : spaces) {
    for (std::uint16_t group = 0; group < kMaxGroups; ++group) {
      const auto chunk = parts_.store.describe(space->id, group, block);
      if (!chunk) continue;
      lines.push_back("Stored in " + about_namespace(*space) + ", group " + std::to_string(group) + ": in the chunk " +
                      chunk->key.last_block.to_hex() + " of " + std::to_string(chunk->blocks.size()) + " blocks (" +
                      std::to_string(chunk->tokens) + " tokens), tier dram, codec " + chunk->codec_spec + ", " +
                      std::to_string(chunk->encoded_bytes) + " bytes for " + std::to_string(chunk->raw_bytes) +
                      ", in " + std::to_string(chunk->shards) + " shard(s).");
    }
  }
  if (!lines.empty()) return lines;
  lines.push_back("Not stored in any of the " + std::to_string(spaces.size()) + " namespace(s) that were looked at.");
  if (parts_.in_flight.has_chunk_of(block))
    lines.push_back("A session is storing the chunk that ends with it right now.");
  if (const auto removal = parts_.events.last_removal_of(block)) {
    lines.push_back("Its chunk left the store " +
                    std::to_string((parts_.clock.now_ns() - removal->time_ns) / 1'000'000'000) +
                    " s ago: " + removal->reason + ".");
  } else {
    lines.push_back(
        "It was not removed lately either: it was never stored here, or not by all ranks, or under other facts "
        "(weights, "
        "LoRA, dtype, RoPE, hash seed, tenant), which make another namespace. An engine makes the same hashes after a "
        "restart only with a fixed PYTHONHASHSEED.");
  }
  return lines;
}

}  // namespace kvern
