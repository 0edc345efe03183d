#include "service/slab_file.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <utility>

#include "service/log.h"
#include "store/container_map.h"

namespace kvern {
namespace {

// Some 20 ms of work, and with scattered memory, of which huge pages must be made, not more than the patience beside:
// a stop waits no longer.
constexpr std::uint64_t kPieceBytes = 64U << 20;
constexpr std::chrono::milliseconds kPatience{500};

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error("cannot make the slab " + path + ": " + what);
}

void check_room(const std::string& path, std::uint64_t bytes) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  struct statvfs about {};
  if (::statvfs(folder.c_str(), &about) != 0) fail(path, std::strerror(errno));
  const std::uint64_t free_bytes = std::uint64_t{about.f_bavail} * about.f_frsize;
  if (free_bytes >= bytes) return;
  fail(path, folder + " has " + std::to_string(free_bytes >> 20) + " MiB free, " + std::to_string(bytes >> 20) +
                 " MiB are needed: lower [store] dram_bytes, or enlarge it (mount -o remount,size=…; docker run "
                 "--shm-size; in Kubernetes the sizeLimit of an emptyDir of medium Memory mounted there)");
}

/// The file of an earlier run, if it is a plain file of ours that is not larger than asked for: to cut one that clients
/// may still have mapped would end them. bytes_there: what it takes up already.
UniqueFd open_kept(const std::string& path, std::uint64_t bytes, std::uint64_t* bytes_there) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  struct stat about {};
  if (!fd || ::fstat(fd.get(), &about) != 0 || !S_ISREG(about.st_mode) || about.st_uid != ::geteuid()) return {};
  if (static_cast<std::uint64_t>(about.st_size) > bytes) return {};
  *bytes_there = static_cast<std::uint64_t>(about.st_blocks) * 512;
  return fd;
}

SharedMemory make_file(const std::string& path, std::uint64_t bytes, bool keep) {
  std::uint64_t bytes_there = 0;
  UniqueFd fd = keep ? open_kept(path, bytes, &bytes_there) : UniqueFd();
  if (!fd && ::unlink(path.c_str()) != 0 && errno != ENOENT) fail(path, std::strerror(errno));
  check_room(path, bytes - std::min(bytes, bytes_there));
  if (!fd) fd = UniqueFd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) fail(path, std::strerror(errno));
  auto memory = ::ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0 ? SharedMemory::map(std::move(fd), bytes, true)
                                                                      : failure(Code::kInternal, std::strerror(errno));
  if (memory) return std::move(*memory);
  if (!keep) ::unlink(path.c_str());
  fail(path, memory.error().message());
}

std::string map_path(const std::string& slab_path) { return slab_path + ".map"; }

}  // namespace

SlabFile::SlabFile(const std::string& path, std::uint64_t bytes, bool keep)
    : path_(path),
      keep_(keep),
      memory_(make_file(path, bytes, keep)),
      map_(make_file(map_path(path), ContainerMap::bytes_for(bytes), keep)) {
  // The map and the first piece of the slab now, so that the first stores find room.
  Status first;
  if (const int error = map_.reserve(0, map_.bytes().size(), kPatience); error != 0) {
    first = Status(Code::kInternal, std::strerror(error));
  }
  if (first) first = reserve_piece();
  if (!first) {
    remove_files();
    fail(path, first.message());
  }
  reserver_ = std::thread([this] { reserve_rest(); });
}

SlabFile::~SlabFile() {
  stopping_.store(true);
  reserver_.join();
  remove_files();
}

void SlabFile::remove_files() const {
  if (keep_) return;
  ::unlink(path_.c_str());
  ::unlink(map_path(path_).c_str());
}

Status SlabFile::reserve_piece() {
  const std::uint64_t done = usable_bytes();
  const std::uint64_t piece = std::min<std::uint64_t>(kPieceBytes, memory_.bytes().size() - done);
  if (const int error = memory_.reserve(done, piece, kPatience); error != 0)
    return {Code::kInternal, std::strerror(error)};
  huge_page_bytes_.store(memory_.huge_page_bytes(), std::memory_order_relaxed);
  usable_bytes_.store(done + piece, std::memory_order_release);
  return Status::ok();
}

void SlabFile::reserve_rest() {
  ::pthread_setname_np(::pthread_self(), "kvern-reserve");
  while (usable_bytes() < memory_.bytes().size() && !stopping_.load()) {
    const Status reserved = reserve_piece();
    if (reserved) continue;
    log_error(
        "the DRAM tier stays smaller: somebody else has filled its file system; lower [store] dram_bytes or "
        "enlarge that, and restart",
        {{"bytes", usable_bytes()},
         {"wanted_bytes", memory_.bytes().size()},
         {"file", path_},
         {"why", reserved.message()}});
    stays_smaller_.store(true, std::memory_order_release);
    return;
  }
  log_info("the DRAM tier is reserved", {{"bytes", usable_bytes()}, {"in_huge_pages", huge_page_bytes()}});
}

}  // namespace kvern
