#include "transport/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <system_error>
#include <utility>

namespace kvern {
namespace {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
constexpr std::size_t kPageBytes = 4096;
/// So many failures in a row and no more is tried: memory is too scattered, and each failure takes some milliseconds.
constexpr int kMostHugePageFailures = 8;
/// For memory that is reserved as a whole: somebody waits for a session.
constexpr std::chrono::milliseconds kHugePagePatience{100};
constexpr int kMadvCollapse = 25;  ///< MADV_COLLAPSE, which the C library of Debian 12 does not know

std::string error_text(int error) { return std::system_category().message(error); }

Status system_failure(const std::string& what, int error) {
  return Status(Code::kInternal, what + ": " + error_text(error));
}

std::string human_bytes(std::uint64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(),
                value == static_cast<double>(static_cast<std::uint64_t>(value)) ? "%.0f %s" : "%.1f %s", value,
                kUnits[unit]);
  return text.data();
}

int allocate(int fd, std::size_t offset, std::size_t bytes) {
  int result = 0;
  do {
    result = ::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  } while (result == EINTR);
  return result;
}

Status no_room_in(const std::string& directory, std::size_t bytes) {
  struct statvfs info {};
  std::string has = "has too little space";
  if (::statvfs(directory.c_str(), &info) == 0) {
    has = "has " + human_bytes(std::uint64_t{info.f_bavail} * info.f_frsize) + " free";
  }
  return Status(Code::kRefused,
                directory + " " + has + ", " + human_bytes(bytes) +
                    " are needed: configure less, or enlarge it (mount -o remount,size=…; docker run --shm-size; in "
                    "Kubernetes the sizeLimit of an emptyDir of medium Memory mounted there)");
}

/// Address space for a mapping that begins where a huge page may; nullptr and errno when there is none.
std::byte* aligned_space(std::size_t bytes) {
  const std::size_t wide = bytes + kHugePageBytes;
  void* found = ::mmap(nullptr, wide, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(found);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(begin) % kHugePageBytes;
  const std::size_t before = past == 0 ? 0 : kHugePageBytes - past;
  const std::size_t kept = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  if (before > 0) ::munmap(begin, before);
  if (before + kept < wide) ::munmap(begin + before + kept, wide - before - kept);
  return begin + before;
}

/// nullptr and errno when it fails.
std::byte* map_file(int fd, std::size_t bytes, bool writable) {
  std::byte* space = aligned_space(bytes);
  if (space == nullptr) return nullptr;
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  void* address = ::mmap(space, bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0);
  if (address == MAP_FAILED) {
    const int error = errno;
    ::munmap(space, bytes);
    errno = error;
    return nullptr;
  }
  // Wishes only: kernels without huge pages in tmpfs say no, and a core file of the daemon need not hold the cache.
  ::madvise(address, bytes, MADV_HUGEPAGE);
  ::madvise(address, bytes, MADV_DONTDUMP);
  return static_cast<std::byte*>(address);
}

bool valid_size(std::size_t bytes) {
  return bytes > 0 && bytes <= static_cast<std::size_t>(std::numeric_limits<off_t>::max());
}

}  // namespace

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

UniqueFd::~UniqueFd() {
  if (fd_ >= 0) ::close(fd_);
}

int UniqueFd::release() { return std::exchange(fd_, -1); }

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      huge_page_bytes_(other.huge_page_bytes_),
      huge_pages_failed_(other.huge_pages_failed_),
      unlink_path_(std::exchange(other.unlink_path_, {})) {}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  if (this != &other) {
    SharedMemory old(std::move(*this));
    fd_ = std::move(other.fd_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    huge_page_bytes_ = other.huge_page_bytes_;
    huge_pages_failed_ = other.huge_pages_failed_;
    unlink_path_ = std::exchange(other.unlink_path_, {});
  }
  return *this;
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) ::munmap(data_, size_);
  if (unlink_path_.empty()) return;
  // Somebody may have created a file of that name since: only the own one is removed.
  struct stat mine {};
  struct stat named {};
  if (::fstat(fd_.get(), &mine) == 0 && ::lstat(unlink_path_.c_str(), &named) == 0 && mine.st_dev == named.st_dev &&
      mine.st_ino == named.st_ino) {
    ::unlink(unlink_path_.c_str());
  }
}

Result<SharedMemory> SharedMemory::create_named(const std::string& path, std::size_t bytes) {
  if (!valid_size(bytes)) return failure(Code::kInvalid, path + ": a size of " + std::to_string(bytes) + " bytes");
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) return failure(system_failure("cannot remove " + path, errno));
  SharedMemory memory;
  memory.fd_ = UniqueFd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!memory.fd_) return failure(system_failure("cannot create " + path, errno));
  memory.unlink_path_ = path;
  const int error = memory.resize_and_reserve(bytes);
  if (error == ENOSPC) return failure(no_room_in(std::filesystem::path(path).parent_path().string(), bytes));
  if (error != 0) return failure(system_failure("cannot reserve " + human_bytes(bytes) + " for " + path, error));
  return memory;
}

Result<SharedMemory> SharedMemory::create_anonymous(const std::string& name, std::size_t bytes) {
  if (!valid_size(bytes)) return failure(Code::kInvalid, name + ": a size of " + std::to_string(bytes) + " bytes");
  SharedMemory memory;
  memory.fd_ = UniqueFd(::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.fd_) return failure(system_failure("cannot create the memory file " + name, errno));
  if (const int error = memory.resize_and_reserve(bytes); error != 0) {
    return failure(Code::kRefused, "cannot reserve " + human_bytes(bytes) + " for " + name + " (" + error_text(error) +
                                       "): configure less or raise the memory limit of the container");
  }
  // Whoever gets a descriptor can neither pull the memory away under us nor reopen it with more rights (a memfd is born
  // with mode 0777).
  if (::fcntl(memory.fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 ||
      ::fchmod(memory.fd_.get(), 0600) != 0) {
    return failure(system_failure("cannot seal the memory file " + name, errno));
  }
  return memory;
}

Result<SharedMemory> SharedMemory::map(UniqueFd fd, std::size_t bytes, bool writable) {
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return failure(system_failure("cannot look at the descriptor", errno));
  if (!valid_size(bytes) || !S_ISREG(info.st_mode) || static_cast<std::uint64_t>(info.st_size) < bytes) {
    return failure(Code::kInvalid, "the descriptor is no memory file of at least " + std::to_string(bytes) + " bytes");
  }
  // A file that others could shrink would kill us with SIGBUS.
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  const bool sealed = seals >= 0 && (seals & F_SEAL_SHRINK) != 0;
  if (!sealed && (info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return failure(Code::kRefused,
                   "the memory file is neither sealed against shrinking nor writable by its owner alone");
  }
  SharedMemory memory;
  memory.data_ = map_file(fd.get(), bytes, writable);
  if (memory.data_ == nullptr) return failure(system_failure("cannot map the memory file", errno));
  memory.size_ = bytes;
  memory.fd_ = std::move(fd);
  // A session belongs to one process: a forked child that outlives it must not write to what the daemon hands out anew.
  ::madvise(memory.data_, bytes, MADV_DONTFORK);
  return memory;
}

int SharedMemory::resize_and_reserve(std::size_t bytes) {
  if (::ftruncate(fd_.get(), static_cast<off_t>(bytes)) != 0) return errno;
  data_ = map_file(fd_.get(), bytes, true);
  if (data_ == nullptr) return errno == ENOMEM ? ENOSPC : errno;
  size_ = bytes;
  return reserve(0, bytes, kHugePagePatience);
}

int SharedMemory::reserve(std::size_t offset, std::size_t part_bytes, std::chrono::milliseconds patience) {
  const std::size_t end = offset + part_bytes;
  std::size_t at = (offset + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const auto until = std::chrono::steady_clock::now() + patience;
  for (; at + kHugePageBytes <= end && huge_pages_failed_ < kMostHugePageFailures; at += kHugePageBytes) {
    if (std::chrono::steady_clock::now() >= until) break;
    // A huge page takes the place of the pages that are there, and there must be one. To
    // put it in the place of all 512 would cost several times as much.
    if (const int error = allocate(fd_.get(), at, kPageBytes); error != 0) return error;
    if (::madvise(data_ + at, kHugePageBytes, kMadvCollapse) == 0) {
      huge_page_bytes_ += kHugePageBytes;
      huge_pages_failed_ = 0;
    } else {
      ++huge_pages_failed_;
    }
  }
  return allocate(fd_.get(), offset, part_bytes);
}

Result<UniqueFd> SharedMemory::read_only_fd() const {
  const std::string path = "/proc/self/fd/" + std::to_string(fd_.get());
  UniqueFd reopened(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!reopened) return failure(system_failure("cannot reopen " + path + " for reading (is /proc mounted?)", errno));
  return reopened;
}

}  // namespace kvern
