#include "service/pulse.h"

#include <utility>

namespace kvern {
namespace {
constexpr std::int64_t kNsPerSecond = 1'000'000'000;
}

Pulse::Pulse(std::string thread, std::function<void()> prod, std::function<std::uint64_t()> turns,
             std::int64_t patience_ns)
    : thread_(std::move(thread)), prod_(std::move(prod)), turns_(std::move(turns)), patience_ns_(patience_ns) {}

std::string Pulse::trouble(std::int64_t now_ns) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t turns = turns_();
  if (!prodded_ || turns != turns_then_) {
    prodded_ = true;
    turns_then_ = turns;
    prodded_ns_ = now_ns;
  }
  prod_();
  const std::int64_t waited_ns = now_ns - prodded_ns_;
  if (waited_ns <= patience_ns_) return {};
  return "the " + thread_ + " thread has not turned for " + std::to_string(waited_ns / kNsPerSecond) + " s";
}

}  // namespace kvern
