#pragma once

#include <algorithm>
#include <cstdint>

#include "base/clock.h"

namespace kvern {

/// The cheap part of a wait, before sleeping: looking again and again for up to spin_us. Where cores are scarce the
/// other side cannot run while this one spins; so after a spin in vain the next wait sleeps at once, after another in
/// vain the next two, then four and so on, and after one that paid none. It never yields the core: schedulers let a
/// thread that yields wait for whole time slices, and one that sleeps for a moment.
///
///   begin(); while (!there) if (!once()) sleep();
class SpinWait {
 public:
  explicit SpinWait(std::uint32_t spin_us) : limit_ns_(std::int64_t{spin_us} * 1000) {}

  /// What was waited for before is there; the next wait starts.
  void begin() {
    if (limit_ns_ == 0) return;
    if (spinning_) skips_ = 0;
    spinning_ = skipped_ >= skips_;
    if (spinning_) {
      skipped_ = 0;
      started_ns_ = Clock::system().now_ns();
    } else {
      ++skipped_;
    }
  }
  /// Waits a moment. False when the caller should sleep.
  bool once() {
    if (!spinning_) return false;
    for (int i = 0; i < kPauses; ++i) pause();
    if (Clock::system().now_ns() - started_ns_ < limit_ns_) return true;
    spinning_ = false;
    skips_ = std::clamp(skips_ * 2, 1U, kMaxSkips);
    return false;
  }

 private:
  // Between two looks at the clock: well below a microsecond, and the core's other thread gets its turn.
  static constexpr int kPauses = 8;
  // Keeps spinning in vain below a microsecond per wait, and comes back to it within a millisecond of brisk traffic.
  static constexpr std::uint32_t kMaxSkips = 64;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
  }

  std::int64_t limit_ns_;
  std::int64_t started_ns_ = 0;
  std::uint32_t skips_ = 0;    // waits that go without spinning after one in vain
  std::uint32_t skipped_ = 0;  // of them, so far
  bool spinning_ = false;
};

}  // namespace kvern
