#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/observation.h"

namespace kvern::evict {

/// How much a token matters, [KV head][token]. Higher is better; NaN is worst (see selection.h).
struct TokenScores {
  std::uint32_t heads = 0;
  std::uint32_t tokens = 0;
  std::vector<float> values;

  std::span<const float> of(std::size_t head) const { return std::span(values).subspan(head * tokens, tokens); }
  std::span<float> of(std::size_t head) { return std::span(values).subspan(head * tokens, tokens); }
};

/// Smoothing along the tokens, so that neighbours of an important token stay with it.
struct Pooling {
  enum class Kind { kNone, kAverage, kMaximum };
  Kind kind = Kind::kAverage;
  /// Odd, in tokens. Average: sum over the width / width, terms beyond the ends are 0. Maximum: over those inside.
  std::uint32_t width = 5;

  /// kInvalid unless width is odd and at most kMaxWidth.
  Status validate() const;
  static constexpr std::uint32_t kMaxWidth = 255;
};

/// CAKE's weight of the variance in a token's score (arXiv 2503.12491, the published default).
constexpr float kCakeGamma = 200;

/// CAKE: mean over the query heads of a KV head of pooled (mean_i A + gamma * var_i A). Needs `dispersion` unless gamma
/// is 0. kInvalid when the observation's heads are no multiple of kv_heads, or pooling is not valid.
Result<TokenScores> cake_scores(const Observation& observation, std::uint32_t kv_heads, float gamma,
                                const Pooling& pooling, Executor* executor);

/// SnapKV (arXiv 2404.14469): the same of mean_i A alone.
Result<TokenScores> snapkv_scores(const Observation& observation, std::uint32_t kv_heads, const Pooling& pooling,
                                  Executor* executor);

/// One layer's claim on the token budget, P = H^(1/tau1) * V^(1/tau2) (CAKE, equation of the preference score). Both
/// temperatures are positive. Taus published for other models did worse than (1, 1) where measured.
struct Preference {
  double tau1 = 1;
  double tau2 = 1;
  double of(double dispersion, double shift) const;
};

}  // namespace kvern::evict
