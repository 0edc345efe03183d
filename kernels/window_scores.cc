#include "kernels/window_scores.h"

#include <algorithm>
#include <functional>
#include <string>

#include "base/parallel.h"

namespace kvern::evict {
namespace {

/// Windows per task.
constexpr std::uint32_t kTaskWindows = 64;

/// Mean of the `best` highest of the window, NaN where one is: added best first, so that the order is fixed.
float window_mean(std::span<const float> window, std::uint32_t best, std::vector<float>& sorted) {
  float sum = 0;
  if (best >= window.size()) {
    for (const float value : window) sum += value;
    return sum / static_cast<float>(window.size());
  }
  sorted.assign(window.begin(), window.end());
  std::partial_sort(sorted.begin(), sorted.begin() + best, sorted.end(),
                    [](float a, float b) { return score_rank(a) > score_rank(b); });
  for (std::uint32_t i = 0; i < best; ++i) sum += sorted[i];
  return sum / static_cast<float>(best);
}

/// factor: of the values, to make them t.
std::vector<float> scores_of(std::span<const float> values, std::uint32_t heads, float factor, const WindowRule& rule,
                             Executor* executor) {
  const auto columns = static_cast<std::uint32_t>(heads == 0 ? 0 : values.size() / heads);
  const std::uint32_t windows = rule.count(columns);
  std::vector<float> scores(windows);
  parallel_for(executor, (windows + kTaskWindows - 1) / kTaskWindows, [&](std::size_t task) {
    std::vector<float> sorted;
    const auto first = static_cast<std::uint32_t>(task) * kTaskWindows;
    for (std::uint32_t window = first; window < std::min(windows, first + kTaskWindows); ++window) {
      const std::uint32_t begin = window * rule.tokens;
      const std::uint32_t size = std::min(rule.tokens, columns - begin);
      double sum = 0;
      for (std::size_t head = 0; head < heads; ++head) {
        sum += static_cast<double>(window_mean(values.subspan(head * columns + begin, size), rule.best, sorted));
      }
      scores[window] = static_cast<float>(sum / heads) * factor;
    }
  });
  return scores;
}

}  // namespace

Status WindowRule::validate() const {
  if (tokens > 0 && best > 0) return Status::ok();
  return {Code::kInvalid, "window rule: tokens and best must be at least 1"};
}

Result<std::vector<float>> window_scores(const Observation& observation, const WindowRule& rule, Executor* executor) {
  if (Status status = rule.validate(); !status) return failure(std::move(status));
  return scores_of(observation.mean, observation.query_heads, static_cast<float>(observation.rows), rule, executor);
}

Result<std::vector<float>> window_scores(std::span<const float> sums, std::uint32_t heads, const WindowRule& rule,
                                         Executor* executor) {
  if (Status status = rule.validate(); !status) return failure(std::move(status));
  if (heads == 0 || sums.size() % heads != 0) {
    return failure(Code::kInvalid, "window scores: " + std::to_string(sums.size()) + " sums do not divide by " +
                                       std::to_string(heads) + " heads");
  }
  return scores_of(sums, heads, 1, rule, executor);
}

std::vector<std::uint32_t> select_windows(std::span<const float> scores, const WindowRule& rule, std::uint32_t columns,
                                          std::uint32_t budget) {
  if (columns <= budget) return best_of(scores, scores.size());
  const std::uint32_t dropped = rule.count(columns - budget);
  if (std::uint64_t{dropped} * rule.tokens >= columns) return {};
  return best_of(scores, scores.size() - std::min<std::size_t>(dropped, scores.size()));
}

Selection window_tokens(std::span<const std::uint32_t> windows, const WindowRule& rule, std::uint32_t columns,
                        std::uint32_t tail, std::uint32_t kv_heads) {
  std::vector<std::uint32_t> tokens;
  for (const std::uint32_t window : windows) {
    const std::uint32_t begin = window * rule.tokens;
    for (std::uint32_t token = begin; token < std::min(columns, begin + rule.tokens); ++token) tokens.push_back(token);
  }
  for (std::uint32_t i = 0; i < tail; ++i) tokens.push_back(columns + i);
  Selection selection;
  for (std::uint32_t head = 0; head < kv_heads; ++head) {
    selection.tokens.insert(selection.tokens.end(), tokens.begin(), tokens.end());
    selection.offsets.push_back(static_cast<std::uint32_t>(selection.tokens.size()));
  }
  return selection;
}

}  // namespace kvern::evict
