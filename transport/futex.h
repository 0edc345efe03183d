#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace kvern {

/// Sleeping on a word of memory that processes share (hence never the PRIVATE operations).

/// Returns when the word no longer holds expected, after a wake-up, a signal or the time-out: the caller looks again.
inline void futex_wait(const std::atomic<std::uint32_t>& word, std::uint32_t expected,
                       std::chrono::nanoseconds timeout) {
  if (timeout.count() <= 0) return;
  constexpr std::int64_t kNanosecondsPerSecond = 1'000'000'000;
  const timespec relative{.tv_sec = timeout.count() / kNanosecondsPerSecond,
                          .tv_nsec = timeout.count() % kNanosecondsPerSecond};
  ::syscall(SYS_futex, &word, FUTEX_WAIT, expected, &relative, nullptr, 0);
}

inline void futex_wake_all(std::atomic<std::uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace kvern
