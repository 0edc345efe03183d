#pragma once

#include <sched.h>

#include <cstdint>

#include "base/clock.h"

namespace kvern {

/// The cheap part of a wait, before sleeping: some pauses for answers that are nearly there, then yields, so that on a
/// machine with few cores the other side gets to run.
class SpinWait {
 public:
  explicit SpinWait(std::uint32_t spin_us) : spin_ns_(std::int64_t{spin_us} * 1000) { restart(); }
  void restart() {
    started_ns_ = spin_ns_ > 0 ? Clock::system().now_ns() : 0;
    pauses_left_ = kPauses;
  }
  /// Waits a moment. False when the time is up and the caller should sleep.
  bool once() {
    if (spin_ns_ == 0) return false;
    if (pauses_left_ > 0) {
      --pauses_left_;
      pause();
      return true;
    }
    if (Clock::system().now_ns() - started_ns_ >= spin_ns_) return false;
    ::sched_yield();
    return true;
  }

 private:
  // Some 5 to 10 us: a round trip over two free cores takes less, and a core that is shared is not held for longer.
  static constexpr std::uint32_t kPauses = 128;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
  }

  std::int64_t spin_ns_;
  std::int64_t started_ns_ = 0;
  std::uint32_t pauses_left_ = 0;
};

}  // namespace kvern
