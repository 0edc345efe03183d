#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "base/status.h"

namespace kvern {

enum class BreakerState { kClosed, kOpen, kHalfOpen };
std::string_view breaker_state_name(BreakerState state);

struct BreakerConfig {
  /// Failures in a row that open it.
  std::uint32_t failures = 5;
  /// An operation that runs for longer than this counts as failed while it still runs.
  std::int64_t stall_ns = 2'000'000'000;
  /// How long it stays open at first; doubles with every probe that fails, up to the maximum.
  std::int64_t open_ns = 500'000'000;
  std::int64_t open_max_ns = 30'000'000'000;
  Status validate() const;
};

/// Cuts off what is broken, so that it costs its hits and nothing else: open, it lets nothing through; after a while it
/// is half open and lets one probe through, whose end closes or opens it again, as does a probe that takes as long as a
/// stall. Not thread-safe: the owner's lock is held. All times come from the owner.
class CircuitBreaker {
 public:
  /// Throws std::invalid_argument when the configuration is not valid.
  explicit CircuitBreaker(const BreakerConfig& config);

  /// Whether an operation may start now. oldest_start_ns: when the oldest one that somebody waits for began; now_ns
  /// when there is none. In half-open state a true answer is the probe.
  bool allow(std::int64_t now_ns, std::int64_t oldest_start_ns);
  // How an operation ended; a probe that said nothing makes way for the next one.
  void succeeded();
  void failed(std::int64_t now_ns);
  void undecided() { probe_start_ns_.reset(); }
  BreakerState state() const { return state_; }

 private:
  void open(std::int64_t now_ns);
  void reopen(std::int64_t now_ns);

  const BreakerConfig config_;
  BreakerState state_ = BreakerState::kClosed;
  std::uint32_t failures_in_a_row_ = 0;
  std::int64_t open_until_ns_ = 0;
  std::int64_t open_for_ns_;
  std::optional<std::int64_t> probe_start_ns_;
};

}  // namespace kvern
