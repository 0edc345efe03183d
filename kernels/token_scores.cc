#include "kernels/token_scores.h"

#include <cmath>
#include <string>

#include "base/parallel.h"
#include "kernels/cpu/pooling.h"

namespace kvern::evict {

Status Pooling::validate() const {
  if (kind == Kind::kNone || (width % 2 == 1 && width <= kMaxWidth)) return Status::ok();
  return {Code::kInvalid,
          "pooling: width " + std::to_string(width) + " must be odd and at most " + std::to_string(kMaxWidth)};
}

Result<TokenScores> cake_scores(const Observation& observation, std::uint32_t kv_heads, float gamma,
                                const Pooling& pooling, Executor* executor) {
  if (Status status = pooling.validate(); !status) return failure(std::move(status));
  if (kv_heads == 0 || observation.query_heads % kv_heads != 0) {
    return failure(Code::kInvalid, "scores: " + std::to_string(observation.query_heads) +
                                       " query heads are no multiple of " + std::to_string(kv_heads) + " KV heads");
  }
  if (gamma != 0 && observation.variance.size() != observation.mean.size()) {
    return failure(Code::kInvalid, "scores: gamma needs an observation with dispersion");
  }
  const std::uint32_t columns = observation.columns;
  const std::uint32_t sharing = observation.query_heads / kv_heads;
  TokenScores scores{kv_heads, columns, std::vector<float>(std::size_t{kv_heads} * columns)};
  parallel_for(executor, kv_heads, [&](std::size_t kv_head) {
    const std::size_t head = kv_head * sharing;
    pooled_scores({observation.mean_of(head), gamma == 0 ? nullptr : observation.variance_of(head), sharing, columns},
                  gamma, pooling, scores.of(kv_head).data());
  });
  return scores;
}

Result<TokenScores> snapkv_scores(const Observation& observation, std::uint32_t kv_heads, const Pooling& pooling,
                                  Executor* executor) {
  return cake_scores(observation, kv_heads, 0, pooling, executor);
}

double Preference::of(double dispersion, double shift) const {
  return std::pow(dispersion, 1 / tau1) * std::pow(shift, 1 / tau2);
}

}  // namespace kvern::evict
