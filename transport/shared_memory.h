#pragma once

#include <chrono>
#include <cstddef>
#include <span>
#include <string>

#include "base/status.h"

namespace kvern {

/// A file descriptor that closes itself. Move-only.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd();
  int get() const { return fd_; }
  int release();
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

/// A file in tmpfs (named, or an anonymous memfd) and its mapping in this process. Move-only; unmaps on destruction;
/// the creator of a named one also unlinks it.
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(SharedMemory&&) noexcept;
  SharedMemory& operator=(SharedMemory&&) noexcept;
  ~SharedMemory();

  /// A new named file of the size, mapped read-write, mode 0600. An old file of that name is unlinked first (its
  /// mappings elsewhere keep their bytes). Space is reserved (fallocate), so that a full tmpfs is an error here
  /// ("/dev/shm has 64 MiB free, 1 GiB are needed: …") and not a SIGBUS later.
  static Result<SharedMemory> create_named(const std::string& path, std::size_t bytes);
  /// An anonymous sealed memfd (F_SEAL_SHRINK|F_SEAL_GROW), mapped read-write.
  static Result<SharedMemory> create_anonymous(const std::string& name, std::size_t bytes);
  /// Maps a descriptor that somebody handed over. Checks that the file is at least that large, and (for memfd) sealed
  /// against shrinking or owned by the daemon. Takes the descriptor.
  static Result<SharedMemory> map(UniqueFd fd, std::size_t bytes, bool writable);

  /// Takes hold of the space of a part, which create_…() do for the whole: to write where nothing is reserved is SIGBUS
  /// when tmpfs is full. In huge pages where the kernel makes some (Linux 6.1 and later): the pages are there when they
  /// are first written, and a disk that reads into them gets a few long pieces instead of hundreds. What the part holds
  /// stays. Some 0.1 ms per MiB, and several times that where memory is scattered and the kernel moves pages around: no
  /// huge pages any more when they have taken so long. Returns 0 or an errno, ENOSPC above all.
  int reserve(std::size_t offset, std::size_t part_bytes, std::chrono::milliseconds patience);
  /// Of what this object has reserved.
  std::size_t huge_page_bytes() const { return huge_page_bytes_; }

  std::span<std::byte> bytes() const { return {data_, size_}; }
  int fd() const { return fd_.get(); }
  /// A second descriptor of the same file that only allows reading (reopened through /proc/self/fd): for handing out.
  Result<UniqueFd> read_only_fd() const;

 private:
  int resize_and_reserve(std::size_t bytes);

  UniqueFd fd_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t huge_page_bytes_ = 0;
  int huge_pages_failed_ = 0;  ///< one after the other
  std::string unlink_path_;
};

}  // namespace kvern
