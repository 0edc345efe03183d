#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

namespace kvern {

/// Whether a thread still turns, for who asks from time to time. Thread-safe.
class Pulse {
 public:
  /// thread: for people. prod: makes the thread turn once, if it can. turns: how often it has turned. Both are called
  /// from trouble(). patience_ns: how long it may take.
  Pulse(std::string thread, std::function<void()> prod, std::function<std::uint64_t()> turns, std::int64_t patience_ns);

  /// Empty, or what is wrong: it has not turned for longer than that after it was prodded.
  std::string trouble(std::int64_t now_ns);

 private:
  const std::string thread_;
  const std::function<void()> prod_;
  const std::function<std::uint64_t()> turns_;
  const std::int64_t patience_ns_;
  std::mutex mutex_;
  bool prodded_ = false;
  std::int64_t prodded_ns_ = 0;  ///< the first time since it turned last
  std::uint64_t turns_then_ = 0;
};

}  // namespace kvern
