#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace kvern {

/// How many bytes a tier has accepted and not yet written or given up. Thread-safe.
class WriteBudget {
 public:
  explicit WriteBudget(std::uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  /// False: no room. One object larger than the limit is taken where nothing else is.
  bool take(std::uint64_t bytes) {
    std::lock_guard lock(mutex_);
    if (taken_bytes_ > 0 && (taken_bytes_ >= limit_bytes_ || bytes > limit_bytes_ - taken_bytes_)) return false;
    taken_bytes_ += bytes;
    return true;
  }
  void give_back(std::uint64_t bytes) {
    std::lock_guard lock(mutex_);
    taken_bytes_ -= bytes;
    if (taken_bytes_ == 0) empty_.notify_all();
  }
  std::uint64_t taken_bytes() const {
    std::lock_guard lock(mutex_);
    return taken_bytes_;
  }
  /// False: it took longer than that.
  bool wait_empty(std::int64_t timeout_ns) {
    std::unique_lock lock(mutex_);
    return empty_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return taken_bytes_ == 0; });
  }

 private:
  const std::uint64_t limit_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable empty_;
  std::uint64_t taken_bytes_ = 0;
};

}  // namespace kvern
