#include "connector/transfer_worker.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "connector/device_group.h"
#include "connector/load_batch.h"
#include "connector/store_batch.h"
#include "transport/service_thread.h"

namespace kvern {
namespace {

using SteadyClock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/// One Fetch per batch costs some 20 µs; 32 pieces make that small beside the decoding of even 256 KiB chunks.
constexpr std::size_t kLocalPiecesPerBatch = 32;
/// Over a network, smaller batches let one thread pull while another decodes.
constexpr std::size_t kRemotePiecesPerBatch = 4;
/// A store batch of this size takes a few milliseconds: long against a Reserve, short for a load that waits.
constexpr std::size_t kStoreBatchBytes = 64U << 20;
constexpr std::size_t kStoreBatchChunks = 32;
/// The next batch is gathered while the previous one is committed, so no batch takes more than this share of staging.
constexpr std::size_t kStagingShare = 2;
/// A process that was killed is gone in milliseconds.
constexpr milliseconds kDaemonsEnd{2000};
/// How soon a store asks again after "no room", unless a commit ends earlier.
constexpr milliseconds kRoomRetry{5};
/// Commits that are under way at the same time: while one is answered the daemon has the next at hand.
constexpr std::size_t kErrandThreads = 2;

double seconds_since(SteadyClock::time_point start) {
  return std::chrono::duration<double>(SteadyClock::now() - start).count();
}

struct Load {
  LoadJob job;
  std::shared_ptr<const Session> session;
  NamespaceId namespace_id;
  SteadyClock::time_point start;
  SteadyClock::time_point deadline;
  std::size_t batch_pieces = 1;
  std::atomic<bool> cancelled = false;
  // Under the worker's mutex:
  std::size_t next_piece = 0;
  std::size_t running = 0;
  Status status;
  LoadedBytes loaded;
  TakenLeases leases;

  bool all_taken() const { return next_piece >= job.pieces.size() || !status; }
};

struct Store {
  StoreJob job;
  std::shared_ptr<const Session> session;
  NamespaceId namespace_id;
  const GroupPages* pages = nullptr;
  SteadyClock::time_point start;
  SteadyClock::time_point deadline;
  std::deque<std::uint32_t> todo;  ///< belongs to the thread that runs a batch
  // Under the worker's mutex:
  SteadyClock::time_point not_before;
  std::size_t pending_commits = 0;
  bool gathered = false;
  std::vector<std::uint32_t> stored;
  std::string reason;
  std::uint64_t raw_bytes = 0;
};

}  // namespace

Status WorkerConfig::validate() const {
  if (threads == 0 || threads > 256) return {Code::kInvalid, "threads must be between 1 and 256"};
  if (max_queued_jobs == 0 || load_timeout_ms == 0 || store_timeout_ms == 0) {
    return {Code::kInvalid, "max_queued_jobs and the time-outs must be positive"};
  }
  return Status::ok();
}

struct TransferWorker::State {
  State(std::shared_ptr<Client> own_client, const WorkerConfig& worker_config)
      : client(std::move(own_client)), config(worker_config) {}

  const std::shared_ptr<Client> client;
  const WorkerConfig config;

  mutable std::mutex mutex;
  std::condition_variable work;  ///< for job threads
  std::condition_variable errands_wait;
  std::condition_variable settled;  ///< a store was gathered or a job ended
  std::map<std::uint16_t, GroupPages> groups;
  std::map<std::uint16_t, std::unique_ptr<DeviceGroup>> device_groups;
  std::deque<std::shared_ptr<Load>> loads;  ///< with batches that nobody has taken
  std::deque<std::shared_ptr<Store>> stores;
  std::deque<std::function<void()>> errands;  ///< commits and releases
  std::unordered_map<std::uint64_t, std::shared_ptr<Load>> live_loads;
  std::unordered_set<std::uint64_t> ungathered;
  std::size_t jobs = 0;
  bool stopping = false;
  bool errands_stopping = false;

  std::vector<JobResult> events;
  std::atomic<std::size_t> event_count{0};

  std::vector<std::thread> job_threads;
  std::vector<std::thread> errand_threads;

  milliseconds call_timeout() const { return milliseconds(client->config().call_timeout_ms); }
  const GroupPages* pages(std::uint16_t group) const {
    const auto found = groups.find(group);
    return found == groups.end() ? nullptr : &found->second;
  }
  DeviceGroup* device(std::uint16_t group) const {
    const auto found = device_groups.find(group);
    return found == device_groups.end() ? nullptr : found->second.get();
  }
  void push_event_locked(JobResult event) {
    events.push_back(std::move(event));
    event_count.store(events.size(), std::memory_order_release);
  }
  void add_errand_locked(std::function<void()> errand) {
    errands.push_back(std::move(errand));
    errands_wait.notify_one();
  }
  void start_job_thread_locked() {
    job_threads.push_back(start_service_thread("kvern-worker", [this] { run_jobs(); }));
  }

  void run_jobs();
  void run_errands();
  std::shared_ptr<Store> take_store_locked(std::optional<SteadyClock::time_point>* next);
  void run_load_batch(const std::shared_ptr<Load>& load, std::span<const LoadPiece> pieces);
  void end_load(const std::shared_ptr<Load>& load);
  void zero_pages(const Load& load);
  void fail_load_locked(const LoadJob& job, std::string reason);
  bool run_store_batch(const std::shared_ptr<Store>& store, bool closing);
  std::vector<std::uint32_t> next_batch(const Store& store, bool staged) const;
  void end_gathering(const std::shared_ptr<Store>& store);
  void commit(const std::shared_ptr<Store>& store, const std::vector<GatheredChunk>& gathered);
  void end_store_locked(Store& store);
  void drop_store_locked(const StoreJob& job, const std::string& reason);
  void end_compaction_locked(std::uint64_t id, const Status& status, double seconds);
};

// ---------------------------------------------------------------- threads

std::shared_ptr<Store> TransferWorker::State::take_store_locked(std::optional<SteadyClock::time_point>* next) {
  const auto now = SteadyClock::now();
  for (auto at = stores.begin(); at != stores.end(); ++at) {
    if ((*at)->not_before <= now || stopping) {
      auto store = std::move(*at);
      stores.erase(at);
      return store;
    }
    *next = *next ? std::min(**next, (*at)->not_before) : (*at)->not_before;
  }
  return nullptr;
}

void TransferWorker::State::run_jobs() {
  std::unique_lock lock(mutex);
  while (true) {
    if (!loads.empty()) {
      const auto load = loads.front();
      const std::size_t begin = load->next_piece;
      const std::size_t count = std::min(load->batch_pieces, load->job.pieces.size() - begin);
      load->next_piece += count;
      ++load->running;
      if (load->all_taken()) loads.pop_front();
      lock.unlock();
      run_load_batch(load, std::span(load->job.pieces).subspan(begin, count));
      lock.lock();
      continue;
    }
    std::optional<SteadyClock::time_point> next;
    if (auto store = take_store_locked(&next)) {
      const bool closing = stopping;
      lock.unlock();
      const bool more = run_store_batch(store, closing);
      if (!more) end_gathering(store);
      lock.lock();
      if (more) stores.push_front(std::move(store));
      continue;
    }
    if (stopping) return;
    if (next) {
      work.wait_until(lock, *next);
    } else {
      work.wait(lock);
    }
  }
}

void TransferWorker::State::run_errands() {
  std::unique_lock lock(mutex);
  while (true) {
    errands_wait.wait(lock, [&] { return errands_stopping || !errands.empty(); });
    if (errands.empty()) return;
    const auto errand = std::move(errands.front());
    errands.pop_front();
    lock.unlock();
    errand();
    lock.lock();
  }
}

// ---------------------------------------------------------------- loads

void TransferWorker::State::run_load_batch(const std::shared_ptr<Load>& load, std::span<const LoadPiece> pieces) {
  LoadedBytes loaded;
  TakenLeases leases;
  Status status;
  try {
    const LoadContext context{
        *load->session,       load->namespace_id, [&](std::uint16_t group) { return pages(group); },
        load->cancelled,      load->deadline,     [&](std::uint16_t group) { return device(group); },
        load->job.traceparent};
    for (const LoadPiece& piece : pieces) {
      if (status && device(piece.group) != nullptr) status = device(piece.group)->wait(load->job.ready_event);
    }
    if (status) status = load_batch(context, pieces, &loaded, &leases);
  } catch (const std::exception& error) {
    status = {Code::kInternal, error.what()};
  }
  bool last = false;
  {
    const std::lock_guard lock(mutex);
    load->loaded.tokens += loaded.tokens;
    load->loaded.raw_bytes += loaded.raw_bytes;
    load->loaded.encoded_bytes += loaded.encoded_bytes;
    add_codec(loaded.codec_spec, &load->loaded.codec_spec);
    load->loaded.by_daemon = load->loaded.by_daemon || loaded.by_daemon;
    load->leases.good.insert(load->leases.good.end(), leases.good.begin(), leases.good.end());
    load->leases.corrupt.insert(load->leases.corrupt.end(), leases.corrupt.begin(), leases.corrupt.end());
    if (!status && load->status) {
      load->status = status;
      std::erase(loads, load);  // nobody takes the batches that are left
    }
    last = --load->running == 0 && load->all_taken();
  }
  if (last) end_load(load);
}

void TransferWorker::State::zero_pages(const Load& load) {
  // A daemon that dies may have closed its end before its device has stopped.
  if (load.loaded.by_daemon && !load.session->alive()) load.session->wait_for_daemons_end(kDaemonsEnd);
  for (const LoadPiece& piece : load.job.pieces) {
    DeviceGroup* group = device(piece.group);
    if (group == nullptr) {
      zero_blocks(*pages(piece.group), piece.block_ids);
      continue;
    }
    const Status zeroed =
        group->with_coder([&](PageCoder& coder) { return coder.zero(group->cache(), piece.block_ids); });
    if (!zeroed) {
      std::fprintf(stderr, "kvern: pages of a failed load could not be zeroed: %s\n", zeroed.message().c_str());
    }
  }
}

/// All batches have ended: nobody else touches the load or its pages.
void TransferWorker::State::end_load(const std::shared_ptr<Load>& load) {
  if (load->status && load->cancelled) load->status = {Code::kUnavailable, "cancelled"};
  // Only now: while the session lived, nothing that was leased can have been overwritten.
  if (load->status && !load->session->alive()) {
    load->status = {Code::kExpired, "the session ended during the load"};
  }
  // Without a lease nothing was decoded.
  const bool touched = !load->leases.good.empty() || !load->leases.corrupt.empty() || load->loaded.by_daemon;
  if (!load->status && touched) zero_pages(*load);
  JobResult event;
  event.id = load->job.id;
  event.event = load->status ? JobEvent::kLoaded : JobEvent::kLoadFailed;
  event.reason = load->status.message();
  event.seconds = seconds_since(load->start);
  event.raw_bytes = load->loaded.raw_bytes;
  event.encoded_bytes = load->loaded.encoded_bytes;
  UsageReport usage;
  if (load->status) {
    usage.loaded_tokens = load->loaded.tokens;
    usage.loaded_raw_bytes = load->loaded.raw_bytes;
    usage.loaded_encoded_bytes = load->loaded.encoded_bytes;
    usage.codec_spec = load->loaded.codec_spec;
    usage.load_seconds.push_back(event.seconds);
  } else {
    usage.failed_loads = 1;
  }
  client->report(usage);
  const std::lock_guard lock(mutex);
  push_event_locked(std::move(event));
  live_loads.erase(load->job.id);
  --jobs;
  settled.notify_all();
  add_errand_locked([this, load] { release(*load->session, load->leases, call_timeout()); });
}

void TransferWorker::State::fail_load_locked(const LoadJob& job, std::string reason) {
  JobResult event;
  event.id = job.id;
  event.event = JobEvent::kLoadFailed;
  event.reason = std::move(reason);
  push_event_locked(std::move(event));
}

void TransferWorker::submit_load(LoadJob job) {
  State& state = *state_;
  auto session = state.client->session();
  const std::lock_guard lock(state.mutex);
  if (!session || !session->alive()) {
    state.fail_load_locked(job, "no daemon: " + state.client->problem());
    return;
  }
  const auto namespace_id = session->namespace_id(job.namespace_handle);
  if (!namespace_id) {
    state.fail_load_locked(job, session->refusal(job.namespace_handle));
    return;
  }
  if (state.stopping || state.jobs >= state.config.max_queued_jobs) {
    state.fail_load_locked(job, "dropped: too many jobs wait");
    return;
  }
  for (const LoadPiece& piece : job.pieces) {
    if (const Status status = check_piece(piece, state.pages(piece.group)); !status) {
      state.fail_load_locked(job, status.message());
      return;
    }
  }
  if (job.pieces.empty()) {
    state.fail_load_locked(job, "a load needs at least one piece");
    return;
  }
  auto load = std::make_shared<Load>();
  load->start = SteadyClock::now();
  load->deadline = load->start + milliseconds(state.config.load_timeout_ms);
  const std::size_t most = session->local ? kLocalPiecesPerBatch : kRemotePiecesPerBatch;
  const std::size_t share = (job.pieces.size() + state.config.threads - 1) / state.config.threads;
  load->batch_pieces = std::clamp<std::size_t>(share, 1, most);
  // Over a network somebody should pull while somebody decodes.
  if (!session->local && state.job_threads.size() == state.config.threads) state.start_job_thread_locked();
  load->job = std::move(job);
  load->session = std::move(session);
  load->namespace_id = *namespace_id;
  state.live_loads[load->job.id] = load;
  ++state.jobs;
  state.loads.push_back(std::move(load));
  state.work.notify_all();
}

void TransferWorker::cancel_load(std::uint64_t id) {
  const std::lock_guard lock(state_->mutex);
  if (const auto found = state_->live_loads.find(id); found != state_->live_loads.end()) {
    found->second->cancelled = true;
  }
}

// ---------------------------------------------------------------- stores

std::vector<std::uint32_t> TransferWorker::State::next_batch(const Store& store, bool staged) const {
  const std::size_t staging_bytes = client->config().staging_bytes;
  const std::size_t most = std::min(kStoreBatchBytes, staging_bytes / kStagingShare);
  std::vector<std::uint32_t> batch;
  std::size_t bytes = 0;
  for (const std::uint32_t index : store.todo) {
    const StoreChunk& chunk = store.job.chunks[index];
    bytes += store.pages->shape(static_cast<std::uint32_t>(chunk.hashes.size())).raw_bytes();
    const bool same_hashes = chunk.hashes[0].size() == store.job.chunks[store.todo.front()].hashes[0].size();
    if (!batch.empty() && ((staged && bytes > most) || batch.size() >= kStoreBatchChunks || !same_hashes)) break;
    batch.push_back(index);
  }
  return batch;
}

/// True when there is more to gather (now or once there is room).
bool TransferWorker::State::run_store_batch(const std::shared_ptr<Store>& store, bool closing) {
  GatheredBatch batch;
  Status status;
  const bool late = SteadyClock::now() >= store->deadline;
  if (closing) {
    status = {Code::kUnavailable, "the worker is closing"};
  } else if (late) {
    status = {Code::kBusy, "staging had no room in time"};
  } else if (!store->session->alive()) {
    status = {Code::kExpired, "the session ended during the store"};
  } else {
    try {
      DeviceGroup* const device_group = device(store->job.group);
      const StoreContext context{*store->session, store->namespace_id, *store->pages, store->job, device_group};
      std::optional<std::uint64_t> pages_id;  // where the daemon reads the pages itself
      if (device_group != nullptr) {
        status = device_group->wait(store->job.ready_event);
        if (const auto known = device_group->pages_id(*store->session, call_timeout())) pages_id = *known;
      }
      const auto chunks = next_batch(*store, !pages_id);
      store->todo.erase(store->todo.begin(), store->todo.begin() + static_cast<std::ptrdiff_t>(chunks.size()));
      if (status) {
        status = pages_id ? store_pages(context, *pages_id, chunks, call_timeout(), &batch)
                          : gather_batch(context, chunks, call_timeout(), &batch);
      }
      store->todo.insert(store->todo.begin(), batch.no_room.begin(), batch.no_room.end());
    } catch (const std::exception& error) {
      status = {Code::kInternal, error.what()};
    }
  }
  const std::lock_guard lock(mutex);
  store->raw_bytes += batch.raw_bytes;
  store->stored.insert(store->stored.end(), batch.stored_before.begin(), batch.stored_before.end());
  if (!batch.reason.empty()) store->reason = batch.reason;
  if (!status) store->reason = status.message();
  if (!batch.gathered.empty()) {
    ++store->pending_commits;
    add_errand_locked([this, store, gathered = std::move(batch.gathered)] { commit(store, gathered); });
  }
  if (!status || stopping) return false;
  store->not_before = batch.no_room.empty() ? SteadyClock::time_point{} : SteadyClock::now() + kRoomRetry;
  return !store->todo.empty();
}

void TransferWorker::State::end_gathering(const std::shared_ptr<Store>& store) {
  const std::lock_guard lock(mutex);
  JobResult event;
  event.id = store->job.id;
  event.event = JobEvent::kGathered;
  event.seconds = seconds_since(store->start);
  event.raw_bytes = store->raw_bytes;
  push_event_locked(std::move(event));
  store->gathered = true;
  ungathered.erase(store->job.id);
  settled.notify_all();
  if (store->pending_commits == 0) end_store_locked(*store);
}

void TransferWorker::State::commit(const std::shared_ptr<Store>& store, const std::vector<GatheredChunk>& gathered) {
  std::string reason;
  const auto stored = commit_batch(*store->session, gathered, store->job.traceparent, call_timeout(), &reason);
  const std::lock_guard lock(mutex);
  store->stored.insert(store->stored.end(), stored.begin(), stored.end());
  if (!reason.empty()) store->reason = reason;
  // There is room in staging again.
  for (const auto& waiting : stores) waiting->not_before = {};
  work.notify_all();
  if (--store->pending_commits == 0 && store->gathered) end_store_locked(*store);
}

void TransferWorker::State::end_store_locked(Store& store) {
  std::ranges::sort(store.stored);
  JobResult event;
  event.id = store.job.id;
  event.event = JobEvent::kStored;
  event.stored_chunks = std::move(store.stored);
  event.reason = store.reason;
  event.seconds = seconds_since(store.start);
  event.raw_bytes = store.raw_bytes;
  push_event_locked(std::move(event));
  --jobs;
  settled.notify_all();
}

void TransferWorker::State::drop_store_locked(const StoreJob& job, const std::string& reason) {
  for (const JobEvent kind : {JobEvent::kGathered, JobEvent::kStored}) {
    JobResult event;
    event.id = job.id;
    event.event = kind;
    event.reason = reason;
    push_event_locked(std::move(event));
  }
}

void TransferWorker::submit_store(StoreJob job) {
  State& state = *state_;
  auto session = state.client->session();
  const std::lock_guard lock(state.mutex);
  if (!session || !session->alive()) {
    state.drop_store_locked(job, "no daemon: " + state.client->problem());
    return;
  }
  const auto namespace_id = session->namespace_id(job.namespace_handle);
  if (!namespace_id) {
    state.drop_store_locked(job, session->refusal(job.namespace_handle));
    return;
  }
  const GroupPages* pages = state.pages(job.group);
  if (pages == nullptr) {
    state.drop_store_locked(job, "KV-cache group " + std::to_string(job.group) + " is not registered");
    return;
  }
  if (state.stopping || state.jobs >= state.config.max_queued_jobs) {
    state.drop_store_locked(job, "dropped: too many jobs wait");
    return;
  }
  auto store = std::make_shared<Store>();
  for (std::size_t i = 0; i < job.chunks.size(); ++i) {
    if (const Status status = check_chunk(job.chunks[i], *pages); !status) {
      store->reason = status.message();
    } else {
      store->todo.push_back(static_cast<std::uint32_t>(i));
    }
  }
  if (store->todo.empty()) {
    state.drop_store_locked(job, store->reason);
    return;
  }
  store->start = SteadyClock::now();
  store->deadline = store->start + milliseconds(state.config.store_timeout_ms);
  store->job = std::move(job);
  store->session = std::move(session);
  store->namespace_id = *namespace_id;
  store->pages = pages;
  state.ungathered.insert(store->job.id);
  ++state.jobs;
  state.stores.push_back(std::move(store));
  state.work.notify_one();
}

// ---------------------------------------------------------------- compact caches

void TransferWorker::State::end_compaction_locked(std::uint64_t id, const Status& status, double seconds) {
  JobResult event;
  event.id = id;
  event.event = status ? JobEvent::kCompacting : JobEvent::kCompactionFailed;
  event.reason = status.message();
  event.seconds = seconds;
  push_event_locked(std::move(event));
}

void TransferWorker::submit_compaction(CompactionJob job) {
  State& state = *state_;
  auto session = state.client->session();
  const std::lock_guard lock(state.mutex);
  const auto fail = [&](Code code, std::string why) {
    state.end_compaction_locked(job.id, Status(code, std::move(why)), 0);
  };
  if (!session || !session->alive()) return fail(Code::kUnavailable, "no daemon: " + state.client->problem());
  const auto namespace_id = session->namespace_id(job.namespace_handle);
  if (!namespace_id) return fail(Code::kRefused, session->refusal(job.namespace_handle));
  const GroupPages* pages = state.pages(job.group);
  if (pages == nullptr) {
    return fail(Code::kInvalid, "KV-cache group " + std::to_string(job.group) + " is not registered");
  }
  if (state.stopping || state.jobs >= state.config.max_queued_jobs) {
    return fail(Code::kBusy, "dropped: too many jobs wait");
  }
  if (const Status good = check_compaction(job, *pages); !good) return fail(good.code(), good.message());
  ++state.jobs;
  state.add_errand_locked([&state, pages, session = std::move(session), id = *namespace_id, job = std::move(job)] {
    const auto start = SteadyClock::now();
    const Status sent = send_compaction(*session, id, job, *pages, state.call_timeout());
    const std::lock_guard done(state.mutex);
    state.end_compaction_locked(job.id, sent, seconds_since(start));
    --state.jobs;
    state.settled.notify_all();
  });
}

// ---------------------------------------------------------------- the rest

TransferWorker::TransferWorker(std::shared_ptr<Client> client, WorkerConfig config) {
  if (const Status status = config.validate(); !status) throw std::invalid_argument(status.message());
  state_ = std::make_shared<State>(std::move(client), config);
  const std::lock_guard lock(state_->mutex);
  for (std::uint32_t i = 0; i < config.threads; ++i) state_->start_job_thread_locked();
  for (std::size_t i = 0; i < kErrandThreads; ++i) {
    state_->errand_threads.push_back(
        start_service_thread("kvern-commit", [state = state_.get()] { state->run_errands(); }));
  }
}

TransferWorker::~TransferWorker() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
    for (const auto& [id, load] : state_->live_loads) load->cancelled = true;
    state_->work.notify_all();
  }
  for (std::thread& thread : state_->job_threads) thread.join();
  {
    const std::lock_guard lock(state_->mutex);
    state_->errands_stopping = true;
    state_->errands_wait.notify_all();
  }
  for (std::thread& thread : state_->errand_threads) thread.join();
}

Status TransferWorker::register_group(GroupPages pages) {
  if (Status status = pages.validate(); !status) return status;
  const std::lock_guard lock(state_->mutex);
  if (state_->jobs > 0) return {Code::kInvalid, "KV-cache groups must be registered before the first job"};
  const std::uint16_t group = pages.group;
  if (pages.device != nullptr) {
    state_->device_groups[group] = std::make_unique<DeviceGroup>(pages);
  } else {
    state_->device_groups.erase(group);
  }
  state_->groups[group] = std::move(pages);
  return Status::ok();
}

std::vector<JobResult> TransferWorker::poll() {
  if (state_->event_count.load(std::memory_order_acquire) == 0) return {};
  const std::lock_guard lock(state_->mutex);
  state_->event_count.store(0, std::memory_order_release);
  return std::exchange(state_->events, {});
}

bool TransferWorker::wait_gathered(const std::vector<std::uint64_t>& store_ids, std::uint32_t timeout_ms) {
  std::unique_lock lock(state_->mutex);
  return state_->settled.wait_for(lock, milliseconds(timeout_ms), [&] {
    return std::ranges::none_of(store_ids, [&](std::uint64_t id) { return state_->ungathered.contains(id); });
  });
}

bool TransferWorker::drain(std::uint32_t timeout_ms) {
  std::unique_lock lock(state_->mutex);
  return state_->settled.wait_for(lock, milliseconds(timeout_ms), [&] { return state_->jobs == 0; });
}

std::size_t TransferWorker::in_flight() const {
  const std::lock_guard lock(state_->mutex);
  return state_->jobs;
}

}  // namespace kvern
