#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "store/block_io.h"
#include "store/log_file.h"
#include "store/object_index.h"
#include "store/region_log.h"
#include "store/tier.h"

namespace kvern {

struct NvmeFileConfig {
  std::string path;         ///< a file, which is made if it is not there, or a block device
  std::uint64_t bytes = 0;  ///< a multiple of 4096; preallocated
};

struct NvmeConfig {
  /// An object lies in one region: those of common models have 32 to 80 MiB, and what is left at the end of a region is
  /// lost, half an object on average.
  static constexpr std::uint64_t kRegionBytes = std::uint64_t{256} << 20;
  /// Reclaiming takes the objects of one region at once: a small log has at least so many regions in each file.
  static constexpr std::uint64_t kRegionsOfSmallFile = 16;

  std::vector<NvmeFileConfig> files;
  /// A multiple of 4096; 0: as the two constants above say, and larger in logs of more than 16 TiB. Another value
  /// empties the log.
  std::uint64_t region_bytes = 0;
  /// Flush the device before a write counts as done, so that it survives loss of power. Off, it survives the end of the
  /// process only.
  bool sync = true;

  /// write() beyond this gives kBusy. The objects in the queue are held in DRAM.
  std::uint64_t write_queue_bytes = std::uint64_t{256} << 20;
  /// How long a write may wait for others that are flushed together with it.
  std::int64_t batch_age_ns = 10'000'000;
  /// A write that has not begun after this ends with kBusy: the medium hangs, and the memory is wanted back.
  std::int64_t queue_age_ns = 30'000'000'000;
  /// read() beyond this gives kBusy.
  std::uint64_t read_queue_bytes = std::uint64_t{1} << 30;

  /// Spares the flash: writes beyond this rate are refused (kRefused); 0: no limit.
  std::uint64_t write_bytes_per_second = 0;
  /// What may be written at once after a pause.
  std::uint64_t write_burst_bytes = std::uint64_t{1} << 30;
  /// The share of a region that may be written again when it is the next to be reclaimed: objects that were read since
  /// they were written; 0: none. Bounds the wear: 1 / (1 - share) times what is new. Why a half:
  /// docs/decisions/0007-nvme-log.md.
  double rewrite_share = 0.5;

  /// How long to wait for the lock of a predecessor that was killed.
  std::int64_t lock_wait_ns = 5'000'000'000;
  BlockIoConfig io;
  BreakerConfig breaker;

  Status validate() const;
  /// With what 0 stands for filled in.
  NvmeConfig resolved() const;
};

struct NvmeStats {
  std::uint64_t regions = 0;
  std::uint64_t regions_reclaimed = 0;
  std::uint64_t written_bytes = 0;    ///< of objects, with those rewritten
  std::uint64_t rewritten_bytes = 0;  ///< of objects that were moved out of a region before it was reclaimed
  std::uint64_t failed_writes = 0;
  std::uint64_t unreadable = 0;  ///< objects dropped since the medium did not give them back
  std::uint64_t index_bytes = 0;
};

struct NvmeRecovery {
  LogRecovery log;
  std::uint64_t objects = 0;
  double seconds = 0;
  Status status;  ///< not OK: the medium could not be read, and the tier refuses everything
};

/// Chunk objects in a log on NVMe (docs/format.md, docs/decisions/0007). All blocks of all objects are known in memory,
/// so that find() answers at once, on the caller's thread.
///
/// OK of write() and erase(): survives kill -9, and with sync loss of power. An object leaves when it is erased, when
/// its region is reclaimed (the oldest first; what was read since then is written again, see rewrite_share), or when
/// the medium does not give it back. A write whose key and size are known already is OK at once.
///
/// One thread writes and recovers; BlockIo has its own for what has ended. Until recovery has ended find() misses, and
/// writes and erasures wait. The destructor ends writes that have not begun with kUnavailable: drain() first.
class NvmeTier final : public Tier {
 public:
  using OpenIo = std::function<OpenedBlockIo(const std::vector<int>& files, const BlockIoConfig& config)>;

  /// Opens, locks and preallocates the files, and begins recovery. Throws std::invalid_argument for a configuration
  /// that is not valid and std::runtime_error, with a sentence, when a file cannot be used.
  NvmeTier(const NvmeConfig& config, const Clock& clock, TierObserver* observer, const OpenIo& open_io = open_block_io);
  ~NvmeTier() override;

  /// "io_uring" or "threads".
  std::string_view io_kind() const { return io_->kind(); }
  /// Sentences that the operator should read once: io_uring forbidden, no direct I/O.
  const std::vector<std::string>& notes() const { return notes_; }
  /// Waits for its end. nullopt when that takes longer.
  std::optional<NvmeRecovery> recovery(std::int64_t timeout_ns) const;
  NvmeStats nvme_stats() const;

 private:
  /// One line on its way into the log.
  struct Write {
    LogLine line;
    std::shared_ptr<const void> hold;
    Done done;
    std::uint64_t bytes = 0;
    std::int64_t queued_ns = 0;
    bool rewrite = false;
  };
  struct Batch {
    std::vector<Write> writes;  ///< without their lines, which are in log, in the same order
    LogBatch log;
  };
  struct Reading;

  void do_find(std::vector<CellQuery> cells, std::stop_token cancel, FindDone done) override;
  void do_read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
               Done done) override;
  void do_write(TierObject object, Done done) override;
  void do_erase(std::vector<ChunkKey> keys, Done done) override;
  void do_erase_all(const NamespaceSet& namespaces, Done done) override;
  void do_list(const NamespaceSet& namespaces, PageDone page, Done done) override;
  Status do_drain(std::int64_t timeout_ns) override;
  TierStats do_stats() const override;

  /// With the lock held: whether the object may be queued. OK with known set: it is there already.
  Status admit(const ChunkKey& key, std::uint64_t bytes, bool& known);
  void queue_erasures(std::vector<LogEntry> entries, Done done);
  void start_reading(const std::shared_ptr<Reading>& reading, const std::stop_token& cancel);
  void part_ended(Reading& reading, Status status);

  // Of the thread.
  void run();
  void recover();
  /// False: the tier is being destroyed.
  bool wait_for_writes(bool committing);
  std::optional<Batch> begin_batch(std::optional<Batch>& committing);
  void fill(Batch& batch);
  void commit(Batch& batch);
  void apply(std::uint32_t region, const LogEntry& entry);
  Status make_room();
  void reclaim(std::uint32_t region);
  void choose_rewrites();
  void rewrite_next();
  void expire_queue();
  /// With the lock held: off the count of what is not finished.
  void forget_write(const Write& write);
  static void end_write(Write& write, Status status);
  /// Ends the write that has waited longest; there must be one. Lets go of the lock.
  void fail_first(std::unique_lock<std::mutex>& lock, Status status);

  const NvmeConfig config_;
  const Clock& clock_;
  std::vector<std::string> notes_;
  std::vector<LogFile> files_;
  std::unique_ptr<BlockIo> io_;
  std::unique_ptr<RegionLog> log_;  ///< of the thread; place() of all

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::optional<NvmeRecovery> recovery_;
  ObjectIndex index_;
  std::vector<std::uint32_t> readers_;  ///< by region
  std::uint64_t reading_bytes_ = 0;
  std::deque<Write> queue_;
  std::set<NamespaceId> written_namespaces_;  ///< of objects that were accepted since the start
  std::uint64_t queued_bytes_ = 0;            ///< in the queue and in batches
  std::uint64_t unfinished_ = 0;              ///< writes in the queue and in batches
  std::uint64_t pending_erasures_ = 0;        ///< of them
  std::uint64_t drains_ = 0;                  ///< callers who wait for the queue to get empty
  double tokens_ = 0;                         ///< bytes that may be written now
  std::int64_t tokens_ns_ = 0;
  NvmeStats stats_;
  std::deque<LogEntry> rewrites_;  ///< objects of the region that is reclaimed next, to be written again
  std::uint32_t next_region_ = 0;  ///< that region
  bool rewriting_ = false;         ///< one of them is being read or written
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace kvern
