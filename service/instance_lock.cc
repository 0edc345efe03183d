#include "service/instance_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace kvern {
namespace {

// The holder removes the file before it lets go. Who opened the old file then holds nothing, and opens the new one.
constexpr int kAttempts = 100;

bool is_file_of(int fd, const std::string& path) {
  struct stat held {};
  struct stat named {};
  return ::fstat(fd, &held) == 0 && ::stat(path.c_str(), &named) == 0 && held.st_ino == named.st_ino &&
         held.st_dev == named.st_dev;
}

}  // namespace

Result<InstanceLock> InstanceLock::take(const std::string& path, const std::string& what) {
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd) return failure(Code::kInternal, "cannot open " + path + ": " + std::strerror(errno));
    if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK) return failure(Code::kInternal, "cannot lock " + path + ": " + std::strerror(errno));
      return failure(Code::kRefused,
                     "another kvernd has " + what + ": stop it, or give this one a [server] socket of its own");
    }
    if (is_file_of(fd.get(), path)) return InstanceLock(path, std::move(fd));
  }
  return failure(Code::kBusy, path + " is taken and given up all the time by other daemons");
}

InstanceLock::~InstanceLock() {
  if (fd_ && is_file_of(fd_.get(), path_)) ::unlink(path_.c_str());
}

}  // namespace kvern
