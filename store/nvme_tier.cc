#include "store/nvme_tier.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

namespace kvern {
namespace {

// What is flushed together at most. A flush waits for what is on its way as well, so that it is never hidden behind the
// next batch altogether: batches of 16 MiB reached 0.6 of fio's rate on a virtual disk, of 64 MiB as much as without
// flushes.
constexpr std::uint64_t kBatchBytes = std::uint64_t{64} << 20;
// Requests of one read: long enough for full speed, short enough that several run at once.
constexpr std::size_t kReadBytes = std::size_t{1} << 20;
// Objects that leave the index under one hold of the lock.
constexpr std::size_t kEraseAtOnce = 256;
constexpr std::size_t kOpenTries = 2;
constexpr std::chrono::milliseconds kReaderInterval{100};

constexpr std::uint64_t kSmallestRegion = std::uint64_t{64} << 10;
constexpr std::uint64_t kLargestRegion = std::uint64_t{16} << 30;

LogEntry entry_of(LogEntry::Kind kind, const ChunkKey& key, std::vector<BlockHash> blocks) {
  LogEntry entry;
  entry.kind = kind;
  entry.group = key.group;
  entry.namespace_id = key.namespace_id;
  entry.blocks = std::move(blocks);
  return entry;
}

ChunkKey key_of(const LogEntry& entry) { return {entry.namespace_id, entry.group, entry.blocks.back()}; }

std::vector<LogFile> open_files(const NvmeConfig& config) {
  if (const auto status = config.validate(); !status) throw std::invalid_argument("nvme: " + status.message());
  std::vector<LogFile> files;
  files.reserve(config.files.size());
  for (const auto& file : config.files) files.emplace_back(file.path, file.bytes, config.lock_wait_ns);
  return files;
}

}  // namespace

/// A range of an object on its way into memory. Its region is not reused until the last part has ended.
struct NvmeTier::Reading {
  ChunkKey key;
  ObjectIndex::Location location;
  std::uint64_t offset = 0;
  std::span<std::byte> into;
  std::size_t parts = 0;  ///< that have not ended
  Status status;
  Done done;
};

NvmeConfig NvmeConfig::resolved() const {
  NvmeConfig config = *this;
  if (region_bytes != 0 || files.empty()) return config;
  const auto smallest = std::ranges::min_element(files, {}, &NvmeFileConfig::bytes);
  const std::uint64_t share = smallest->bytes / kRegionsOfSmallFile / kBlockAlignment * kBlockAlignment;
  std::uint64_t total = 0;
  for (const auto& file : files) total += file.bytes;
  const std::uint64_t least = (total / ObjectIndex::kMostRegions / kBlockAlignment + 1) * kBlockAlignment;
  config.region_bytes = std::max(std::clamp(share, kSmallestRegion, kRegionBytes), least);
  return config;
}

Status NvmeConfig::validate() const {
  if (files.empty()) return {Code::kInvalid, "name one file at least"};
  if (region_bytes == 0) return resolved().validate();
  if (region_bytes < kSmallestRegion || region_bytes > kLargestRegion || region_bytes % kBlockAlignment != 0) {
    return {Code::kInvalid, "region_bytes must be a multiple of 4096 between 64 KiB and 16 GiB"};
  }
  std::uint64_t regions = 0;
  for (const auto& file : files) {
    if (file.path.empty()) return {Code::kInvalid, "a file has no path"};
    if (file.bytes % kBlockAlignment != 0) return {Code::kInvalid, file.path + ": bytes must be a multiple of 4096"};
    if (file.bytes < region_bytes) return {Code::kInvalid, file.path + ": bytes must be one region at least"};
    regions += file.bytes / region_bytes;
  }
  if (regions < 2) return {Code::kInvalid, "the files must have room for two regions at least"};
  if (regions > ObjectIndex::kMostRegions) {
    return {Code::kInvalid, "the files have more than 65535 regions: configure a larger region_bytes"};
  }
  if (write_queue_bytes == 0 || read_queue_bytes == 0) {
    return {Code::kInvalid, "write_queue_bytes and read_queue_bytes must be above 0"};
  }
  if (batch_age_ns < 0 || queue_age_ns <= 0 || lock_wait_ns < 0) {
    return {Code::kInvalid, "batch_age_ns and lock_wait_ns must not be below 0, queue_age_ns above it"};
  }
  if (write_bytes_per_second > 0 && write_burst_bytes == 0) {
    return {Code::kInvalid, "write_burst_bytes must be above 0"};
  }
  if (!(rewrite_share >= 0 && rewrite_share <= 0.9)) return {Code::kInvalid, "rewrite_share must be 0 to 0.9"};
  if (auto status = io.validate(); !status) return status;
  return breaker.validate();
}

NvmeTier::NvmeTier(const NvmeConfig& config, const Clock& clock, TierObserver* observer, const OpenIo& open_io)
    : Tier("nvme", config.breaker, clock, observer),
      config_(config.resolved()),
      clock_(clock),
      files_(open_files(config)),
      index_(0),
      tokens_(static_cast<double>(config.write_burst_bytes)),
      tokens_ns_(clock.now_ns()) {
  std::vector<int> descriptors;
  for (const auto& file : files_) {
    descriptors.push_back(file.fd());
    if (!file.direct()) {
      notes_.push_back("the file system of " + file.path() + " has no direct I/O: the page cache is used");
    }
  }
  auto opened = open_io(descriptors, config_.io);
  io_ = std::move(opened.io);
  if (!opened.why.empty()) notes_.push_back(std::move(opened.why));
  log_ = std::make_unique<RegionLog>(files_, *io_, RegionLogConfig{config_.region_bytes, config_.sync},
                                     [this] { expire_queue(); });
  index_ = ObjectIndex(log_->regions());
  readers_.resize(log_->regions());
  stats_.regions = log_->regions();
  thread_ = std::thread([this] { run(); });
}

NvmeTier::~NvmeTier() {
  std::deque<Write> ended;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    ended.swap(queue_);
    for (const auto& write : ended) forget_write(write);
    changed_.notify_all();
  }
  for (auto& write : ended) end_write(write, Status(Code::kUnavailable, "the NVMe tier is being closed"));
  thread_.join();
  io_.reset();  // ends the reads, whose functions use the rest
}

std::optional<NvmeRecovery> NvmeTier::recovery(std::int64_t timeout_ns) const {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return recovery_.has_value(); });
  return recovery_;
}

NvmeStats NvmeTier::nvme_stats() const {
  std::lock_guard lock(mutex_);
  NvmeStats stats = stats_;
  stats.index_bytes = index_.memory_bytes();
  return stats;
}

TierStats NvmeTier::do_stats() const {
  TierStats stats;
  for (std::uint32_t region = 0; region < log_->regions(); ++region) stats.capacity_bytes += log_->place(region).bytes;
  std::lock_guard lock(mutex_);
  stats.used_bytes = index_.bytes();
  stats.objects = index_.objects();
  stats.queued_bytes = queued_bytes_;
  return stats;
}

// ---- reads

void NvmeTier::do_find(std::vector<CellQuery> cells, std::stop_token cancel, FindDone done) {
  std::vector<TierHit> hits(cells.size());
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; recovery_ && i < cells.size() && !cancel.stop_requested(); ++i) {
      hits[i] = index_.find(cells[i]);
    }
  }
  done(std::move(hits));
}

void NvmeTier::do_read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
                       Done done) {
  auto reading = std::make_shared<Reading>();
  std::unique_lock lock(mutex_);
  const auto location = recovery_ ? index_.locate(hit.key) : std::nullopt;
  if (!location || std::uint64_t{location->pages} * kBlockAlignment != hit.bytes) {
    lock.unlock();
    return done(Status(Code::kNotFound, "the object is not in the NVMe tier any more"));
  }
  if (reading_bytes_ + into.size() > config_.read_queue_bytes) {
    lock.unlock();
    return done(Status(Code::kBusy, "too many bytes are being read from the NVMe tier"));
  }
  index_.touch(hit.key);
  reading->key = hit.key;
  reading->location = *location;
  reading->offset = offset;
  reading->into = into;
  reading->done = std::move(done);
  reading_bytes_ += into.size();
  ++readers_[location->region];
  lock.unlock();
  start_reading(reading, cancel);
}

// The reader is counted already.
void NvmeTier::start_reading(const std::shared_ptr<Reading>& reading, const std::stop_token& cancel) {
  const RegionLog::Place& at = log_->place(reading->location.region);
  const std::uint64_t begin = at.offset + std::uint64_t{reading->location.page} * kBlockAlignment + reading->offset;
  const std::span<std::byte> into = reading->into;
  reading->parts = (into.size() + kReadBytes - 1) / kReadBytes;
  for (std::size_t offset = 0; offset < into.size(); offset += kReadBytes) {
    read_fully(*io_, at.file, begin + offset, into.subspan(offset, std::min(kReadBytes, into.size() - offset)), cancel,
               [this, reading](Status status) { part_ended(*reading, std::move(status)); });
  }
}

void NvmeTier::part_ended(Reading& reading, Status status) {
  {
    std::lock_guard lock(mutex_);
    if (reading.status && !status) reading.status = std::move(status);
    if (--reading.parts > 0) return;
  }
  if (reading.status && reading.offset == 0 &&
      checksum64(reading.into.data(), kBlockAlignment) != reading.location.first_page_checksum) {
    reading.status =
        Status(Code::kCorrupt, "the first bytes of object " + reading.key.to_string() + " are not its own");
  }
  {
    std::lock_guard lock(mutex_);
    reading_bytes_ -= reading.into.size();
    if (--readers_[reading.location.region] == 0) changed_.notify_all();
    const bool lost = reading.status.code() == Code::kInternal || reading.status.code() == Code::kCorrupt;
    if (lost && index_.locate(reading.key) == reading.location) {
      index_.erase(reading.key);
      ++stats_.unreadable;
    }
  }
  reading.done(std::move(reading.status));
}

// ---- what queues

Status NvmeTier::admit(const ChunkKey& key, std::uint64_t bytes, bool& known) {
  if (recovery_ && !recovery_->status) return recovery_->status;
  // An erasure on its way would take what is known with it, and a reclaim the objects of the next region.
  if (recovery_ && pending_erasures_ == 0) {
    const auto location = index_.locate(key);
    if (location && std::uint64_t{location->pages} * kBlockAlignment == bytes && location->region != next_region_) {
      index_.touch(key);
      known = true;
      return Status::ok();
    }
  }
  if (queued_bytes_ + bytes > config_.write_queue_bytes) {
    return {Code::kBusy, "the write queue of the NVMe tier is full"};
  }
  if (config_.write_bytes_per_second == 0) return Status::ok();
  const std::int64_t now = clock_.now_ns();
  tokens_ = std::min(
      static_cast<double>(config_.write_burst_bytes),
      tokens_ + static_cast<double>(now - tokens_ns_) * 1e-9 * static_cast<double>(config_.write_bytes_per_second));
  tokens_ns_ = now;
  // An object larger than the burst goes, too, and is paid for afterwards.
  if (tokens_ <= 0) return {Code::kRefused, "the NVMe tier spares its flash: write_bytes_per_second is reached"};
  tokens_ -= static_cast<double>(bytes);
  return Status::ok();
}

void NvmeTier::do_write(TierObject object, Done done) {
  constexpr std::size_t kMostBlocks = 0xffff;
  Write write;
  write.bytes = object.bytes();
  if (object.blocks.size() > kMostBlocks) return done(Status(Code::kInvalid, "the object has too many blocks"));
  write.line.entry = entry_of(LogEntry::Kind::kObject, object.key, std::move(object.blocks));
  if (!log_->fits_empty_region(write.line.entry, write.bytes)) {
    return done(
        Status(Code::kRefused, "an object of " + std::to_string(write.bytes) +
                                   " bytes does not fit into a region: configure larger files, or region_bytes"));
  }
  write.line.entry.first_page_checksum = checksum64(object.pieces.front().data(), kBlockAlignment);
  write.line.pieces = std::move(object.pieces);
  write.hold = std::move(object.hold);
  write.queued_ns = clock_.now_ns();
  Status status;
  bool known = false;
  {
    std::lock_guard lock(mutex_);
    status = admit(object.key, write.bytes, known);
    if (status && !known) {
      write.done = std::move(done);
      queued_bytes_ += write.bytes;
      ++unfinished_;
      written_namespaces_.insert(object.key.namespace_id);
      queue_.push_back(std::move(write));
      changed_.notify_all();
      return;
    }
  }
  done(std::move(status));
}

// Each is a line of its own, since lines of one batch lie in one region; done is called when the last has ended.
void NvmeTier::queue_erasures(std::vector<LogEntry> entries, Done done) {
  struct Erasures {
    std::mutex mutex;
    std::size_t left = 0;
    Status status;
    Done done;
  };
  const auto erasures = std::make_shared<Erasures>();
  erasures->done = std::move(done);
  const auto one_ended = [erasures](Status status) {
    std::unique_lock lock(erasures->mutex);
    if (erasures->status && !status) erasures->status = std::move(status);
    if (--erasures->left > 0) return;
    lock.unlock();
    erasures->done(std::move(erasures->status));
  };
  Status status;
  {
    std::lock_guard lock(mutex_);
    if (recovery_ && !recovery_->status) status = recovery_->status;
    for (auto& entry : entries) {
      if (!status) break;
      // Gone at once, and for good with its line in the log. The line is needed even if the object is not known: it may
      // be on its way in, or have been dropped as unreadable, and would come back with the next start.
      if (entry.kind == LogEntry::Kind::kErase) index_.erase(key_of(entry));
      ++erasures->left;
      Write write;
      write.line.entry = std::move(entry);
      write.done = one_ended;
      write.queued_ns = clock_.now_ns();
      ++unfinished_;
      ++pending_erasures_;
      queue_.push_back(std::move(write));
    }
    if (erasures->left > 0) {
      changed_.notify_all();
      return;
    }
  }
  erasures->done(std::move(status));
}

void NvmeTier::do_erase(std::vector<ChunkKey> keys, Done done) {
  std::vector<LogEntry> entries;
  entries.reserve(keys.size());
  for (const auto& key : keys) entries.push_back(entry_of(LogEntry::Kind::kErase, key, {key.last_block}));
  queue_erasures(std::move(entries), std::move(done));
}

void NvmeTier::do_erase_all(const NamespaceSet& namespaces, Done done) {
  if (namespaces.is_all()) return queue_erasures({entry_of(LogEntry::Kind::kEraseAll, {}, {})}, std::move(done));
  std::vector<LogEntry> entries;
  if (const auto one = namespaces.one()) {
    entries.push_back(entry_of(LogEntry::Kind::kEraseNamespace, {*one, 0, {}}, {}));
  } else {
    // The log names one namespace in each line.
    std::unique_lock lock(mutex_);
    if (!recovery_) {
      lock.unlock();
      return done({Code::kUnavailable, "the NVMe tier still reads its tables: flush again in a moment"});
    }
    std::set<NamespaceId> found = written_namespaces_;
    found.insert(index_.namespaces().begin(), index_.namespaces().end());
    for (const NamespaceId& each : found) {
      if (namespaces.contains(each)) entries.push_back(entry_of(LogEntry::Kind::kEraseNamespace, {each, 0, {}}, {}));
    }
  }
  queue_erasures(std::move(entries), std::move(done));
}

void NvmeTier::do_list(const NamespaceSet& namespaces, PageDone page, Done done) {
  std::unique_lock lock(mutex_);
  if (!recovery_) {
    lock.unlock();
    return done({Code::kUnavailable, "the NVMe tier still reads its tables: ask again in a moment"});
  }
  for (std::uint32_t region = 0; region < log_->regions(); ++region) {
    for (std::size_t begin = 0; begin < index_.inserted(region); begin += kEraseAtOnce) {
      auto objects = index_.list(region, begin, kEraseAtOnce, namespaces);
      lock.unlock();
      if (!objects.empty()) page(std::move(objects));
      lock.lock();
    }
  }
  lock.unlock();
  done(Status::ok());
}

Status NvmeTier::do_drain(std::int64_t timeout_ns) {
  std::unique_lock lock(mutex_);
  ++drains_;
  changed_.notify_all();
  const bool empty = changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return unfinished_ == 0; });
  --drains_;
  return empty ? Status::ok() : Status(Code::kExpired, "the write queue of the NVMe tier did not get empty in time");
}

void NvmeTier::end_write(Write& write, Status status) {
  write.hold.reset();  // whoever waits may want the memory
  write.done(std::move(status));
}

void NvmeTier::fail_first(std::unique_lock<std::mutex>& lock, Status status) {
  Write write = std::move(queue_.front());
  queue_.pop_front();
  forget_write(write);
  ++stats_.failed_writes;
  lock.unlock();
  end_write(write, std::move(status));
}

void NvmeTier::forget_write(const Write& write) {
  queued_bytes_ -= write.bytes;
  --unfinished_;
  pending_erasures_ -= write.bytes == 0 ? 1 : 0;
  if (write.rewrite) rewriting_ = false;
  if (unfinished_ == 0) changed_.notify_all();
}

// ---- the thread

void NvmeTier::run() {
  pthread_setname_np(pthread_self(), "nvme-log");
  recover();
  // One batch is flushed while the data of the next is on its way.
  std::optional<Batch> committing;
  while (wait_for_writes(committing.has_value())) {
    auto next = begin_batch(committing);
    if (committing) commit(*committing);
    committing = std::move(next);
    rewrite_next();
  }
  if (committing) commit(*committing);
  // What the last commits could not write and nobody will try again.
  for (std::unique_lock lock(mutex_); !queue_.empty(); lock.lock()) {
    fail_first(lock, {Code::kUnavailable, "the NVMe tier is closing"});
  }
}

void NvmeTier::recover() {
  const std::int64_t begin = clock_.now_ns();
  auto log = log_->recover([this](std::uint32_t region, const LogEntry& entry) { apply(region, entry); });
  NvmeRecovery recovery;
  if (log) {
    recovery.log = std::move(*log);
  } else {
    recovery.status = log.error();
  }
  std::deque<Write> ended;
  {
    std::lock_guard lock(mutex_);
    for (std::uint32_t region = 0; region < log_->regions(); ++region) {
      if (region != log_->open_region()) index_.close(region);
    }
    recovery.objects = index_.objects();
    recovery.seconds = static_cast<double>(clock_.now_ns() - begin) * 1e-9;
    if (!recovery.status) ended.swap(queue_);
    for (const auto& write : ended) forget_write(write);
    recovery_ = recovery;
    changed_.notify_all();
  }
  for (auto& write : ended) end_write(write, recovery.status);
  if (recovery.status) choose_rewrites();
}

bool NvmeTier::wait_for_writes(bool committing) {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (queue_.empty()) {
      if (committing || (!rewriting_ && !rewrites_.empty())) return true;
      changed_.wait(lock);
      continue;
    }
    const std::int64_t age = clock_.now_ns() - queue_.front().queued_ns;
    if (committing || drains_ > 0 || queued_bytes_ >= kBatchBytes || age >= config_.batch_age_ns) return true;
    changed_.wait_for(lock, std::chrono::nanoseconds(config_.batch_age_ns - age));
  }
  return false;
}

void NvmeTier::fill(Batch& batch) {
  std::lock_guard lock(mutex_);
  while (!queue_.empty() && batch.log.data_bytes < kBatchBytes && log_->add(batch.log, queue_.front().line)) {
    batch.writes.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
}

std::optional<NvmeTier::Batch> NvmeTier::begin_batch(std::optional<Batch>& committing) {
  Batch batch;
  fill(batch);
  if (batch.writes.empty()) {
    {
      std::lock_guard lock(mutex_);
      if (queue_.empty()) return std::nullopt;
    }
    // The region is full, or something in it failed.
    if (committing) commit(*committing);
    committing.reset();
    if (auto status = make_room(); !status) {
      std::unique_lock lock(mutex_);
      if (queue_.empty()) return std::nullopt;
      fail_first(lock, std::move(status));
      return std::nullopt;
    }
    fill(batch);
    if (batch.writes.empty()) return std::nullopt;
  }
  log_->write(batch.log);
  return batch;
}

void NvmeTier::commit(Batch& batch) {
  if (!log_->commit(batch.log)) {
    std::lock_guard lock(mutex_);
    for (std::size_t i = batch.writes.size(); i-- > 0;) {
      batch.writes[i].line = std::move(batch.log.lines[i]);
      queue_.push_front(std::move(batch.writes[i]));
    }
    return;
  }
  const std::uint32_t region = *log_->open_region();
  for (std::size_t i = 0; i < batch.writes.size(); ++i) {
    const LogLine& line = batch.log.lines[i];
    // What could not be erased for good is gone until the next start at least.
    if (line.status || line.entry.kind != LogEntry::Kind::kObject) apply(region, line.entry);
  }
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < batch.writes.size(); ++i) {
      const Write& write = batch.writes[i];
      if (batch.log.lines[i].status) {
        stats_.written_bytes += write.bytes;
        stats_.rewritten_bytes += write.rewrite ? write.bytes : 0;
      } else {
        ++stats_.failed_writes;
      }
      forget_write(write);
    }
  }
  for (std::size_t i = 0; i < batch.writes.size(); ++i) end_write(batch.writes[i], batch.log.lines[i].status);
}

void NvmeTier::apply(std::uint32_t region, const LogEntry& entry) {
  switch (entry.kind) {
    case LogEntry::Kind::kObject: {
      std::lock_guard lock(mutex_);
      if (index_.inserted(region) < ObjectIndex::kMostObjects) index_.insert(region, entry);
      return;
    }
    case LogEntry::Kind::kErase: {
      std::lock_guard lock(mutex_);
      index_.erase(key_of(entry));
      return;
    }
    case LogEntry::Kind::kEraseNamespace:
    case LogEntry::Kind::kEraseAll: {
      const auto one = entry.kind == LogEntry::Kind::kEraseAll ? std::nullopt : std::optional(entry.namespace_id);
      for (std::uint32_t each = 0; each < log_->regions(); ++each) {
        // Only this thread inserts.
        const std::size_t objects = index_.inserted(each);
        for (std::size_t begin = 0; begin < objects; begin += kEraseAtOnce) {
          std::lock_guard lock(mutex_);
          index_.erase_range(each, begin, kEraseAtOnce, one);
        }
      }
      return;
    }
  }
}

/// Regions are reclaimed when a new header is written, and not before: a medium that takes nothing costs nothing that
/// is on it. kOpenTries: the next region's header may lie on a bad block; then it is given up with the one behind it.
Status NvmeTier::make_room() {
  if (const auto full = log_->open_region()) {
    std::lock_guard lock(mutex_);
    index_.close(*full);
  }
  Status status;
  std::vector<std::uint32_t> regions;
  while (regions.size() < kOpenTries && regions.size() + 1 < log_->regions()) {
    regions.push_back(log_->next_region(regions.size()));
    status = log_->open_next(regions.size() - 1);
    if (!status) continue;
    for (const std::uint32_t region : regions) reclaim(region);
    choose_rewrites();
    return status;
  }
  return status;
}

void NvmeTier::reclaim(std::uint32_t region) {
  const std::size_t objects = index_.inserted(region);
  for (std::size_t begin = 0; begin < objects; begin += kEraseAtOnce) {
    std::lock_guard lock(mutex_);
    index_.erase_range(region, begin, kEraseAtOnce, std::nullopt);
  }
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kReaderInterval, [&] { return readers_[region] == 0; })) {
    lock.unlock();
    expire_queue();
    lock.lock();
  }
  index_.clear(region);
  stats_.regions_reclaimed += objects > 0 ? 1 : 0;
}

// Which region is next is known as soon as one is opened, so that its objects can move in good time.
void NvmeTier::choose_rewrites() {
  const auto most = static_cast<std::uint64_t>(config_.rewrite_share * static_cast<double>(config_.region_bytes));
  std::vector<LogEntry> entries;
  if (most > 0) entries = log_->read_next_region();
  std::lock_guard lock(mutex_);
  rewrites_.clear();
  next_region_ = log_->next_region();
  std::uint64_t pages = 0;
  for (auto& entry : entries) {
    if (entry.kind != LogEntry::Kind::kObject || !index_.touched(key_of(entry))) continue;
    const ObjectIndex::Location location{next_region_, entry.page, entry.pages, entry.first_page_checksum};
    if (index_.locate(key_of(entry)) != location || (pages + entry.pages) * kBlockAlignment > most) continue;
    pages += entry.pages;
    rewrites_.push_back(std::move(entry));
  }
}

// One at a time: a buffer of one object is all that it takes, and others' writes go between.
void NvmeTier::rewrite_next() {
  std::unique_lock lock(mutex_);
  while (!rewriting_ && !stopping_ && !rewrites_.empty()) {
    LogEntry entry = std::move(rewrites_.front());
    rewrites_.pop_front();
    const ObjectIndex::Location location{next_region_, entry.page, entry.pages, entry.first_page_checksum};
    if (index_.locate(key_of(entry)) != location) continue;
    rewriting_ = true;
    const auto buffer = std::make_shared<AlignedBuffer>(std::size_t{entry.pages} * kBlockAlignment);
    auto reading = std::make_shared<Reading>();
    reading->key = key_of(entry);
    reading->location = location;
    reading->into = buffer->span();
    reading->done = [this, entry, location, buffer](const Status& status) {
      std::lock_guard held(mutex_);
      // Anything that was erased since must not come back behind its erasure.
      if (!status || stopping_ || pending_erasures_ > 0 || index_.locate(key_of(entry)) != location) {
        rewriting_ = false;
        changed_.notify_all();
        return;
      }
      Write write;
      write.line.entry = entry;
      write.line.pieces = {buffer->span()};
      write.hold = buffer;
      write.done = [](const Status&) {};
      write.bytes = buffer->size();
      write.queued_ns = clock_.now_ns();
      write.rewrite = true;
      queued_bytes_ += write.bytes;
      ++unfinished_;
      queue_.push_back(std::move(write));
      changed_.notify_all();
    };
    reading_bytes_ += buffer->size();
    ++readers_[location.region];
    lock.unlock();
    start_reading(reading, {});
    return;
  }
}

void NvmeTier::expire_queue() {
  std::deque<Write> ended;
  {
    std::lock_guard lock(mutex_);
    const std::int64_t now = clock_.now_ns();
    while (!queue_.empty() && now - queue_.front().queued_ns >= config_.queue_age_ns) {
      forget_write(queue_.front());
      ended.push_back(std::move(queue_.front()));
      queue_.pop_front();
    }
    stats_.failed_writes += ended.size();
  }
  for (auto& write : ended) end_write(write, Status(Code::kBusy, "the NVMe device did not take the object in time"));
}

}  // namespace kvern
