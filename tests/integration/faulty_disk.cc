// Preloaded into a daemon: the file named by KVERN_FAULTY_FILE fails as the file named by KVERN_FAULTY_DISK says at the
// moment of each call: good, read_eio, read_short, read_flipped, write_eio, write_enospc.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <string>

namespace {

std::string mode_for(int fd) {
  const char* const file = ::getenv("KVERN_FAULTY_FILE");
  const char* const control = ::getenv("KVERN_FAULTY_DISK");
  struct stat mine {};
  struct stat faulty {};
  if (file == nullptr || control == nullptr || ::fstat(fd, &mine) != 0 || ::stat(file, &faulty) != 0) return "good";
  if (mine.st_dev != faulty.st_dev || mine.st_ino != faulty.st_ino) return "good";
  const int opened = ::open(control, O_RDONLY | O_CLOEXEC);
  char text[32];
  const ssize_t bytes = opened < 0 ? 0 : ::read(opened, text, sizeof text);
  if (opened >= 0) ::close(opened);
  return {text, static_cast<std::size_t>(bytes > 0 ? bytes : 0)};
}

ssize_t failed(int error) {
  errno = error;
  return -1;
}

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

ssize_t faulty_read(int fd, void* into, std::size_t bytes, off_t offset) {
  static const auto real = next<ssize_t(int, void*, std::size_t, off_t)>("pread");
  const std::string mode = mode_for(fd);
  if (mode == "read_eio") return failed(EIO);
  // The medium stops after a block, and there is no more behind it.
  if (mode == "read_short") return offset % 8192 == 0 ? real(fd, into, bytes < 4096 ? bytes : 4096, offset) : 0;
  const ssize_t read = real(fd, into, bytes, offset);
  if (mode == "read_flipped" && read > 0) static_cast<unsigned char*>(into)[read / 2] ^= 0x10;
  return read;
}

ssize_t faulty_write(int fd, const iovec* ranges, int count, off_t offset, int flags) {
  static const auto real = next<ssize_t(int, const iovec*, int, off_t, int)>("pwritev2");
  const std::string mode = mode_for(fd);
  if (mode == "write_eio") return failed(EIO);
  if (mode == "write_enospc") return failed(ENOSPC);
  return real(fd, ranges, count, offset, flags);
}

}  // namespace

extern "C" {
ssize_t pread(int fd, void* into, std::size_t bytes, off_t offset) { return faulty_read(fd, into, bytes, offset); }
ssize_t pread64(int fd, void* into, std::size_t bytes, off64_t offset) { return faulty_read(fd, into, bytes, offset); }
ssize_t pwritev2(int fd, const iovec* ranges, int count, off_t offset, int flags) {
  return faulty_write(fd, ranges, count, offset, flags);
}
ssize_t pwritev64v2(int fd, const iovec* ranges, int count, off64_t offset, int flags) {
  return faulty_write(fd, ranges, count, offset, flags);
}
}
