#pragma once

#include <cstdint>

#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/token_scores.h"

namespace kvern::evict {

/// Scores that need no query, of all tokens of keys [KV heads][tokens][dim]. A key whose squared norm is not finite in
/// fp32 scores NaN, the worst, and takes no part in the mean of KeyDiff. kInvalid for an element type that is no float
/// or a dim of 0.

/// KNorm: -|k|. Keys of small norm attract attention.
Result<TokenScores> knorm_scores(const HeadRows& keys, Executor* executor);

/// KeyDiff: -cos(k, mean of k/|k| over the head's tokens). Keys unlike the rest are kept. A zero key scores 0.
Result<TokenScores> keydiff_scores(const HeadRows& keys, Executor* executor);

}  // namespace kvern::evict
