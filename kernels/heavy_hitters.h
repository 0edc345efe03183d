#pragma once

#include <cstdint>

#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/observation.h"
#include "kernels/selection.h"
#include "kernels/token_scores.h"

namespace kvern::evict {

/// H2O (arXiv 2306.14048): the attention that a token has received from all tokens so far.
enum class ColumnSum {
  kSum,   ///< sum over the rows, as published
  kMean,  ///< divided by the number of rows that can see the token: no credit for age
};

/// Column sums of the whole causal attention of a prompt: queries [query heads][S][dim], keys [KV heads][S][dim], mean
/// over the query heads of a KV head. Quadratic in S; rows go by in tiles. kInvalid as for observe(), or when queries
/// and keys differ in tokens.
Result<TokenScores> heavy_hitter_scores(const HeadRows& queries, const HeadRows& keys, ColumnSum kind,
                                        ObservationWorkspace& workspace, Executor* executor);

/// One decoded token: adds its attention over the keys that are held, itself the last, to their sums (kSum). sums has
/// keys.tokens columns, 0 for the new token. query is [query heads][1][dim]. kInvalid, sums untouched, as for
/// observe(). The heads of `keys` hold equal numbers of tokens.
Status add_heavy_hitter_row(const HeadRows& query, const HeadRows& keys, ObservationWorkspace& workspace,
                            Executor* executor, TokenScores& sums);

/// H2O's choice: the `heavy` best before the last `recent` tokens, and those. sums covers all tokens held.
Result<Selection> select_heavy_and_recent(const TokenScores& sums, std::uint32_t heavy, std::uint32_t recent,
                                          Executor* executor);

}  // namespace kvern::evict
