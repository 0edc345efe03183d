#include "kernels/heavy_hitters.h"

#include <algorithm>
#include <string>

namespace kvern::evict {
namespace {

/// Query rows per tile: as many as share one reading of the keys.
constexpr std::uint32_t kTileRows = 64;

HeadRows token_range(const HeadRows& rows, std::uint32_t begin, std::uint32_t end) {
  HeadRows part = rows;
  part.data = rows.row(0, begin);
  part.tokens = end - begin;
  return part;
}

/// Adds the rows' attention, as observed over all keys, to the sums of the KV heads.
void add_rows(const Observation& observation, TokenScores& sums) {
  const std::uint32_t sharing = observation.query_heads / sums.heads;
  const float factor = static_cast<float>(observation.rows) / static_cast<float>(sharing);
  for (std::uint32_t head = 0; head < sums.heads; ++head) {
    const std::span<float> sum = sums.of(head);
    for (std::uint32_t column = 0; column < observation.columns; ++column) {
      float total = 0;
      for (std::uint32_t i = 0; i < sharing; ++i) total += observation.mean_of(std::size_t{head} * sharing + i)[column];
      sum[column] += total * factor;
    }
  }
}

}  // namespace

Result<TokenScores> heavy_hitter_scores(const HeadRows& queries, const HeadRows& keys, ColumnSum kind,
                                        ObservationWorkspace& workspace, Executor* executor) {
  if (queries.tokens != keys.tokens) {
    return failure(Code::kInvalid, "heavy hitters: " + std::to_string(queries.tokens) + " queries for " +
                                       std::to_string(keys.tokens) + " keys; the whole prompt's are needed");
  }
  TokenScores sums{keys.heads, keys.tokens, std::vector<float>(std::size_t{keys.heads} * keys.tokens)};
  Observation observation;
  for (std::uint32_t begin = 0; begin < keys.tokens; begin += kTileRows) {
    const std::uint32_t end = std::min(keys.tokens, begin + kTileRows);
    Status status = observe(token_range(queries, begin, end), token_range(keys, 0, end),
                            {.columns = end, .scale = {}, .dispersion = false}, workspace, executor, observation);
    if (!status) return failure(status);
    add_rows(observation, sums);
  }
  if (kind == ColumnSum::kMean) {
    for (std::uint32_t head = 0; head < sums.heads; ++head) {
      for (std::uint32_t token = 0; token < sums.tokens; ++token) {
        sums.of(head)[token] /= static_cast<float>(sums.tokens - token);
      }
    }
  }
  return sums;
}

Status add_heavy_hitter_row(const HeadRows& query, const HeadRows& keys, ObservationWorkspace& workspace,
                            Executor* executor, TokenScores& sums) {
  if (query.tokens != 1 || sums.heads != keys.heads || sums.tokens != keys.tokens) {
    return {Code::kInvalid, "heavy hitters: one query, and sums of the keys' heads and tokens are needed"};
  }
  Observation observation;
  const Status status = observe(query, keys, {.columns = keys.tokens, .scale = {}, .dispersion = false}, workspace,
                                executor, observation);
  if (status) add_rows(observation, sums);
  return status;
}

Result<Selection> select_heavy_and_recent(const TokenScores& sums, std::uint32_t heavy, std::uint32_t recent,
                                          Executor* executor) {
  const std::uint32_t tail = std::min(sums.tokens, recent);
  TokenScores candidates{sums.heads, sums.tokens - tail, {}};
  for (std::uint32_t head = 0; head < sums.heads; ++head) {
    const auto before = sums.of(head).first(candidates.tokens);
    candidates.values.insert(candidates.values.end(), before.begin(), before.end());
  }
  return select_best(candidates, std::span(&heavy, 1), tail, executor);
}

}  // namespace kvern::evict
