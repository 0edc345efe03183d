#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvern {

/// Addresses, offsets and lengths of block I/O are multiples of this.
inline constexpr std::size_t kBlockAlignment = 4096;

/// Memory for block I/O, zeroed.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t bytes);
  std::span<std::byte> span() const { return {data_.get(), bytes_}; }
  std::size_t size() const { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* data) const { ::operator delete (data, std::align_val_t{kBlockAlignment}); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Free> data_;
};

/// Bytes moved, fewer than asked for when the medium stopped early; or a negative errno. -ECANCELED: not begun, since
/// the caller cancelled it or the medium is being closed.
using BlockDone = std::function<void(std::int64_t)>;

/// The seam to the medium: asynchronous reads and writes of aligned ranges of numbered files. Thread-safe. Every
/// request ends by exactly one call of its function, on a thread of the medium, which must not block; memory stays the
/// medium's until then. Reads have a queue of their own and never wait for room among writes.
///
/// The destructor waits for requests that have begun and ends those that have not with -ECANCELED.
class BlockIo {
 public:
  virtual ~BlockIo() = default;
  virtual void read(std::uint32_t file, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
                    BlockDone done) = 0;
  /// through: the bytes are on the medium itself when it ends, as after sync().
  virtual void write(std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from, bool through,
                     BlockDone done) = 0;
  /// Writes that ended before are on the medium itself when it ends.
  virtual void sync(std::uint32_t file, BlockDone done) = 0;
  /// "io_uring" or "threads": a label of metrics.
  virtual std::string_view kind() const = 0;
};

enum class BlockIoKind { kAuto, kUring, kThreads };

struct BlockIoConfig {
  /// kAuto: io_uring, or threads where the kernel or its seccomp filter forbids it.
  BlockIoKind kind = BlockIoKind::kAuto;
  /// Requests in flight at once; the others wait in the order of their coming. Of 1 MiB for large objects: 16 of them
  /// reach the full rate of the disks measured, and more only make each wait for longer.
  std::uint32_t read_depth = 16;
  /// Few, since a read may find them in front of it on the device, which takes writes into its cache anyway.
  std::uint32_t write_depth = 8;
  /// Memory that is read into and written from: registered with the kernel, which then need not pin its pages for each
  /// request. Outlives the BlockIo. All of its pages are brought in and pinned by opening, so that memory which is to
  /// be filled little by little does not belong here. Without effect where the limit of locked memory forbids it.
  std::vector<std::span<std::byte>> memory;
  Status validate() const;
};

struct OpenedBlockIo {
  std::unique_ptr<BlockIo> io;
  std::string why;  ///< one sentence when it is not io_uring although it could have been
};

/// files: open descriptors that outlive the BlockIo; a file's number is its place. Throws std::invalid_argument for a
/// configuration that is not valid and std::runtime_error when kUring is asked for and forbidden.
OpenedBlockIo open_block_io(const std::vector<int>& files, const BlockIoConfig& config);

/// kUnavailable, with the reason, when the kernel forbids io_uring or lacks a part of it.
Result<std::unique_ptr<BlockIo>> make_uring_block_io(const std::vector<int>& files, const BlockIoConfig& config);
std::unique_ptr<BlockIo> make_thread_block_io(const std::vector<int>& files, const BlockIoConfig& config);

/// The whole range, in as many requests as it takes: kInternal on an error of the medium or when it ends early,
/// kExpired when it was cancelled. The functions run on a thread of the medium.
void read_fully(BlockIo& io, std::uint32_t file, std::uint64_t offset, std::span<std::byte> into,
                const std::stop_token& cancel, std::function<void(Status)> done);
void write_fully(BlockIo& io, std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from, bool through,
                 std::function<void(Status)> done);
void sync_fully(BlockIo& io, std::uint32_t file, std::function<void(Status)> done);

}  // namespace kvern
