#pragma once

#include <cstdint>
#include <string>

namespace kvern {

/// A preallocated file, or a block device, opened for direct I/O and locked against other processes.
class LogFile {
 public:
  /// Creates the file or grows it to bytes (a multiple of 4096); a larger one keeps its size. Throws
  /// std::runtime_error, with a sentence for the operator, when it cannot be opened, is locked by another process,
  /// holds something that is not a log, or has no room for bytes.
  ///
  /// lock_wait_ns: a process that was killed keeps its lock until the kernel has ended the requests that it had begun,
  /// which is also when its last bytes have arrived.
  LogFile(std::string path, std::uint64_t bytes, std::int64_t lock_wait_ns);
  ~LogFile();
  LogFile(LogFile&& other) noexcept;
  LogFile& operator=(LogFile&&) = delete;

  int fd() const { return fd_; }
  const std::string& path() const { return path_; }
  std::uint64_t bytes() const { return bytes_; }
  /// False where the file system has no direct I/O: bytes then pass through the page cache.
  bool direct() const { return direct_; }

 private:
  void open();
  void lock(std::int64_t lock_wait_ns);
  void refuse_foreign_content() const;
  void allocate();

  std::string path_;
  std::uint64_t bytes_;
  int fd_ = -1;
  bool direct_ = true;
};

}  // namespace kvern
