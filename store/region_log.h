#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "store/block_io.h"
#include "store/log_file.h"
#include "store/region_format.h"

namespace kvern {

/// Requests of one thread that waits for them.
class IoGroup {
 public:
  /// idle: called from time to time while waiting; may be empty.
  IoGroup(BlockIo& io, const std::function<void()>& idle) : io_(io), idle_(idle) {}
  ~IoGroup() { wait(); }
  IoGroup(const IoGroup&) = delete;
  IoGroup& operator=(const IoGroup&) = delete;

  /// status lives until the request has ended, keeps the first error, and is read after wait(). Not cancelled, but may
  /// end with kExpired when the medium is being closed.
  void read(std::uint32_t file, std::uint64_t offset, std::span<std::byte> into, Status& status);
  void write(std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from, bool through, Status& status);
  void sync(std::uint32_t file, Status& status);
  /// Until all requests have ended.
  void wait();

 private:
  std::function<void(Status)> start(Status& status);

  BlockIo& io_;
  const std::function<void()>& idle_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t requests_ = 0;
};

/// One line of a batch: an entry of the log and, for objects, its bytes.
struct LogLine {
  LogEntry entry;
  std::vector<std::span<const std::byte>> pieces;
  Status status;  ///< after commit(): whether it is in the log for good
};

/// Lines that become durable together.
struct LogBatch {
  std::vector<LogLine> lines;
  std::uint64_t offset = 0;  ///< of its record in the region
  std::uint64_t table_bytes = 0;
  std::uint64_t data_bytes = 0;
  std::unique_ptr<IoGroup> writes;
};

struct RegionLogConfig {
  std::uint64_t region_bytes = 0;
  /// Flush the device's cache before a batch counts as durable: survives loss of power, not only of the process.
  bool sync = true;
};

struct LogRecovery {
  std::uint64_t regions = 0;   ///< that hold something
  std::uint64_t followed = 0;  ///< of them, without a footer: their records were followed
  std::uint64_t damaged = 0;   ///< headers or tables that are there and not intact
  std::string message;         ///< says why a log was started empty, if it was
};

/// The log on its medium: files cut into regions, written one after another and reused oldest first.
///
/// A batch goes: data; flush; record, written through. Its lines count from then on. So at any instant what recovery
/// finds is all that was committed, and perhaps one batch more. A region's header is written through before anything
/// else in it, and makes all tables of its former life void. Footers only shorten recovery.
///
/// Not thread-safe: belongs to one thread, which blocks in it. place() is for all threads.
class RegionLog {
 public:
  struct Place {
    std::uint32_t file = 0;
    std::uint64_t offset = 0;
    std::uint64_t bytes = 0;
    std::uint32_t number = 0;  ///< in the file
  };

  /// files and io outlive the log. Throws std::invalid_argument when the files are too small for two regions, or hold
  /// too many.
  RegionLog(const std::vector<LogFile>& files, BlockIo& io, const RegionLogConfig& config, std::function<void()> idle);

  std::size_t regions() const { return places_.size(); }
  const Place& place(std::uint32_t region) const { return places_[region]; }
  /// Whether an object of so many bytes with such an entry fits into an empty region.
  bool fits_empty_region(const LogEntry& entry, std::uint64_t bytes) const;

  /// Before anything else. Calls apply with every entry in the order of the log. An error: the medium cannot be read or
  /// written.
  Result<LogRecovery> recover(const std::function<void(std::uint32_t region, const LogEntry& entry)>& apply);

  /// The region that is written, if one is open.
  std::optional<std::uint32_t> open_region() const { return open_; }
  /// The one that open_next() will take. skip: so many whose turn is before, less than regions().
  std::uint32_t next_region(std::size_t skip = 0) const {
    return skip < free_.size() ? free_[skip] : order_[skip - free_.size()];
  }
  /// What the tables of next_region() name, as far as they can be read; nothing when it is a free one.
  std::vector<LogEntry> read_next_region();
  /// Closes the open region and opens next_region(skip). What that held, and those that were passed over, is not found
  /// by recovery any more, nor may it be by others. They are void together: a region that stayed behind younger ones
  /// would bring back what these had erased. On an error none is open and nothing else has changed.
  Status open_next(std::size_t skip = 0);

  /// Moves the line into the batch, which is not written yet, if there is room for it in the open region.
  bool add(LogBatch& batch, LogLine& line);
  /// Gives the batch its place and starts to write its data, in the order of calls.
  void write(LogBatch& batch);
  /// Makes it durable, in the order of write(), and sets the status of each line. False: a batch before it in the
  /// region failed, so that recovery would not find it; to be added again, behind open_next().
  bool commit(LogBatch& batch);

 private:
  using Apply = std::function<void(std::uint32_t region, const LogEntry& entry)>;
  struct Written {
    std::uint32_t region;
    RegionHeader header;
    std::uint64_t checksum;  ///< of the header
  };

  Status read_superblocks(LogRecovery& recovery);
  std::vector<Written> read_headers(LogRecovery& recovery);
  void recover_region(const Written& written, std::span<const std::byte> tail, bool newest, LogRecovery& recovery,
                      const Apply& apply);
  bool apply_footer(const Written& written, std::span<const std::byte> tail, const Apply& apply);
  void follow_records(const Written& written, bool newest, const Apply& apply);
  bool apply_table(std::uint32_t region, std::span<const std::byte> table, const Apply& apply) const;
  Status read_now(std::uint32_t region, std::uint64_t offset, std::span<std::byte> into);
  void close_region();

  const std::vector<LogFile>& files_;
  BlockIo& io_;
  const RegionLogConfig config_;
  const std::function<void()> idle_;
  std::vector<Place> places_;
  LogId log_{};
  std::uint64_t next_sequence_ = 1;
  std::deque<std::uint32_t> free_;   ///< never written in this log, or void
  std::deque<std::uint32_t> order_;  ///< written, oldest first
  std::vector<std::uint64_t> sequences_;

  std::optional<std::uint32_t> open_;
  RegionHeader header_;            ///< of the open region
  std::uint64_t position_ = 0;     ///< where its next batch goes
  std::uint64_t link_ = 0;         ///< checksum that its next record names as the one before
  std::uint32_t batches_ = 0;      ///< committed
  std::vector<std::byte> table_;   ///< of all that is committed
  std::uint64_t table_bytes_ = 0;  ///< the same with what is placed and not committed yet
  std::size_t objects_ = 0;        ///< placed
  bool left_ = false;              ///< something failed: nothing more is added
  bool broken_ = false;            ///< nothing more can be committed
};

}  // namespace kvern
