#include "service/daemon.h"

#include <openssl/rand.h>
#include <prometheus/text_serializer.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "base/block_index.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/trace.h"
#include "service/collector.h"
#include "service/compactions.h"
#include "service/control_service.h"
#include "service/device_service.h"
#include "service/event_log.h"
#include "service/hazards.h"
#include "service/hot_service.h"
#include "service/http_server.h"
#include "service/in_flight.h"
#include "service/inspector.h"
#include "service/instance_lock.h"
#include "service/log.h"
#include "service/metrics.h"
#include "service/namespaces.h"
#include "service/pulse.h"
#include "service/remote_data.h"
#include "service/sessions.h"
#include "service/slab_file.h"
#include "service/store_pipeline.h"
#include "service/terms.h"
#include "service/tiers.h"
#include "service/trace_exporter.h"
#include "store/chunk_store.h"
#include "store/demoter.h"
#include "store/eviction_policy.h"
#include "store/tiered_store.h"
#include "transport/admission.h"
#include "transport/channel.h"
#include "transport/control.h"
#include "transport/key_files.h"
#include "transport/shared_memory.h"
#include "transport/ucx.h"

namespace kvern {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;

constexpr std::size_t kAdministrationQueue = 64;
constexpr std::size_t kMaxCuts = 1024;  // that wait for a helper; more are done by who makes the cache
// Threads that verify what comes up from lower tiers: at some 10 GB/s each they keep ahead of any of those.
constexpr std::size_t kMovers = 2;
constexpr std::size_t kMaxMoving = 1U << 16;
// How often time-outs are looked at. Four times a second costs nothing and finds an expiry soon enough.
constexpr milliseconds kTick{250};
// /healthz says so when a thread has not turned for so long after it was asked to.
constexpr std::int64_t kStuckNs = 30'000'000'000;
constexpr milliseconds kStarved{1000};  // what is logged when this thread wakes so much too late
// Freeing what waits to be freed: chunks without all their shards, drops that a lease delayed.
constexpr milliseconds kSweepInterval{1000};
constexpr milliseconds kAbandonCheck{50};

template <typename T>
T or_throw(Result<T> result) {
  if (!result) throw std::runtime_error(result.error().message());
  return std::move(*result);
}

void make_folder(const fs::path& path, fs::perms permissions) {
  std::error_code error;
  if (path.empty() || fs::is_directory(path, error)) return;
  fs::create_directories(path, error);
  if (!error) fs::permissions(path, permissions, error);
  if (error) throw std::runtime_error("cannot make the folder " + path.string() + ": " + error.message());
}

std::uint64_t random_epoch() {
  std::uint64_t epoch = 0;
  while (epoch == 0) {
    if (RAND_bytes(reinterpret_cast<unsigned char*>(&epoch), sizeof epoch) != 1) {
      throw std::runtime_error("the system gives no random bytes");
    }
  }
  return epoch;
}

/// The folders and locks of one daemon. They come before everything else and go after it.
class Premises {
 public:
  explicit Premises(const ServiceConfig& config)
      : run_dir_(config.server.run_dir),
        socket_lock_(
            (make_folder(fs::path(config.server.socket).parent_path(), fs::perms(0755)),
             or_throw(InstanceLock::take(config.server.socket + ".lock", "the socket " + config.server.socket)))),
        run_lock_((make_folder(run_dir_, fs::perms(0700)),
                   or_throw(InstanceLock::take((run_dir_ / "lock").string(), "the folder " + run_dir_.string())))) {}
  ~Premises() {
    std::error_code ignored;
    // Fails when a file is left in it; the lock file goes with run_lock_, so the folder goes after that.
    fs::remove(run_dir_ / "lock", ignored);
    fs::remove(run_dir_, ignored);
  }

 private:
  const fs::path run_dir_;
  InstanceLock socket_lock_;
  InstanceLock run_lock_;
};

ControlServerConfig control_config(const ServiceConfig& config, const std::vector<AllowedClient>& allowed) {
  ControlServerConfig result;
  result.unix_path = config.server.socket;
  result.unix_mode = config.socket_mode();
  if (config.server.tcp_listen.empty()) return result;
  result.tcp_endpoint = "tcp://" + config.server.tcp_listen;
  result.insecure = config.server.insecure;
  if (!config.server.insecure) {
    result.server_keys = or_throw(read_secret_key_file(config.server.server_key_file));
    for (const AllowedClient& client : allowed) result.allowed_client_keys.push_back(client.public_key);
  }
  return result;
}

std::vector<AllowedClient> allowed_clients(const ServiceConfig& config) {
  if (config.server.tcp_listen.empty() || config.server.insecure) return {};
  return or_throw(read_allowed_clients_file(config.server.allowed_clients_file));
}

std::int64_t unix_seconds() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::seconds>(now).count();
}

std::int64_t unix_ns() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

CompactionLimits compaction_limits(const ServiceConfig& config) {
  return {.max_pending = config.compact.max_pending,
          .job_bytes = config.compact.job_bytes,
          .max_handles = config.compact.max_handles,
          .max_ttl_seconds = static_cast<std::int64_t>(config.compact.max_ttl_seconds),
          .collect_ns = static_cast<std::int64_t>(config.store.incomplete_ttl_seconds) * 1'000'000'000};
}

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "";
}

std::vector<std::string> header_lines(const std::string& path) {
  std::vector<std::string> lines;
  if (path.empty()) return lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.pop_back();
    if (line.empty()) continue;
    if (line.find(':') == std::string::npos) {
      throw std::runtime_error("tracing.headers_file " + path + ": a line is not \"Name: value\"");
    }
    lines.push_back(std::move(line));
  }
  if (!file.eof()) throw std::runtime_error("tracing.headers_file " + path + " cannot be read");
  return lines;
}

std::unique_ptr<TraceExporter> make_exporter(const ServiceConfig& config, Metrics& metrics, const Clock& clock) {
  const ServiceConfig::Tracing& tracing = config.tracing;
  if (tracing.endpoint.empty()) return nullptr;
  constexpr std::int64_t kNsPerMs = 1'000'000;
  const std::string host = host_name();
  return std::make_unique<TraceExporter>(
      TraceExporter::Config{.url = tracing.url(),
                            .headers = header_lines(tracing.headers_file),
                            .ca_file = tracing.ca_file,
                            .queue_spans = tracing.queue_spans,
                            .interval_ns = static_cast<std::int64_t>(tracing.interval_ms) * kNsPerMs,
                            .timeout_ns = static_cast<std::int64_t>(tracing.timeout_ms) * kNsPerMs,
                            .resource = {.service_name = tracing.service_name,
                                         .service_version = KVERN_VERSION,
                                         .instance = host + ":" + config.server.socket,
                                         .host = host}},
      TraceExporter::Counters{.exported = metrics.spans_exported,
                              .queue_full = metrics.spans_queue_full,
                              .not_taken = metrics.spans_not_taken},
      clock, unix_ns);
}

bool is_any_address(const std::string& address) { return address == "*" || address == "0.0.0.0" || address == "::"; }

}  // namespace

struct Daemon::State {
  State(const ServiceConfig& config_in, OpenDevice open_device);
  ~State() { shut_down(); }

  void start_servers();
  void shut_down();
  void watch();
  void wake();
  HttpServer::Pages pages();
  std::string metrics_text() const;
  ControlService::UcxEndpoint ucx_endpoint() const;

  const ServiceConfig config;
  const Clock& clock = Clock::system();
  const std::int64_t started_ns = clock.now_ns();
  const std::uint64_t epoch = random_epoch();
  const std::vector<AllowedClient> allowed = allowed_clients(config);
  Premises premises{config};
  SlabFile slab;
  SharedMemory index;
  UniqueFd slab_reader;
  UniqueFd index_reader;

  Metrics metrics;
  std::unique_ptr<TraceExporter> exporter;  ///< null: nothing is recorded; outlives all that records
  std::optional<Tracer> tracer;
  EventLog events;
  HazardRegistry hazards;
  InFlight in_flight;
  std::unique_ptr<ChunkStore> store;
  std::unique_ptr<Demoter> demoter;  // without ladders: none; whoever stores wakes it, so that it outlives them
  ThreadPool movers{"kvern-move", kMovers, kMaxMoving};
  std::unique_ptr<TieredStore> tiers;
  NamespaceRegistry namespaces;
  Sessions sessions;
  ThreadPool encoders;
  ThreadPool administration{"kvern-admin", 1, kAdministrationQueue};
  StorePipeline pipeline;
  DeviceService devices;
  const std::unique_ptr<ThreadPool> compact_helpers;  ///< null: none
  ThreadPool measurers;  // errors of compact caches: one is measured, one more prompt is held for it
  ThreadPool compactors;
  std::unique_ptr<Compactions> compactions;
  HotService hot;
  RemoteData remote;
  Inspector inspector;
  std::atomic<bool> ready{false};
  std::atomic<bool> collecting{false};  ///< the collector is made
  std::atomic<bool> abandoned{false};

  // Those that call into all of the above. Made last, gone first.
  std::unique_ptr<UcxServer> ucx;
  std::unique_ptr<ControlService> control;
  std::unique_ptr<RingServer> rings;
  std::unique_ptr<AdmissionServer> admission;
  std::unique_ptr<ControlServer> control_server;
  std::unique_ptr<Collector> collector;
  std::array<Pulse, 2> pulses{
      Pulse(
          "control", [this] { control_server->prod(); }, [this] { return control_server->turns(); }, kStuckNs),
      Pulse(
          "watcher", [this] { wake(); }, [this] { return watch_turns.load(); }, kStuckNs)};
  std::unique_ptr<HttpServer> http;  ///< asks all of the above

  std::atomic<std::uint64_t> watch_turns{0};
  std::mutex watch_mutex;
  std::condition_variable watch_wake;
  bool woken = false;
  bool watch_ends = false;
  std::thread watcher;
};

Daemon::State::State(const ServiceConfig& config_in, OpenDevice open_device)
    : config(config_in),
      slab(config.server.run_dir + "/slab", config.store.dram_bytes, config.store.warm_restart),
      index(or_throw(SharedMemory::create_named(
          config.server.run_dir + "/index",
          block_index_bytes({.chunk_capacity = config.chunk_capacity(), .slot_count = config.index_slots()})))),
      slab_reader(or_throw(slab.read_only_fd())),
      index_reader(or_throw(index.read_only_fd())),
      exporter(make_exporter(config, metrics, clock)),
      tracer(exporter ? std::optional<Tracer>(std::in_place, *exporter, clock, config.tracing.sample_one_in)
                      : std::nullopt),
      store(std::make_unique<ChunkStore>(
          ChunkStoreConfig{
              .slab_bytes = config.store.dram_bytes,
              .chunk_capacity = config.chunk_capacity(),
              .index_slots = config.index_slots(),
              .generation = epoch,
              .incomplete_ttl_ns = static_cast<std::int64_t>(config.store.incomplete_ttl_seconds) * 1'000'000'000,
              .demotion_free_bytes = config.demotion_free_bytes(),
              .retain_share = static_cast<double>(config.store.retain_percent) / 100},
          slab.bytes(), index.bytes(), or_throw(make_eviction_policy(config.store.eviction)),
          [this](std::unordered_set<std::uint32_t>& claimed) { hazards.collect(claimed); }, clock, slab.map_bytes())),
      tiers(std::make_unique<TieredStore>(*store, make_tiers(config, clock, metrics), movers, TieredStoreConfig{},
                                          [this] { return slab.usable_bytes(); })),
      namespaces([this](const std::map<std::string, std::string>& facts) { return namespace_terms(config, facts); }),
      sessions({.max_sessions = config.sessions.max_sessions,
                .staging_bytes_max = config.sessions.staging_bytes_max,
                .timeout_ns = static_cast<std::int64_t>(config.sessions.timeout_ms) * 1'000'000,
                .tick_ns = std::chrono::nanoseconds(kTick).count()},
               epoch, hazards, clock),
      encoders("kvern-encode", config.encode_threads(), config.pipeline.max_queued),
      pipeline(*store, *tiers, encoders, metrics, clock, [this] { return slab.usable_bytes(); }),
      devices({.store = *store,
               .pipeline = pipeline,
               .encoders = encoders,
               .metrics = metrics,
               .clock = clock,
               .slab = slab.bytes(),
               .usable_bytes = [this] { return slab.usable_bytes(); },
               .open = open_device ? std::move(open_device)
                                   : cuda_devices(static_cast<std::uint32_t>(config.pipeline.device_multiprocessors)),
               .threads = config.pipeline.device_threads}),
      compact_helpers(config.compact.helper_threads == 0
                          ? nullptr
                          : std::make_unique<ThreadPool>("kvern-cut", config.compact.helper_threads, kMaxCuts)),
      measurers("kvern-measure", 1, 1),
      compactors("kvern-compact", config.compact.threads, config.compact.max_pending),
      compactions(std::make_unique<Compactions>(Compactions::Parts{.store = *store,
                                                                   .tiers = *tiers,
                                                                   .pipeline = pipeline,
                                                                   .in_flight = in_flight,
                                                                   .metrics = metrics,
                                                                   .clock = clock,
                                                                   .unix_seconds = unix_seconds,
                                                                   .executor = compactors,
                                                                   .helpers = compact_helpers.get(),
                                                                   .measurers = &measurers},
                                                compaction_limits(config), config.compact_state_dir())),
      hot({.sessions = sessions,
           .store = *store,
           .tiers = *tiers,
           .pipeline = pipeline,
           .in_flight = in_flight,
           .metrics = metrics,
           .clock = clock,
           .slab_bytes = config.store.dram_bytes,
           .devices = &devices,
           .tracer = tracer ? &*tracer : nullptr}),
      remote(sessions, *store),
      inspector({.config = config,
                 .sessions = sessions,
                 .namespaces = namespaces,
                 .store = *store,
                 .tiers = *tiers,
                 .pipeline = pipeline,
                 .encoders = &encoders,
                 .in_flight = in_flight,
                 .events = events,
                 .clock = clock,
                 .epoch = epoch,
                 .started_ns = started_ns,
                 .devices = &devices,
                 .compactions = compactions.get()}) {
  if (const ChunkStoreStats found = store->stats(); found.recovered_chunks + found.dropped_containers > 0) {
    log_info("took chunks over from the run before", {{"chunks", found.recovered_chunks},
                                                      {"bytes", found.recovered_bytes},
                                                      {"damaged_or_incomplete", found.dropped_containers}});
  }
  store->set_removal_listener([this](const ChunkKey& key, std::span<const BlockHash> blocks, std::string_view reason) {
    metrics.chunk_removed(reason);
    if (blocks.empty()) return events.forget();
    events.add({.key = key,
                .blocks = {blocks.begin(), blocks.end()},
                .reason = std::string(reason),
                .time_ns = clock.now_ns()});
  });
  if (config.has_ladders()) {
    demoter = std::make_unique<Demoter>(
        *store, DemoterConfig{.threads = config.ladder.threads}, clock, metrics,
        [this] { return encoders.queued() > 0; }, [this] { return slab.usable_bytes(); });
    store->set_pressure_listener([this] { demoter->wake(); });
  }
  try {
    start_servers();
  } catch (...) {
    shut_down();  // some of them may run already
    throw;
  }
}

ControlService::UcxEndpoint Daemon::State::ucx_endpoint() const {
  if (!ucx) return {};
  const auto& server = config.server;
  const std::string host = !server.ucx_advertise.empty()       ? server.ucx_advertise
                           : is_any_address(server.ucx_listen) ? ""
                                                               : server.ucx_listen;
  return {.version = or_throw(ucx_version()), .host = host, .port = ucx->port()};
}

void Daemon::State::start_servers() {
  sessions.set_hooks({.admitted =
                          [this](const Session& session) {
                            const auto* local = session.local();
                            rings->add(session.id(), local->segment, local->doorbell.get());
                          },
                      .ending = [this](const Session& session) { rings->remove(session.id()); },
                      .ended =
                          [this](const Session& session, SessionEnd why) {
                            // A tool asks and goes away; that it says nothing more is no fault.
                            const bool tool = session.identity().role == SessionRole::kTool;
                            metrics.session_ended(end_name(tool ? SessionEnd::kGoodbye : why));
                            if (tool) return;
                            log_info("session ended", {{"session", session.id()}, {"why", end_name(why)}});
                          },
                      .disconnect = [this](std::uint64_t connection) { admission->disconnect(connection); },
                      .wake = [this] { wake(); }});
  if (!config.server.ucx_listen.empty()) {
    ucx = std::make_unique<UcxServer>(
        UcxServerConfig{.listen_address = config.server.ucx_listen == "*" ? "0.0.0.0" : config.server.ucx_listen,
                        .port = static_cast<std::uint16_t>(config.server.ucx_port),
                        .transports = config.server.ucx_transports,
                        .devices = config.server.ucx_devices},
        remote);
    log_info("UCX listens",
             {{"version", or_throw(ucx_version())}, {"address", config.server.ucx_listen}, {"port", ucx->port()}});
  }
  std::map<std::string, std::string> tenants;
  std::set<std::string> admins;
  for (const AllowedClient& client : allowed) {
    tenants.emplace(client.public_key, client.name);
    if (client.admin) admins.insert(client.public_key);
  }
  control = std::make_unique<ControlService>(ControlService::Parts{.config = config,
                                                                   .epoch = epoch,
                                                                   .ucx = ucx_endpoint(),
                                                                   .tenants = std::move(tenants),
                                                                   .admins = std::move(admins),
                                                                   .slab_fd = slab_reader.get(),
                                                                   .index_fd = index_reader.get(),
                                                                   .slab_bytes = slab.bytes().size(),
                                                                   .index_bytes = index.bytes().size(),
                                                                   .sessions = sessions,
                                                                   .namespaces = namespaces,
                                                                   .store = *store,
                                                                   .tiers = *tiers,
                                                                   .events = events,
                                                                   .inspector = inspector,
                                                                   .hot = hot,
                                                                   .administration = administration,
                                                                   .metrics = metrics,
                                                                   .devices = &devices,
                                                                   .compactions = compactions.get(),
                                                                   .tracer = tracer ? &*tracer : nullptr,
                                                                   .metrics_text = [this] { return metrics_text(); }});
  rings = std::make_unique<RingServer>(
      RingServer::Config{.spin_us = static_cast<std::uint32_t>(config.pipeline.ring_spin_us)}, hot);
  admission = std::make_unique<AdmissionServer>(config.admission_path(), config.socket_mode(), *control,
                                                AdmissionLimits{.max_connections = config.sessions.max_sessions});
  control_server = std::make_unique<ControlServer>(control_config(config, allowed), *control);
  collector = std::make_unique<Collector>(
      Collector::Parts{.sessions = sessions,
                       .store = *store,
                       .tiers = *tiers,
                       .encoders = encoders,
                       .in_flight = in_flight,
                       .clock = clock,
                       .started_ns = started_ns,
                       .index_slots = config.index_slots(),
                       .huge_page_bytes = [this] { return slab.huge_page_bytes(); },
                       .dropped_replies = [this] { return control_server->dropped_replies(); },
                       .devices = devices,
                       .compactions = *compactions});
  collecting.store(true);
  watcher = std::thread([this] { watch(); });
  if (!config.metrics.listen.empty()) http = std::make_unique<HttpServer>(config.metrics.listen, pages());
  ready.store(true);
  log_info("kvernd is ready", {{"version", KVERN_VERSION},
                               {"seconds", static_cast<double>(clock.now_ns() - started_ns) * 1e-9},
                               {"socket", config.server.socket},
                               {"dram", format_bytes(config.store.dram_bytes)},
                               {"folder", config.server.run_dir},
                               {"tcp", config.server.tcp_listen.empty() ? "off" : control_server->tcp_endpoint()}});
}

std::string Daemon::State::metrics_text() const {
  if (!collecting.load()) return "";  // the control plane answers a moment earlier
  auto families = metrics.registry().Collect();
  std::ranges::move(collector->Collect(), std::back_inserter(families));
  return prometheus::TextSerializer().Serialize(families);
}

HttpServer::Pages Daemon::State::pages() {
  return {{"/metrics",
           [this] {
             return HttpAnswer{.content_type = "text/plain; version=0.0.4; charset=utf-8", .body = metrics_text()};
           }},
          {"/healthz",
           [this] {
             for (auto& pulse : pulses) {
               std::string trouble = pulse.trouble(clock.now_ns());
               if (!trouble.empty()) return HttpAnswer{.status = 503, .body = std::move(trouble) + "\n"};
             }
             return HttpAnswer{.body = "ok\n"};
           }},
          {"/readyz", [this] {
             return ready.load() ? HttpAnswer{.body = "ready\n"} : HttpAnswer{.status = 503, .body = "not ready\n"};
           }}};
}

void Daemon::State::watch() {
  std::int64_t next_sweep_ns = 0;
  std::unique_lock lock(watch_mutex);
  while (!watch_ends) {
    const std::int64_t asleep_ns = clock.now_ns();
    watch_wake.wait_for(lock, kTick, [this] { return watch_ends || woken; });
    const auto asleep = std::chrono::nanoseconds(clock.now_ns() - asleep_ns);
    if (asleep > kTick + kStarved) {
      log_warn("the host did not run this process for a while: it was stopped, or others had the processors",
               {{"seconds", std::chrono::duration<double>(asleep - kTick).count()}});
    }
    woken = false;
    watch_turns.fetch_add(1);
    lock.unlock();
    if (slab.stays_smaller()) store->cut_off(slab.usable_bytes());
    sessions.tick();
    compactions->tick();
    tiers->save_victims();
    process_log().tell_left_out();
    if (demoter) demoter->wake();
    if (const std::int64_t now = clock.now_ns(); now >= next_sweep_ns) {
      store->sweep();
      next_sweep_ns = now + std::chrono::nanoseconds(kSweepInterval).count();
    }
    lock.lock();
  }
}

void Daemon::State::wake() {
  {
    std::lock_guard lock(watch_mutex);
    woken = true;
  }
  watch_wake.notify_one();
}

void Daemon::State::shut_down() {
  ready.store(false);
  http.reset();
  compactions->stop();      // answers those that wait for one
  control_server->close();  // it stays: what is being administered asks it for its counts
  administration.drain();
  pipeline.cancel();
  compactors.drain();
  measurers.drain();
  (compact_helpers ? *compact_helpers : compactors).drain();  // which note what was measured
  devices.drain();
  encoders.drain();  // before leases end: nothing is overwritten that a client still reads
  sessions.end_all();
  {
    std::lock_guard lock(watch_mutex);
    watch_ends = true;
  }
  watch_wake.notify_one();
  if (watcher.joinable()) watcher.join();
  if (demoter) demoter->stop();
  const std::uint64_t chunks = store->stats().chunks;
  if (chunks == 0) slab.discard();
  if (config.store.warm_restart && chunks > 0) {
    log_info("chunks stay for the next start; remove the folder to free the memory",
             {{"chunks", chunks}, {"folder", config.server.run_dir}});
  }
}

Daemon::Daemon(const ServiceConfig& config, OpenDevice open_device)
    : state_(std::make_unique<State>(config, std::move(open_device))) {}
Daemon::~Daemon() = default;

void Daemon::drain() {
  State& state = *state_;
  state.ready.store(false);
  state.control->begin_stop();
  state.hot.begin_stop();
  state.sessions.begin_stop();
  log_info("stopping: finishing what was committed");
  const std::int64_t deadline =
      state.clock.now_ns() + static_cast<std::int64_t>(state.config.server.drain_timeout_ms) * 1'000'000;
  while (!state.pipeline.wait_idle(kAbandonCheck)) {
    if (state.abandoned.load() || state.clock.now_ns() >= deadline) {
      log_warn("stopping although chunks are not stored yet", {{"chunks", state.in_flight.size()}});
      break;
    }
  }
  const std::int64_t left_ns = std::max<std::int64_t>(0, deadline - state.clock.now_ns());
  if (const Status saved = state.tiers->wait_saved(state.abandoned.load() ? 0 : left_ns); !saved) {
    log_warn("stopping although tiers do not have all chunks", {{"why", saved.message()}});
  }
}

void Daemon::abandon() {
  state_->abandoned.store(true);
  state_->pipeline.cancel();
}

std::uint16_t Daemon::http_port() const { return state_->http ? state_->http->port() : 0; }
std::string Daemon::tcp_endpoint() const { return state_->control_server->tcp_endpoint(); }

}  // namespace kvern
