#pragma once

#include <cstdint>

#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/observation.h"
#include "kernels/selection.h"
#include "kernels/token_scores.h"

namespace kvern::evict {

/// CAKE's rule while decoding: the last query alone judges (no variance).
struct DecodeRule {
  std::uint32_t budget = 0;   ///< b: entries kept besides the window; fixed at the end of prefill
  std::uint32_t window = 32;  ///< w: last entries, always kept
  Pooling pooling;            ///< over entries in position order

  bool evicts(std::uint64_t entries) const { return entries > std::uint64_t{budget} + window; }
};

/// Scores of the entries before the window: the attention of the newest token, query [query heads][1][dim], over all
/// entries, keys [KV heads][n][dim] with itself the last; pooled, then mean over the query heads of a KV head. Entries
/// are in position order. kInvalid as for observe() and Pooling::validate().
Result<TokenScores> decode_scores(const HeadRows& query, const HeadRows& keys, const DecodeRule& rule,
                                  ObservationWorkspace& workspace, Executor* executor);

/// Entries that stay after this step: all while they fit, else the budget's best and the window.
Result<Selection> decode_keep(const HeadRows& query, const HeadRows& keys, const DecodeRule& rule,
                              ObservationWorkspace& workspace, Executor* executor);

}  // namespace kvern::evict
