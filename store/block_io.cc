#include "store/block_io.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "base/executor.h"

namespace kvern {
namespace {

// Threads sleep in the kernel for as long as their request lasts, so that their number is the depth of the queue; more
// than a few dozen gain nothing on the disks measured and cost a stack each.
constexpr std::uint32_t kMostThreads = 32;

constexpr std::size_t kFlushDepth = 2;

class ThreadBlockIo final : public BlockIo {
 public:
  ThreadBlockIo(const std::vector<int>& files, const BlockIoConfig& config)
      : files_(files),
        readers_("nvme-read", std::min(config.read_depth, kMostThreads), std::numeric_limits<std::size_t>::max()),
        writers_("nvme-write", std::min(config.write_depth, kMostThreads), std::numeric_limits<std::size_t>::max()),
        flushers_("nvme-flush", kFlushDepth, std::numeric_limits<std::size_t>::max()) {}
  ~ThreadBlockIo() override { stopping_ = true; }

  void read(std::uint32_t file, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
            BlockDone done) override {
    run(readers_, std::move(cancel), done, [fd = files_[file], offset, into]() -> std::int64_t {
      return ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
    });
  }
  void write(std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from, bool through,
             BlockDone done) override {
    run(through ? flushers_ : writers_, {}, done, [fd = files_[file], offset, from, through]() -> std::int64_t {
      const iovec range{const_cast<std::byte*>(from.data()), from.size()};
      return ::pwritev2(fd, &range, 1, static_cast<off_t>(offset), through ? RWF_DSYNC : 0);
    });
  }
  void sync(std::uint32_t file, BlockDone done) override {
    run(flushers_, {}, done, [fd = files_[file]]() -> std::int64_t { return ::fdatasync(fd); });
  }
  std::string_view kind() const override { return "threads"; }

 private:
  template <typename Call>
  void run(ThreadPool& pool, std::stop_token cancel, const BlockDone& done, Call call) {
    const bool taken = pool.submit([this, cancel = std::move(cancel), done, call] {
      if (stopping_ || cancel.stop_requested()) return done(-ECANCELED);
      std::int64_t result = 0;
      do {
        result = call();
      } while (result < 0 && errno == EINTR);
      done(result < 0 ? -errno : result);
    });
    if (!taken) done(-ECANCELED);
  }

  const std::vector<int> files_;
  std::atomic<bool> stopping_ = false;
  ThreadPool readers_;
  ThreadPool writers_;
  ThreadPool flushers_;
};

Status status_of_errno(const char* verb, std::uint32_t file, std::uint64_t offset, std::int64_t result) {
  if (result == -ECANCELED) return {Code::kExpired, std::string(verb) + " was cancelled"};
  const std::string why =
      result < 0 ? std::system_category().message(static_cast<int>(-result)) : std::string("the file ends early");
  return {Code::kInternal, std::string("cannot ") + verb + " file " + std::to_string(file) + " of the log at byte " +
                               std::to_string(offset) + ": " + why};
}

// What counts of a request that moved fewer bytes than asked for: whole blocks, since the rest must be aligned too.
std::size_t whole_blocks(std::int64_t result) {
  return static_cast<std::size_t>(result) / kBlockAlignment * kBlockAlignment;
}

}  // namespace

AlignedBuffer::AlignedBuffer(std::size_t bytes)
    : bytes_(bytes), data_(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kBlockAlignment}))) {
  std::memset(data_.get(), 0, bytes);
}

Status BlockIoConfig::validate() const {
  if (read_depth == 0 || read_depth > 1024) return {Code::kInvalid, "read_depth must be 1 to 1024"};
  if (write_depth == 0 || write_depth > 1024) return {Code::kInvalid, "write_depth must be 1 to 1024"};
  return Status::ok();
}

std::unique_ptr<BlockIo> make_thread_block_io(const std::vector<int>& files, const BlockIoConfig& config) {
  return std::make_unique<ThreadBlockIo>(files, config);
}

OpenedBlockIo open_block_io(const std::vector<int>& files, const BlockIoConfig& config) {
  if (const auto status = config.validate(); !status) throw std::invalid_argument("block I/O: " + status.message());
  OpenedBlockIo opened;
  if (config.kind != BlockIoKind::kThreads) {
    auto uring = make_uring_block_io(files, config);
    if (uring) {
      opened.io = std::move(*uring);
      return opened;
    }
    if (config.kind == BlockIoKind::kUring) throw std::runtime_error(uring.error().message());
    opened.why = uring.error().message() + "; pread and pwrite on threads are used";
  }
  opened.io = make_thread_block_io(files, config);
  return opened;
}

void read_fully(BlockIo& io, std::uint32_t file, std::uint64_t offset, std::span<std::byte> into,
                const std::stop_token& cancel, std::function<void(Status)> done) {
  io.read(file, offset, into, cancel, [&io, file, offset, into, cancel, done = std::move(done)](std::int64_t result) {
    if (result == static_cast<std::int64_t>(into.size())) return done(Status::ok());
    const std::size_t moved = result < 0 ? 0 : whole_blocks(result);
    if (moved == 0) return done(status_of_errno("read", file, offset, std::min<std::int64_t>(result, 0)));
    read_fully(io, file, offset + moved, into.subspan(moved), cancel, done);
  });
}

void write_fully(BlockIo& io, std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from, bool through,
                 std::function<void(Status)> done) {
  io.write(file, offset, from, through,
           [&io, file, offset, from, through, done = std::move(done)](std::int64_t result) {
             if (result == static_cast<std::int64_t>(from.size())) return done(Status::ok());
             const std::size_t moved = result < 0 ? 0 : whole_blocks(result);
             if (moved == 0) return done(status_of_errno("write", file, offset, std::min<std::int64_t>(result, 0)));
             write_fully(io, file, offset + moved, from.subspan(moved), through, done);
           });
}

void sync_fully(BlockIo& io, std::uint32_t file, std::function<void(Status)> done) {
  io.sync(file, [file, done = std::move(done)](std::int64_t result) {
    done(result >= 0 ? Status::ok() : status_of_errno("sync", file, 0, result));
  });
}

}  // namespace kvern
