#pragma once

#include <time.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

/// What the benchmarks of kernels have in common: steps take turns, so that noise of the machine meets all of them, and
/// medians over rounds are printed, beside memcpy of the same rounds.
namespace kvern::bench {

/// Time that this thread ran: what others do on the machine's cores does not count.
constexpr clockid_t kThreadTime = CLOCK_THREAD_CPUTIME_ID;
/// For steps that run on several threads.
constexpr clockid_t kWallTime = CLOCK_MONOTONIC;

struct Step {
  std::string name;
  std::size_t bytes;  ///< raw bytes that a run stands for
  std::function<void()> run;
  std::vector<double> seconds = {};  ///< of each round
};

inline double now(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

inline void check(const Status& status) {
  if (!status) throw std::runtime_error(status.to_string());
}

template <typename T>
T value_of(Result<T> result) {
  if (!result) throw std::runtime_error(result.error().to_string());
  return std::move(*result);
}

/// A run over all chunks of a working set that no cache holds.
inline std::function<void()> over_chunks(std::size_t chunks, std::function<void(std::size_t)> run) {
  return [chunks, run = std::move(run)] {
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) run(chunk);
  };
}

/// Runs all steps in each round; the first round warms up and is not counted.
inline void take_turns(std::span<Step> steps, int rounds, clockid_t clock) {
  for (int round = 0; round <= rounds; ++round) {
    for (Step& step : steps) {
      const double start = now(clock);
      step.run();
      if (round > 0) step.seconds.push_back(now(clock) - start);
    }
  }
}

inline double gb_per_s(const Step& step) { return static_cast<double>(step.bytes) / median(step.seconds) / 1e9; }

/// How many times faster than the other one, by bytes, in the same rounds.
inline double over(const Step& step, const Step& other) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < step.seconds.size(); ++i) {
    ratios.push_back(static_cast<double>(step.bytes) / static_cast<double>(other.bytes) * other.seconds[i] /
                     step.seconds[i]);
  }
  return median(ratios);
}

/// "kernels.<step>.gb_per_s <value>" and ".over_memcpy".
inline void print_rates(const Step& step, const Step& memcpy_step, std::string_view prefix = "kernels") {
  const std::string name = std::string(prefix) + "." + step.name;
  std::printf("%s.gb_per_s %.3f\n", name.c_str(), gb_per_s(step));
  std::printf("%s.over_memcpy %.3f\n", name.c_str(), over(step, memcpy_step));
}

/// "kernels.<step>.ms <value>": of a step whose run is one layer, as torch's steps are. copies: runs in the step.
inline void print_ms(const Step& step, std::size_t copies = 1) {
  std::printf("kernels.%s.ms %.4f\n", step.name.c_str(), median(step.seconds) / static_cast<double>(copies) * 1e3);
}

}  // namespace kvern::bench
