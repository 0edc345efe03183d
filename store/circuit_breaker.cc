#include "store/circuit_breaker.h"

#include <algorithm>
#include <stdexcept>

namespace kvern {

std::string_view breaker_state_name(BreakerState state) {
  switch (state) {
    case BreakerState::kClosed:
      return "closed";
    case BreakerState::kOpen:
      return "open";
    case BreakerState::kHalfOpen:
      return "half_open";
  }
  return "unknown";
}

Status BreakerConfig::validate() const {
  if (failures == 0) return {Code::kInvalid, "failures must be at least 1"};
  if (stall_ns <= 0 || open_ns <= 0) return {Code::kInvalid, "stall_ns and open_ns must be above 0"};
  if (open_max_ns < open_ns) return {Code::kInvalid, "open_max_ns must not be below open_ns"};
  return Status::ok();
}

CircuitBreaker::CircuitBreaker(const BreakerConfig& config) : config_(config), open_for_ns_(config.open_ns) {
  if (const auto status = config.validate(); !status) throw std::invalid_argument("breaker: " + status.message());
}

bool CircuitBreaker::allow(std::int64_t now_ns, std::int64_t oldest_start_ns) {
  const bool stalled = now_ns - oldest_start_ns >= config_.stall_ns;
  switch (state_) {
    case BreakerState::kClosed:
      if (stalled) open(now_ns);
      return !stalled;
    case BreakerState::kOpen:
      if (now_ns < open_until_ns_ || stalled) return false;
      state_ = BreakerState::kHalfOpen;
      break;
    case BreakerState::kHalfOpen:
      // The probe may be a write that lies in a queue, which nobody waits for: only its own time tells.
      if (stalled || (probe_start_ns_ && now_ns - *probe_start_ns_ >= config_.stall_ns)) reopen(now_ns);
      if (state_ == BreakerState::kOpen || probe_start_ns_) return false;
      break;
  }
  probe_start_ns_ = now_ns;
  return true;
}

void CircuitBreaker::succeeded() {
  failures_in_a_row_ = 0;
  // Late good news of operations that began before it opened do not close it: the probe does.
  if (state_ != BreakerState::kHalfOpen) return;
  state_ = BreakerState::kClosed;
  probe_start_ns_.reset();
  open_for_ns_ = config_.open_ns;
}

void CircuitBreaker::failed(std::int64_t now_ns) {
  ++failures_in_a_row_;
  if (state_ == BreakerState::kHalfOpen) {
    reopen(now_ns);
  } else if (state_ == BreakerState::kClosed && failures_in_a_row_ >= config_.failures) {
    open(now_ns);
  }
}

void CircuitBreaker::open(std::int64_t now_ns) {
  state_ = BreakerState::kOpen;
  open_until_ns_ = now_ns + open_for_ns_;
  probe_start_ns_.reset();
}

void CircuitBreaker::reopen(std::int64_t now_ns) {
  open_for_ns_ = std::min(open_for_ns_ * 2, config_.open_max_ns);
  open(now_ns);
}

}  // namespace kvern
