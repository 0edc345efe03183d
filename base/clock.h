#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace kvern {

/// Monotonic time in nanoseconds. The only source of time in the project, so that tests can step it.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual std::int64_t now_ns() const = 0;

  /// CLOCK_MONOTONIC: comparable between processes of one host, unmoved by changes of the wall clock.
  static const Clock& system();
};

/// Moves only when told. Thread-safe.
class ManualClock final : public Clock {
 public:
  std::int64_t now_ns() const override { return now_ns_.load(); }
  void advance(std::chrono::nanoseconds by) { now_ns_.fetch_add(by.count()); }

 private:
  std::atomic<std::int64_t> now_ns_{1};
};

}  // namespace kvern
