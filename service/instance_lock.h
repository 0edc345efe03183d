#pragma once

#include <string>

#include "base/status.h"
#include "transport/shared_memory.h"

namespace kvern {

/// A file that one daemon at a time holds. The kernel lets go of it when the process ends, however it ends. The file is
/// removed on destruction.
class InstanceLock {
 public:
  /// what: for the message, "the socket /run/kvern/kvernd.sock".
  static Result<InstanceLock> take(const std::string& path, const std::string& what);
  InstanceLock(InstanceLock&&) = default;
  InstanceLock& operator=(InstanceLock&&) = delete;
  ~InstanceLock();

 private:
  InstanceLock(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  std::string path_;
  UniqueFd fd_;
};

}  // namespace kvern
