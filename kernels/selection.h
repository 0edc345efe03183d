#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/score_order.h"
#include "kernels/token_scores.h"

namespace kvern::evict {

/// Tokens that stay, per KV head, each head's ascending. Heads may keep different numbers.
struct Selection {
  /// heads + 1 entries; head h keeps tokens[offsets[h]] … tokens[offsets[h + 1] - 1].
  std::vector<std::uint32_t> offsets = {0};
  std::vector<std::uint32_t> tokens;

  std::size_t heads() const { return offsets.size() - 1; }
  std::span<const std::uint32_t> of(std::size_t head) const {
    return std::span(tokens).subspan(offsets[head], offsets[head + 1] - offsets[head]);
  }
  bool operator==(const Selection&) const = default;
};

/// NaNs among the scores: what the caller adds to its counter.
std::size_t count_nan(std::span<const float> scores);

/// The `count` best of the scores, ascending by index. All, where there are fewer.
std::vector<std::uint32_t> best_of(std::span<const float> scores, std::size_t count);

/// The same best first, for selections that shrink later: any prefix is the best of its length.
std::vector<std::uint32_t> ranked_best_of(std::span<const float> scores, std::size_t count);

/// Per head the counts[head] best tokens, and after them the `tail` tokens that follow the scored ones (the window),
/// which are always kept. counts holds one number per head, or one for all. kInvalid for another number of counts or
/// more than 2^32 - 1 tokens.
Result<Selection> select_best(const TokenScores& scores, std::span<const std::uint32_t> counts, std::uint32_t tail,
                              Executor* executor);

/// StreamingLLM (arXiv 2309.17453): the first `sinks` and the last `recent` of `tokens`, for every head alike.
Selection select_sinks_and_recent(std::uint32_t heads, std::uint32_t tokens, std::uint32_t sinks, std::uint32_t recent);

/// Bytes that gather_rows() writes for rows of this shape.
std::size_t gathered_bytes(const HeadRows& rows, const Selection& selection);

/// Copies the selected rows to `out`, head after head and without gaps: a compact K or V, ragged where the heads keep
/// different numbers. kInvalid when the heads differ, a token is not among the rows or out is not gathered_bytes()
/// long; out must not overlap the rows.
Status gather_rows(const HeadRows& rows, const Selection& selection, std::span<std::byte> out, Executor* executor);

}  // namespace kvern::evict
