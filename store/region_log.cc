#include "store/region_log.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "store/object_index.h"

namespace kvern {
namespace {

// Long enough that the device works at full speed, short enough that many are in flight at once and that a read behind
// one does not wait for long.
constexpr std::size_t kIoBytes = std::size_t{1} << 20;
// Holds the table of a batch, and of a region of a hundred chunks of 16 blocks: one read for most.
constexpr std::size_t kTableGuessBytes = std::size_t{64} << 10;
constexpr std::size_t kHeadersAtOnce = 256;
constexpr std::size_t kTailsAtOnce = 32;
constexpr std::chrono::milliseconds kIdleInterval{100};

void fill_random(void* data, std::size_t bytes) {
  auto* at = static_cast<std::byte*>(data);
  while (bytes > 0) {
    const ssize_t got = ::getrandom(at, bytes, 0);
    if (got < 0 && errno != EINTR) throw std::system_error(errno, std::system_category(), "getrandom");
    if (got <= 0) continue;
    at += got;
    bytes -= static_cast<std::size_t>(got);
  }
}

bool blank(std::span<const std::byte> bytes) {
  return std::ranges::all_of(bytes, [](std::byte byte) { return byte == std::byte{0}; });
}

}  // namespace

std::function<void(Status)> IoGroup::start(Status& status) {
  {
    std::lock_guard lock(mutex_);
    ++requests_;
  }
  return [this, &status](Status ended) {
    std::lock_guard lock(mutex_);
    if (status && !ended) status = std::move(ended);
    // Under the lock: whoever waits may destroy this as soon as it is let go.
    if (--requests_ == 0) changed_.notify_all();
  };
}

void IoGroup::read(std::uint32_t file, std::uint64_t offset, std::span<std::byte> into, Status& status) {
  read_fully(io_, file, offset, into, {}, start(status));
}

void IoGroup::write(std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from, bool through,
                    Status& status) {
  write_fully(io_, file, offset, from, through, start(status));
}

void IoGroup::sync(std::uint32_t file, Status& status) { sync_fully(io_, file, start(status)); }

void IoGroup::wait() {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kIdleInterval, [this] { return requests_ == 0; })) {
    if (!idle_) continue;
    lock.unlock();
    idle_();
    lock.lock();
  }
}

RegionLog::RegionLog(const std::vector<LogFile>& files, BlockIo& io, const RegionLogConfig& config,
                     std::function<void()> idle)
    : files_(files), io_(io), config_(config), idle_(std::move(idle)) {
  // Regions of different files follow one another, so that a burst of reads of recent objects finds several devices.
  for (std::uint32_t number = 0;; ++number) {
    const std::size_t before = places_.size();
    for (std::uint32_t file = 0; file < files.size(); ++file) {
      const std::uint64_t begin = number * config.region_bytes;
      if (begin + config.region_bytes > files[file].bytes()) continue;
      // The superblock has the first block of the first region.
      const std::uint64_t reserved = number == 0 ? kBlockAlignment : 0;
      places_.push_back({file, begin + reserved, config.region_bytes - reserved, number});
    }
    if (places_.size() == before) break;
  }
  if (places_.size() < 2) throw std::invalid_argument("an NVMe log needs room for two regions at least");
  if (places_.size() > ObjectIndex::kMostRegions) {
    throw std::invalid_argument("an NVMe log has at most " + std::to_string(ObjectIndex::kMostRegions) +
                                " regions: configure larger ones");
  }
  sequences_.resize(places_.size());
}

bool RegionLog::fits_empty_region(const LogEntry& entry, std::uint64_t bytes) const {
  const std::uint64_t table = table_block_bytes(entry_bytes(entry));
  // The smallest regions are those that hold a superblock, too: one block less.
  return kBlockAlignment + 2 * table + bytes <= config_.region_bytes - kBlockAlignment;
}

Status RegionLog::read_now(std::uint32_t region, std::uint64_t offset, std::span<std::byte> into) {
  Status status;
  IoGroup group(io_, idle_);
  group.read(places_[region].file, places_[region].offset + offset, into, status);
  group.wait();
  return status;
}

Status RegionLog::read_superblocks(LogRecovery& recovery) {
  const AlignedBuffer blocks(files_.size() * kBlockAlignment);
  const auto block = [&](std::size_t file) { return blocks.span().subspan(file * kBlockAlignment, kBlockAlignment); };
  std::vector<Status> statuses(files_.size());
  IoGroup group(io_, idle_);
  for (std::uint32_t file = 0; file < files_.size(); ++file) group.read(file, 0, block(file), statuses[file]);
  group.wait();

  std::optional<LogId> log;
  bool same_cut = true;
  std::vector<Superblock> found(files_.size());
  for (std::size_t file = 0; file < files_.size(); ++file) {
    if (!statuses[file]) return statuses[file];
    const auto decoded = decode(block(file), found[file]);
    if (decoded == Decoded::kOk) {
      if (!log) log = found[file].log;
      same_cut = same_cut && found[file].region_bytes == config_.region_bytes;
      continue;
    }
    if (decoded == Decoded::kOtherVersion) {
      recovery.message = files_[file].path() + " was written by another version of the log and starts empty";
    } else if (!blank(block(file))) {
      recovery.message = files_[file].path() + " has a damaged superblock and starts empty";
    }
  }
  if (log && !same_cut) {
    recovery.message = "the log was cut into regions of another size and starts empty";
    log.reset();
  }
  if (log) {
    log_ = *log;
  } else {
    fill_random(log_.data(), log_.size());
  }
  for (std::uint32_t file = 0; file < files_.size(); ++file) {
    if (found[file].log == log_ && found[file].region_bytes == config_.region_bytes) continue;
    encode(Superblock{log_, config_.region_bytes}, block(file));
    group.write(file, 0, block(file), config_.sync, statuses[file]);
  }
  group.wait();
  for (auto& status : statuses) {
    if (!status) return std::move(status);
  }
  return Status::ok();
}

std::vector<RegionLog::Written> RegionLog::read_headers(LogRecovery& recovery) {
  std::vector<Written> written;
  const AlignedBuffer blocks(kHeadersAtOnce * kBlockAlignment);
  for (std::uint32_t begin = 0; begin < places_.size(); begin += kHeadersAtOnce) {
    const std::size_t count = std::min(kHeadersAtOnce, places_.size() - begin);
    std::vector<Status> statuses(count);
    IoGroup group(io_, idle_);
    for (std::uint32_t i = 0; i < count; ++i) {
      const Place& at = places_[begin + i];
      group.read(at.file, at.offset, blocks.span().subspan(i * kBlockAlignment, kBlockAlignment), statuses[i]);
    }
    group.wait();
    for (std::uint32_t i = 0; i < count; ++i) {
      const auto block = blocks.span().subspan(i * kBlockAlignment, kBlockAlignment);
      RegionHeader header;
      const auto checksum = statuses[i] ? decode(block, header) : std::nullopt;
      if (!checksum) {
        if (!statuses[i] || !blank(block)) ++recovery.damaged;
      } else if (header.log == log_ && header.region == places_[begin + i].number) {
        written.push_back({begin + i, header, *checksum});
      }
    }
  }
  std::ranges::sort(written, {}, [](const Written& each) { return each.header.sequence; });
  return written;
}

bool RegionLog::apply_table(std::uint32_t region, std::span<const std::byte> table, const Apply& apply) const {
  const std::uint64_t pages = places_[region].bytes / kBlockAlignment;
  bool within = true;
  const bool whole = read_table(table, [&](const LogEntry& entry) {
    if (entry.kind == LogEntry::Kind::kObject &&
        (entry.pages == 0 || entry.page == 0 || std::uint64_t{entry.page} + entry.pages > pages)) {
      within = false;
    } else {
      apply(region, entry);
    }
  });
  return whole && within;
}

bool RegionLog::apply_footer(const Written& written, std::span<const std::byte> tail, const Apply& apply) {
  const auto header = decode_footer_header(tail);
  if (!header || header->salt != written.header.salt || header->sequence != written.header.sequence) return false;
  const std::uint64_t bytes = table_block_bytes(header->table_bytes);
  const Place& at = places_[written.region];
  if (bytes > at.bytes) return false;
  if (bytes <= tail.size()) {
    const auto table = footer_table(*header, tail);
    return table && apply_table(written.region, *table, apply);
  }
  const AlignedBuffer buffer(bytes);
  if (!read_now(written.region, at.bytes - bytes, buffer.span())) return false;
  const auto table = footer_table(*header, buffer.span());
  return table && apply_table(written.region, *table, apply);
}

void RegionLog::follow_records(const Written& written, bool newest, const Apply& apply) {
  const Place& at = places_[written.region];
  std::uint64_t position = kBlockAlignment;
  std::uint64_t link = written.checksum;
  std::uint32_t batches = 0;
  std::vector<std::byte> tables;
  std::size_t objects = 0;
  AlignedBuffer buffer(kTableGuessBytes);
  while (position < at.bytes) {
    auto bytes = buffer.span().first(std::min<std::uint64_t>(kTableGuessBytes, at.bytes - position));
    if (!read_now(written.region, position, bytes)) break;
    const auto header = decode_record_header(bytes);
    if (!header || header->salt != written.header.salt || header->sequence != written.header.sequence ||
        header->batch != batches || header->previous != link) {
      break;
    }
    const std::uint64_t needed = table_block_bytes(header->table_bytes);
    if (header->next > at.bytes || header->next % kBlockAlignment != 0 || header->next < position + needed) break;
    if (needed > bytes.size()) {
      buffer = AlignedBuffer(needed);
      bytes = buffer.span();
      if (!read_now(written.region, position, bytes)) break;
    }
    const auto table = record_table(*header, bytes);
    if (!table || !apply_table(written.region, *table, [&](std::uint32_t region, const LogEntry& entry) {
          objects += entry.kind == LogEntry::Kind::kObject ? 1 : 0;
          apply(region, entry);
        })) {
      break;
    }
    if (newest) tables.insert(tables.end(), table->begin(), table->end());
    position = header->next;
    link = header->checksum;
    ++batches;
  }
  if (!newest) return;
  open_ = written.region;
  header_ = written.header;
  position_ = position;
  link_ = link;
  batches_ = batches;
  table_bytes_ = tables.size();
  table_ = std::move(tables);
  objects_ = objects;
  left_ = broken_ = false;
}

void RegionLog::recover_region(const Written& written, std::span<const std::byte> tail, bool newest,
                               LogRecovery& recovery, const Apply& apply) {
  ++recovery.regions;
  if (apply_footer(written, tail, apply)) return;
  ++recovery.followed;
  follow_records(written, newest, apply);
}

Result<LogRecovery> RegionLog::recover(const Apply& apply) {
  LogRecovery recovery;
  if (auto status = read_superblocks(recovery); !status) return failure(std::move(status));
  std::vector<Written> written = read_headers(recovery);
  if (!written.empty()) {
    next_sequence_ = written.back().header.sequence + 1;
    const std::uint64_t oldest = written.back().header.oldest_sequence;
    std::erase_if(written, [&](const Written& each) { return each.header.sequence < oldest; });
  }
  const AlignedBuffer buffer(kTailsAtOnce * kTableGuessBytes);
  for (std::size_t begin = 0; begin < written.size(); begin += kTailsAtOnce) {
    const std::size_t count = std::min(kTailsAtOnce, written.size() - begin);
    std::vector<Status> statuses(count);
    const auto tail = [&](std::size_t i) {
      const std::size_t bytes = std::min<std::uint64_t>(kTableGuessBytes, places_[written[begin + i].region].bytes);
      return buffer.span().subspan(i * kTableGuessBytes, bytes);
    };
    IoGroup group(io_, idle_);
    for (std::size_t i = 0; i < count; ++i) {
      const Place& at = places_[written[begin + i].region];
      group.read(at.file, at.offset + at.bytes - tail(i).size(), tail(i), statuses[i]);
    }
    group.wait();
    for (std::size_t i = 0; i < count; ++i) {
      const bool newest = begin + i + 1 == written.size();
      recover_region(written[begin + i], statuses[i] ? tail(i) : std::span<std::byte>(), newest, recovery, apply);
    }
  }
  std::vector<bool> used(places_.size());
  for (const auto& each : written) {
    used[each.region] = true;
    sequences_[each.region] = each.header.sequence;
    order_.push_back(each.region);
  }
  for (std::uint32_t region = 0; region < places_.size(); ++region) {
    if (!used[region]) free_.push_back(region);
  }
  return recovery;
}

std::vector<LogEntry> RegionLog::read_next_region() {
  std::vector<LogEntry> entries;
  if (!free_.empty()) return entries;
  const std::uint32_t region = next_region();
  const AlignedBuffer block(kBlockAlignment);
  const AlignedBuffer tail(std::min<std::uint64_t>(kTableGuessBytes, places_[region].bytes));
  if (!read_now(region, 0, block.span())) return entries;
  Written written{region, {}, 0};
  const auto checksum = decode(block.span(), written.header);
  if (!checksum || written.header.log != log_ || written.header.sequence != sequences_[region]) return entries;
  written.checksum = *checksum;
  const auto apply = [&](std::uint32_t, const LogEntry& entry) { entries.push_back(entry); };
  if (read_now(region, places_[region].bytes - tail.size(), tail.span()) && apply_footer(written, tail.span(), apply)) {
    return entries;
  }
  entries.clear();
  follow_records(written, false, apply);
  return entries;
}

void RegionLog::close_region() {
  const std::uint32_t region = *open_;
  open_.reset();
  if (broken_) return;
  const Place& at = places_[region];
  TableHeader header{.sequence = header_.sequence, .salt = header_.salt, .batch = batches_};
  const AlignedBuffer block(table_block_bytes(table_.size()));
  encode_footer(header, table_, block.span());
  // Without it, recovery follows the records: nothing is lost when this fails.
  Status ignored;
  IoGroup group(io_, idle_);
  group.write(at.file, at.offset + at.bytes - block.size(), block.span(), false, ignored);
  group.wait();
}

Status RegionLog::open_next(std::size_t skip) {
  if (open_) close_region();
  std::vector<std::uint32_t> taken;
  for (std::size_t i = 0; i <= skip; ++i) taken.push_back(next_region(i));
  const std::uint32_t region = taken.back();
  const Place& at = places_[region];
  // Not given again, since the header may lie on a medium that reported an error.
  const std::uint64_t first_sequence = std::exchange(next_sequence_, next_sequence_ + taken.size());
  const std::uint64_t sequence = first_sequence + skip;
  const auto oldest =
      std::ranges::find_if(order_, [&](std::uint32_t each) { return std::ranges::find(taken, each) == taken.end(); });
  RegionHeader header{log_, at.number, sequence, oldest == order_.end() ? sequence : sequences_[*oldest], 0};
  fill_random(&header.salt, sizeof header.salt);
  const AlignedBuffer block(kBlockAlignment);
  const std::uint64_t link = encode(header, block.span());
  Status status;
  IoGroup group(io_, idle_);
  group.write(at.file, at.offset, block.span(), config_.sync, status);
  group.wait();
  if (!status) return status;
  for (std::size_t i = 0; i <= skip; ++i) {
    std::erase(free_, taken[i]);
    std::erase(order_, taken[i]);
    order_.push_back(taken[i]);
    sequences_[taken[i]] = first_sequence + i;
  }
  header_ = header;
  link_ = link;
  open_ = region;
  position_ = kBlockAlignment;
  batches_ = 0;
  table_.clear();
  table_bytes_ = 0;
  objects_ = 0;
  left_ = broken_ = false;
  return status;
}

bool RegionLog::add(LogBatch& batch, LogLine& line) {
  if (!open_ || left_ || objects_ == ObjectIndex::kMostObjects) return false;
  std::uint64_t bytes = 0;
  for (const auto& piece : line.pieces) bytes += piece.size();
  const std::uint64_t entry = entry_bytes(line.entry);
  const std::uint64_t end = position_ + table_block_bytes(batch.table_bytes + entry) + batch.data_bytes + bytes;
  const std::uint64_t footer = table_block_bytes(table_bytes_ + batch.table_bytes + entry);
  if (end + footer > places_[*open_].bytes) return false;
  batch.table_bytes += entry;
  batch.data_bytes += bytes;
  objects_ += line.entry.kind == LogEntry::Kind::kObject ? 1 : 0;
  batch.lines.push_back(std::move(line));
  return true;
}

void RegionLog::write(LogBatch& batch) {
  const Place& at = places_[*open_];
  batch.offset = position_;
  std::uint64_t end = position_ + table_block_bytes(batch.table_bytes);
  position_ = end + batch.data_bytes;
  table_bytes_ += batch.table_bytes;
  batch.writes = std::make_unique<IoGroup>(io_, idle_);
  for (auto& line : batch.lines) {
    line.status = Status::ok();
    if (line.pieces.empty()) continue;
    line.entry.page = static_cast<std::uint32_t>(end / kBlockAlignment);
    const std::uint64_t begin = end;
    for (auto piece : line.pieces) {
      while (!piece.empty()) {
        const auto part = piece.first(std::min(piece.size(), kIoBytes));
        batch.writes->write(at.file, at.offset + end, part, false, line.status);
        end += part.size();
        piece = piece.subspan(part.size());
      }
    }
    line.entry.pages = static_cast<std::uint32_t>((end - begin) / kBlockAlignment);
  }
}

bool RegionLog::commit(LogBatch& batch) {
  batch.writes->wait();
  if (broken_) return false;
  const Place& at = places_[*open_];
  std::vector<std::byte> table;
  for (auto& line : batch.lines) {
    if (line.status) {
      append_entry(table, line.entry);
    } else {
      left_ = true;
    }
  }
  TableHeader header{.sequence = header_.sequence,
                     .salt = header_.salt,
                     .next = batch.offset + table_block_bytes(batch.table_bytes) + batch.data_bytes,
                     .previous = link_,
                     .batch = batches_};
  const AlignedBuffer block(table_block_bytes(table.size()));
  encode_record(header, table, block.span());
  Status status;
  if (config_.sync && batch.data_bytes > 0) batch.writes->sync(at.file, status);
  batch.writes->wait();
  if (status) batch.writes->write(at.file, at.offset + batch.offset, block.span(), config_.sync, status);
  batch.writes->wait();
  if (!status) {
    left_ = broken_ = true;
    for (auto& line : batch.lines) {
      if (line.status) line.status = status;
    }
    return true;
  }
  link_ = header.checksum;
  ++batches_;
  table_.insert(table_.end(), table.begin(), table.end());
  return true;
}

}  // namespace kvern
