#include "store/tiered_store.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "store/chunk_record.h"
#include "store/lease.h"

namespace kvern {
namespace {

constexpr std::size_t kMaxTiers = 8;  // bits of ChunkRecord::saved_in

std::uint8_t bit_of(std::size_t tier) { return static_cast<std::uint8_t>(1U << tier); }

/// The containers of an object, every section verified. kCorrupt when they are damaged or those of another chunk.
Result<std::vector<LoadedShard>> verify_object(std::span<const std::byte> object, const ChunkKey& key) {
  std::vector<LoadedShard> shards;
  for (std::uint64_t at = 0; at < object.size();) {
    const auto reader = ContainerReader::parse(object.subspan(at));
    if (!reader) return failure(reader.error());
    if (!(reader->info().key == key)) return failure(Code::kCorrupt, "the container belongs to another chunk");
    if (const auto status = check_container_info(reader->info()); !status) {
      return failure(Code::kCorrupt, status.message());
    }
    if (auto status = reader->verify(); !status) return failure(std::move(status));
    shards.push_back({reader->info(), at, reader->size_bytes()});
    at += padded_bytes(reader->size_bytes());
  }
  return shards;
}

SpanPtr tier_span(const SpanPtr& parent, const char* name, const Tier& tier, std::uint64_t bytes) {
  SpanPtr span = child_of(parent, name, SpanKind::kClient);
  if (!span) return span;
  span->set("kvern.tier", tier.name());
  span->set("kvern.encoded_bytes", bytes);
  return span;
}

}  // namespace

Status TieredStoreConfig::validate() const {
  if (prefetch_window_bytes == 0) return {Code::kInvalid, "prefetch_window_bytes must be above 0"};
  if (!(saving_share > 0 && saving_share <= 1)) return {Code::kInvalid, "saving_share must be above 0, at most 1"};
  if (prefetches_max == 0) return {Code::kInvalid, "prefetches_max must be above 0"};
  return Status::ok();
}

std::uint64_t TieredStoreConfig::saving_bytes_max(std::uint64_t dram_bytes) const {
  const auto share = static_cast<std::uint64_t>(saving_share * static_cast<double>(dram_bytes));
  return std::max(share, std::min(saving_bytes_min, dram_bytes / 4));
}

struct TieredStore::State : std::enable_shared_from_this<State> {
  struct Place {
    std::unique_ptr<Tier> tier;
    WritePolicy write = WritePolicy::kOff;
    std::atomic<std::uint64_t> promoted_chunks{0}, promoted_bytes{0}, promoted_tokens{0};
    std::atomic<std::uint64_t> saved_chunks{0}, unsaved_chunks{0}, corrupt_chunks{0};
    std::atomic<std::uint64_t> saving_bytes{0};
  };
  using Waiter = std::function<void(const Status&)>;

  State(ChunkStore& dram_store, Executor& verifier, const TieredStoreConfig& store_config,
        std::function<std::uint64_t()> usable)
      : dram(dram_store),
        executor(verifier),
        config(store_config),
        saving_bytes_max(config.saving_bytes_max(dram_store.stats().capacity_bytes)),
        usable_bytes(std::move(usable)) {}

  void load(std::size_t place, const TierHit& hit, std::stop_token cancel, Waiter waiter);
  void read(std::size_t place, const TierHit& hit, std::stop_token cancel);
  Status publish(Place& place, std::size_t number, const TierHit& hit, const WriteTicket& ticket,
                 std::uint64_t flushes_before);
  void finish_load(const ChunkKey& key, const Status& status);
  void save(const ChunkKey& key, std::uint8_t wanted, const SpanPtr& parent = nullptr);
  bool is_erasing(const ChunkKey& key);
  void end_erasing(const ChunkKey& key);
  void forget_erased_locked(const ChunkKey& key);
  void erase_all(const NamespaceSet& namespaces, FlushDone done);
  bool begin_task();
  void end_task();

  ChunkStore& dram;
  Executor& executor;
  const TieredStoreConfig config;
  const std::uint64_t saving_bytes_max;
  const std::function<std::uint64_t()> usable_bytes;
  std::vector<std::unique_ptr<Place>> places;  ///< tiers go first of all, see ~TieredStore()
  std::uint8_t written = 0;                    ///< tiers that are written at all
  std::uint8_t written_through = 0;

  std::atomic<std::uint64_t> flushes{0};  ///< what moves before one must not arrive after it
  std::atomic<int> flushing{0};           ///< while it is not 0 nothing moves
  std::atomic<std::size_t> jobs{0};
  mutable std::mutex mutex;
  std::condition_variable changed;
  bool stopping = false;
  std::size_t tasks = 0;                                    ///< that use tiers or the executor right now
  std::unordered_map<ChunkKey, std::vector<Waiter>> loads;  ///< one read per chunk, whoever asks
  std::unordered_map<ChunkKey, std::uint8_t> saving;        ///< tiers that a chunk is on its way to
  /// Calls of erase() that have not ended for this chunk; kept, at 0, as long as it is on its way.
  std::unordered_map<ChunkKey, std::size_t> erasing;
};

bool TieredStore::State::is_erasing(const ChunkKey& key) {
  std::lock_guard lock(mutex);
  return erasing.contains(key);
}

void TieredStore::State::end_erasing(const ChunkKey& key) {
  std::lock_guard lock(mutex);
  --erasing.at(key);
  forget_erased_locked(key);
}

void TieredStore::State::forget_erased_locked(const ChunkKey& key) {
  const auto entry = erasing.find(key);
  if (entry == erasing.end() || entry->second > 0 || saving.contains(key) || loads.contains(key)) return;
  erasing.erase(entry);
}

bool TieredStore::State::begin_task() {
  std::lock_guard lock(mutex);
  if (stopping) return false;
  ++tasks;
  return true;
}

void TieredStore::State::end_task() {
  std::lock_guard lock(mutex);
  if (--tasks == 0) changed.notify_all();
}

void TieredStore::State::load(std::size_t place, const TierHit& hit, std::stop_token cancel, Waiter waiter) {
  {
    std::unique_lock lock(mutex);
    if (stopping) {
      lock.unlock();
      return waiter(Status(Code::kUnavailable, "the store is stopping"));
    }
    auto& waiters = loads[hit.key];
    waiters.push_back(std::move(waiter));
    if (waiters.size() > 1) return;
    ++tasks;
  }
  read(place, hit, std::move(cancel));
  end_task();
}

void TieredStore::State::read(std::size_t number, const TierHit& hit, std::stop_token cancel) {
  const std::uint64_t flushes_before = flushes.load();
  // What a flush that is under way has not come to yet would arrive behind it.
  if (flushing.load() > 0) return finish_load(hit.key, Status(Code::kNotFound, "it is being flushed"));
  const auto ticket = dram.begin_load(hit.bytes, hit.key.namespace_id);
  if (!ticket) return finish_load(hit.key, ticket.error());
  if (usable_bytes && ticket->extent.offset + ticket->extent.bytes > usable_bytes()) {
    dram.abort(*ticket);
    return finish_load(hit.key, Status(Code::kBusy, "the DRAM tier is still being reserved"));
  }
  const auto give_up = [self = shared_from_this(), hit, ticket = *ticket](const Status& status) {
    self->dram.abort(ticket);
    self->finish_load(hit.key, status);
  };
  places[number]->tier->read(
      hit, 0, dram.bytes(*ticket), std::move(cancel),
      [this, self = shared_from_this(), number, hit, ticket = *ticket, flushes_before, give_up](const Status& status) {
        if (!status) return give_up(status);
        if (!begin_task()) return give_up(Status(Code::kUnavailable, "the store is stopping"));
        const bool queued = executor.submit([this, self, number, hit, ticket, flushes_before] {
          finish_load(hit.key, publish(*places[number], number, hit, ticket, flushes_before));
          end_task();
        });
        if (queued) return;
        give_up(Status(Code::kBusy, "too many chunks wait to be verified"));
        end_task();
      });
}

/// Consumes the ticket.
Status TieredStore::State::publish(Place& place, std::size_t number, const TierHit& hit, const WriteTicket& ticket,
                                   std::uint64_t flushes_before) {
  const auto shards = verify_object(dram.bytes(ticket), hit.key);
  Status status = status_of(shards);
  const auto flushed = [&] { return flushing.load() > 0 || flushes.load() != flushes_before; };
  if (status && flushed()) status = Status(Code::kNotFound, "it was flushed meanwhile");
  if (status) {
    status = dram.publish_load(ticket, *shards, bit_of(number));
    // Looked at after it can be found: an erase() or flush() that comes later finds it itself.
    if (status && (is_erasing(hit.key) || flushed())) {
      dram.drop(hit.key);
      status = Status(Code::kNotFound, "it was erased meanwhile");
    }
  } else {
    dram.abort(ticket);
  }
  if (status) {
    ++place.promoted_chunks;
    place.promoted_bytes += hit.bytes;
    place.promoted_tokens += shards->front().info.shape.tokens;
  } else if (status.code() == Code::kCorrupt) {
    ++place.corrupt_chunks;
    place.tier->erase({hit.key}, [](const Status&) {});
  }
  return status;
}

void TieredStore::State::finish_load(const ChunkKey& key, const Status& status) {
  std::vector<Waiter> waiters;
  {
    std::lock_guard lock(mutex);
    const auto found = loads.find(key);
    waiters = std::move(found->second);
    loads.erase(found);
    forget_erased_locked(key);
  }
  for (const auto& waiter : waiters) waiter(status);
}

void TieredStore::State::save(const ChunkKey& key, std::uint8_t wanted, const SpanPtr& parent) {
  const std::uint64_t flushes_before = flushes.load();
  if (flushing.load() > 0 || !begin_task()) return;
  {
    std::unique_lock lock(mutex);
    if (erasing.contains(key)) {
      lock.unlock();
      return end_task();
    }
    std::uint8_t& on_its_way = saving[key];
    wanted = static_cast<std::uint8_t>(wanted & ~on_its_way);
    on_its_way |= wanted;
  }
  const auto done = [this, self = shared_from_this(), key](std::uint8_t bits) {
    std::lock_guard lock(mutex);
    const auto entry = saving.find(key);
    entry->second = static_cast<std::uint8_t>(entry->second & ~bits);
    if (entry->second == 0) saving.erase(entry);
    forget_erased_locked(key);
    if (saving.empty()) changed.notify_all();
  };
  TierObject object{.key = key, .blocks = {}, .pieces = {}, .hold = nullptr};
  auto pinned = wanted == 0 ? failure(Code::kBusy, "it is on its way already")
                            : dram.pin(key.namespace_id, key.group, key.last_block, PinFor::kMove);
  if (pinned) {
    auto lease = std::make_shared<const Lease>(dram, std::move(*pinned), key.namespace_id, key.group, key.last_block);
    for (const StoredShard& shard : lease->chunk().shards) {
      const auto bytes = dram.bytes(shard);
      if (const auto reader = ContainerReader::parse(bytes); reader && reader->info().key == key) {
        if (object.blocks.empty()) object.blocks = reader->info().block_hashes;
      } else {
        object.blocks.clear();  // damaged, or a longer chunk took over
        break;
      }
      object.pieces.emplace_back(bytes.data(), padded_bytes(bytes.size()));
    }
    object.hold = std::move(lease);
  }
  if (object.blocks.empty()) {
    done(wanted);
    return end_task();
  }
  for (std::size_t number = 0; number < places.size(); ++number) {
    if ((wanted & bit_of(number)) == 0) continue;
    Place& place = *places[number];
    const std::uint64_t bytes = object.bytes();
    const std::uint64_t others = place.saving_bytes.fetch_add(bytes);
    if (others > 0 && others + bytes > saving_bytes_max) {
      place.saving_bytes.fetch_sub(bytes);
      ++place.unsaved_chunks;
      done(bit_of(number));
      continue;
    }
    const SpanPtr span = tier_span(parent, "kvern.tier.write", *place.tier, bytes);
    place.tier->write(object, [this, self = shared_from_this(), number, bytes, key, flushes_before, done,
                               span](const Status& status) {
      if (span) span->end(status);
      places[number]->saving_bytes.fetch_sub(bytes);
      // It may have overtaken the flush, or its own erasure, on its way, and must not outlive it.
      if (status && (flushes.load() != flushes_before || is_erasing(key)) && begin_task()) {
        places[number]->tier->erase({key}, [](const Status&) {});
        end_task();
      }
      ++(status ? places[number]->saved_chunks : places[number]->unsaved_chunks);
      if (status) dram.mark_saved(key, bit_of(number));
      done(bit_of(number));
    });
  }
  end_task();
}

/// One prefetch: finds the cells in the tiers, one tier after the other, then reads them in the order of the prompt.
class TieredStore::Job : public std::enable_shared_from_this<Job> {
 public:
  struct Cell {
    CellQuery query;
    TierHit hit;
    std::size_t place = 0;
  };

  Job(std::shared_ptr<State> state, std::vector<Cell> cells, SpanPtr span)
      : state_(std::move(state)), cells_(std::move(cells)), span_(std::move(span)) {}
  ~Job() { state_->jobs.fetch_sub(1); }

  void start() { find(0); }
  void cancel() { stop_.request_stop(); }
  bool pending() const { return !ended_.load(std::memory_order_acquire); }
  void let_go() {
    std::lock_guard lock(mutex_);
    leases_.clear();
    released_ = true;
  }

 private:
  void end() {
    if (span_) span_->end(stop_.stop_requested() ? Status(Code::kExpired, "nobody waits any more") : Status::ok());
    ended_.store(true, std::memory_order_release);
  }

  void find(std::size_t place) {
    std::vector<CellQuery> queries;
    std::vector<std::size_t> asked;
    for (std::size_t i = 0; i < cells_.size(); ++i) {
      if (cells_[i].hit.blocks == cells_[i].query.blocks.size()) continue;
      queries.push_back(cells_[i].query);
      asked.push_back(i);
    }
    if (stop_.stop_requested()) return end();
    if (place == state_->places.size() || queries.empty()) return start_reading();
    if (!state_->begin_task()) return end();
    state_->places[place]->tier->find(
        std::move(queries), stop_.get_token(),
        [self = shared_from_this(), place, asked](Result<std::vector<TierHit>> hits) {
          for (std::size_t i = 0; hits && i < std::min(asked.size(), hits->size()); ++i) {
            Cell& cell = self->cells_[asked[i]];
            TierHit& hit = (*hits)[i];
            if (hit.bytes == 0 || hit.blocks <= cell.hit.blocks || hit.blocks > cell.query.blocks.size()) continue;
            cell.hit = hit;
            cell.place = place;
          }
          self->find(place + 1);
        });
    state_->end_task();
  }

  void start_reading() {
    // Up to the first gap: what lies behind it serves nobody.
    std::size_t useful = 0;
    while (useful < cells_.size() && cells_[useful].hit.blocks > 0) {
      const bool whole = cells_[useful].hit.blocks == cells_[useful].query.blocks.size();
      ++useful;
      if (!whole) break;
    }
    cells_.resize(useful);
    if (span_) span_->set("kvern.chunks", useful);
    read_on();
  }

  void read_on() {
    std::unique_lock lock(mutex_);
    while (next_ < cells_.size() && !failed_ && !stop_.stop_requested()) {
      const Cell& cell = cells_[next_];
      if (under_way_bytes_ > 0 && under_way_bytes_ + cell.hit.bytes > state_->config.prefetch_window_bytes) return;
      under_way_bytes_ += cell.hit.bytes;
      const std::size_t mine = next_++;
      lock.unlock();
      const SpanPtr span = tier_span(span_, "kvern.tier.read", *state_->places[cell.place]->tier, cell.hit.bytes);
      state_->load(cell.place, cell.hit, stop_.get_token(),
                   [self = shared_from_this(), mine, span](const Status& status) {
                     if (span) span->end(status);
                     self->loaded(mine, status);
                   });
      lock.lock();
    }
    if (under_way_bytes_ == 0) end();
  }

  void loaded(std::size_t number, const Status& status) {
    const Cell& cell = cells_[number];
    // Somebody else's prefetch read it and was cancelled.
    if (status.code() == Code::kExpired && !stop_.stop_requested()) {
      return state_->load(cell.place, cell.hit, stop_.get_token(),
                          [self = shared_from_this(), number](const Status& again) { self->loaded(number, again); });
    }
    std::shared_ptr<const Lease> lease;
    const ChunkKey& key = cell.hit.key;
    if (status) {
      auto pinned = state_->dram.pin(key.namespace_id, key.group, key.last_block);
      if (pinned) {
        lease = std::make_shared<const Lease>(state_->dram, std::move(*pinned), key.namespace_id, key.group,
                                              key.last_block);
      }
    }
    {
      std::lock_guard lock(mutex_);
      under_way_bytes_ -= cell.hit.bytes;
      failed_ = failed_ || !status;
      if (lease && !released_) leases_.push_back(std::move(lease));
    }
    read_on();
  }

  const std::shared_ptr<State> state_;
  std::vector<Cell> cells_;  ///< not changed any more once reading began
  const SpanPtr span_;
  std::stop_source stop_;
  std::atomic<bool> ended_{false};
  std::mutex mutex_;
  std::size_t next_ = 0;
  std::uint64_t under_way_bytes_ = 0;
  bool failed_ = false;  ///< there is a gap now
  bool released_ = false;
  std::vector<std::shared_ptr<const Lease>> leases_;
};

namespace {

class NothingToPrefetch final : public Prefetch {
 public:
  bool pending() const override { return false; }
};

/// The handle that a look-up holds: the job may outlive it until its last operation has ended.
template <typename Job>
class RunningPrefetch final : public Prefetch {
 public:
  explicit RunningPrefetch(std::shared_ptr<Job> job) : job_(std::move(job)) {}
  ~RunningPrefetch() override {
    job_->cancel();
    job_->let_go();
  }
  bool pending() const override { return job_->pending(); }

 private:
  const std::shared_ptr<Job> job_;
};

}  // namespace

TieredStore::TieredStore(ChunkStore& dram, std::vector<LowerTier> tiers, Executor& executor,
                         const TieredStoreConfig& config, std::function<std::uint64_t()> usable_bytes)
    : state_(std::make_shared<State>(dram, executor, config, std::move(usable_bytes))) {
  if (const auto status = config.validate(); !status) throw std::invalid_argument("tiers: " + status.message());
  if (tiers.size() > kMaxTiers) throw std::invalid_argument("tiers: there can be 8 at most");
  for (std::size_t number = 0; number < tiers.size(); ++number) {
    auto place = std::make_unique<State::Place>();
    place->tier = std::move(tiers[number].tier);
    place->write = tiers[number].write;
    if (place->write != WritePolicy::kOff) state_->written |= bit_of(number);
    if (place->write == WritePolicy::kThrough) state_->written_through |= bit_of(number);
    state_->places.push_back(std::move(place));
  }
}

TieredStore::~TieredStore() {
  State& state = *state_;
  {
    std::unique_lock lock(state.mutex);
    state.stopping = true;
    state.changed.wait(lock, [&] { return state.tasks == 0; });
  }
  // Ends what is under way; the functions that are called find the store stopping and start nothing new.
  for (auto& place : state.places) place->tier.reset();
}

bool TieredStore::has_tiers() const { return !state_->places.empty(); }

std::shared_ptr<Prefetch> TieredStore::prefetch(const NamespaceId& namespace_id, std::uint16_t group,
                                                std::span<const BlockHash> blocks, std::size_t first_block,
                                                std::size_t chunk_blocks, SpanPtr span) {
  State& state = *state_;
  std::vector<Job::Cell> cells;
  for (std::size_t begin = first_block / chunk_blocks * chunk_blocks; begin < blocks.size(); begin += chunk_blocks) {
    const auto cell = blocks.subspan(begin, std::min(chunk_blocks, blocks.size() - begin));
    if (state.places.empty() || state.dram.match(namespace_id, group, cell) == cell.size()) continue;
    cells.push_back({{namespace_id, group, {cell.begin(), cell.end()}}, {}, 0});
  }
  if (cells.empty()) {
    if (span) span->discard();
    return std::make_shared<NothingToPrefetch>();
  }
  if (state.jobs.fetch_add(1) >= state.config.prefetches_max) {
    state.jobs.fetch_sub(1);
    if (span) span->end(Status(Code::kBusy, "too many prefetches at once"));
    return std::make_shared<NothingToPrefetch>();
  }
  auto job = std::make_shared<Job>(state_, std::move(cells), std::move(span));
  job->start();
  return std::make_shared<RunningPrefetch<Job>>(std::move(job));
}

void TieredStore::stored(const ChunkKey& key, const SpanPtr& span) {
  if (state_->written_through != 0) state_->save(key, state_->written_through, span);
}

void TieredStore::save_victims() {
  State& state = *state_;
  if (state.written == 0) return;
  const ChunkStoreStats stats = state.dram.stats();
  if (stats.used_bytes + 2 * state.config.write_back_bytes < stats.capacity_bytes) return;
  for (const UnsavedChunk& chunk : state.dram.unsaved_victims(state.config.write_back_bytes, state.written)) {
    state.save(chunk.key, chunk.missing_in);
  }
}

Status TieredStore::wait_saved(std::int64_t timeout_ns) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::nanoseconds(timeout_ns);
  std::unique_lock lock(state_->mutex);
  if (state_->changed.wait_until(lock, deadline, [this] { return state_->saving.empty(); })) return Status::ok();
  return Status(Code::kExpired, std::to_string(state_->saving.size()) + " chunks are not written to lower tiers yet");
}

void TieredStore::flush(const FlushScope& scope, FlushDone done) {
  State& state = *state_;
  state.flushing.fetch_add(1);
  state.flushes.fetch_add(1);
  const auto end = [self = state_, done = std::move(done)](const FlushedChunks& flushed, const Status& lower) {
    self->flushing.fetch_sub(1);
    done(flushed, lower);
  };
  if (!scope.prefix) return state.erase_all(scope.namespaces, end);
  std::vector<Tier*> tiers;
  for (const auto& place : state.places) tiers.push_back(place->tier.get());
  const auto with_tiers = [self = state_](const std::function<void()>& function) {
    if (!self->begin_task()) return false;
    function();
    self->end_task();
    return true;
  };
  std::make_shared<PrefixFlush>(state.dram, std::move(tiers), with_tiers, scope.namespaces, *scope.prefix, end)
      ->start();
}

void TieredStore::State::erase_all(const NamespaceSet& namespaces, FlushDone done) {
  struct Pending {
    std::mutex mutex;
    std::size_t left;
    FlushedChunks flushed;
    Status status;
    FlushDone done;
  };
  const auto pending = std::make_shared<Pending>();
  pending->flushed = dram.flush(namespaces);
  if (places.empty() || !begin_task()) return done(pending->flushed, Status::ok());
  pending->left = places.size();
  pending->done = std::move(done);
  for (const auto& place : places) {
    const auto erased = [self = shared_from_this(), namespaces, pending,
                         name = place->tier->name()](const Status& status) {
      std::unique_lock lock(pending->mutex);
      if (!status && pending->status) pending->status = Status(status.code(), name + ": " + status.message());
      if (--pending->left > 0) return;
      lock.unlock();
      pending->flushed += self->dram.flush(namespaces);  // what was being published when it began
      pending->done(pending->flushed, pending->status);
    };
    place->tier->erase_all(namespaces, erased);
  }
  end_task();
}

void TieredStore::erase(const std::vector<ChunkKey>& keys, Tier::Done done) {
  State& state = *state_;
  if (keys.empty() || state.places.empty() || !state.begin_task()) {
    for (const ChunkKey& key : keys) state.dram.drop(key);
    return done(Status::ok());
  }
  {
    std::lock_guard lock(state.mutex);
    for (const ChunkKey& key : keys) ++state.erasing[key];
  }
  for (const ChunkKey& key : keys) state.dram.drop(key);
  struct Pending {
    std::mutex mutex;
    std::size_t left;
    Status status;
    Tier::Done done;
  };
  const auto pending = std::make_shared<Pending>();
  pending->left = state.places.size();
  pending->done = std::move(done);
  for (const auto& place : state.places) {
    place->tier->erase(keys, [self = state_, keys, pending, name = place->tier->name()](const Status& status) {
      std::unique_lock lock(pending->mutex);
      if (!status && pending->status) pending->status = Status(status.code(), name + ": " + status.message());
      if (--pending->left > 0) return;
      lock.unlock();
      for (const ChunkKey& key : keys) self->end_erasing(key);
      pending->done(pending->status);
    });
  }
  state.end_task();
}

TieredStoreStats TieredStore::stats() const {
  TieredStoreStats stats;
  stats.prefetches = state_->jobs.load();
  for (const auto& place : state_->places) {
    stats.tiers.push_back({.name = place->tier->name(),
                           .write = place->write,
                           .tier = place->tier->stats(),
                           .promoted_chunks = place->promoted_chunks.load(),
                           .promoted_bytes = place->promoted_bytes.load(),
                           .promoted_tokens = place->promoted_tokens.load(),
                           .saved_chunks = place->saved_chunks.load(),
                           .unsaved_chunks = place->unsaved_chunks.load(),
                           .corrupt_chunks = place->corrupt_chunks.load()});
  }
  return stats;
}

}  // namespace kvern
