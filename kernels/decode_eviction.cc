#include "kernels/decode_eviction.h"

#include <algorithm>

namespace kvern::evict {

Result<TokenScores> decode_scores(const HeadRows& query, const HeadRows& keys, const DecodeRule& rule,
                                  ObservationWorkspace& workspace, Executor* executor) {
  if (query.tokens != 1) return failure(Code::kInvalid, "decode scores: one query per head is needed");
  Observation observation;
  const std::uint32_t candidates = keys.tokens - std::min(keys.tokens, rule.window);
  const ObservationOptions options{.columns = candidates, .scale = {}, .dispersion = false};
  if (Status status = observe(query, keys, options, workspace, executor, observation); !status) {
    return failure(std::move(status));
  }
  return snapkv_scores(observation, keys.heads, rule.pooling, executor);
}

Result<Selection> decode_keep(const HeadRows& query, const HeadRows& keys, const DecodeRule& rule,
                              ObservationWorkspace& workspace, Executor* executor) {
  if (!rule.evicts(keys.tokens)) return select_sinks_and_recent(keys.heads, keys.tokens, 0, keys.tokens);
  const auto scores = decode_scores(query, keys, rule, workspace, executor);
  if (!scores) return failure(scores.error());
  return select_best(*scores, std::span(&rule.budget, 1), rule.window, executor);
}

}  // namespace kvern::evict
