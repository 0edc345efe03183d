#include "store/log_file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "store/block_io.h"
#include "store/region_format.h"

namespace kvern {
namespace {

constexpr std::chrono::milliseconds kLockInterval{10};  ///< flock has no wait with a deadline

[[noreturn]] void refuse(const std::string& path, const std::string& sentence) {
  throw std::runtime_error(path + " cannot be used as an NVMe log: " + sentence);
}

// Also fills holes, so that the room is there for good. Returns errno, or 0.
int fallocate_all(int fd, std::uint64_t bytes) {
  while (::fallocate(fd, 0, 0, static_cast<off_t>(bytes)) != 0) {
    if (errno != EINTR) return errno;
  }
  return 0;
}

std::string error_text() { return std::system_category().message(errno); }

}  // namespace

LogFile::LogFile(std::string path, std::uint64_t bytes, std::int64_t lock_wait_ns)
    : path_(std::move(path)), bytes_(bytes) {
  open();
  try {
    lock(lock_wait_ns);
    refuse_foreign_content();
    allocate();
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

LogFile::LogFile(LogFile&& other) noexcept
    : path_(std::move(other.path_)), bytes_(other.bytes_), fd_(std::exchange(other.fd_, -1)), direct_(other.direct_) {}

LogFile::~LogFile() {
  if (fd_ >= 0) ::close(fd_);
}

void LogFile::open() {
  constexpr int kFlags = O_RDWR | O_CREAT | O_CLOEXEC;
  fd_ = ::open(path_.c_str(), kFlags | O_DIRECT, 0600);
  if (fd_ < 0 && errno == EINVAL) {
    direct_ = false;
    fd_ = ::open(path_.c_str(), kFlags, 0600);
  }
  if (fd_ < 0) refuse(path_, error_text());
}

void LogFile::lock(std::int64_t lock_wait_ns) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::nanoseconds(lock_wait_ns);
  while (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) refuse(path_, error_text());
    if (std::chrono::steady_clock::now() >= deadline) refuse(path_, "another process uses it");
    std::this_thread::sleep_for(kLockInterval);
  }
}

void LogFile::refuse_foreign_content() const {
  alignas(kBlockAlignment) std::byte head[2 * kBlockAlignment];
  const ssize_t bytes = ::pread(fd_, head, sizeof head, 0);
  if (bytes < 0) refuse(path_, error_text());
  const std::span<const std::byte> content(head, static_cast<std::size_t>(bytes));
  const bool blank = std::ranges::all_of(content, [](std::byte byte) { return byte == std::byte{0}; });
  if (blank || looks_like_log(content)) return;
  refuse(path_, "it holds something else. Name another path, or remove what is there");
}

void LogFile::allocate() {
  struct stat about {};
  if (::fstat(fd_, &about) != 0) refuse(path_, error_text());
  if (S_ISBLK(about.st_mode)) {
    std::uint64_t size = 0;
    if (::ioctl(fd_, BLKGETSIZE64, &size) != 0) refuse(path_, error_text());
    if (size < bytes_) {
      refuse(path_, "the device has " + std::to_string(size) + " bytes, " + std::to_string(bytes_) + " are configured");
    }
    return;
  }
  if (!S_ISREG(about.st_mode)) refuse(path_, "it is neither a file nor a block device");
  // Asked first, since an attempt would take from all others what is left until it fails.
  struct statvfs room {};
  if (::fstatvfs(fd_, &room) != 0) refuse(path_, error_text());
  const std::uint64_t has = static_cast<std::uint64_t>(about.st_blocks) * 512;
  const bool fits = bytes_ <= has || bytes_ - has <= std::uint64_t{room.f_bavail} * room.f_frsize;
  const int error = fits ? fallocate_all(fd_, bytes_) : ENOSPC;
  if (error == 0) return;
  if (about.st_size == 0) {
    ::unlink(path_.c_str());  // was made here, and holds nothing
  } else if (::ftruncate(fd_, about.st_size) != 0) {
    refuse(path_, error_text());
  }
  switch (error) {
    case ENOSPC:
      refuse(path_,
             "its file system has no room for " + std::to_string(bytes_) + " bytes. Configure fewer, or make room");
    case EOPNOTSUPP:
      refuse(path_, "its file system cannot preallocate");
    default:
      refuse(path_, std::system_category().message(error));
  }
}

}  // namespace kvern
