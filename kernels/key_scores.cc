#include "kernels/key_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "kernels/cpu/key_scores.h"

namespace kvern::evict {
namespace {

/// Tokens per task, and per partial sum of KeyDiff's directions.
constexpr std::uint32_t kChunkTokens = 512;

Status check(const HeadRows& keys) {
  if (keys.dtype != DType::kOpaqueBytes && keys.dim > 0) return Status::ok();
  return {Code::kInvalid, "key scores: keys must be of a float type and have a dim"};
}

/// Runs body(head, chunk, tokens of the chunk) for all.
template <typename Body>
void for_each_chunk(const HeadRows& keys, Executor* executor, Body body) {
  const std::size_t chunks = (std::size_t{keys.tokens} + kChunkTokens - 1) / kChunkTokens;
  parallel_for(executor, keys.heads * chunks, [&](std::size_t i) {
    const auto begin = static_cast<std::uint32_t>(i % chunks) * kChunkTokens;
    const ColumnRange tokens{begin, std::min(keys.tokens, begin + kChunkTokens)};
    body(static_cast<std::uint32_t>(i / chunks), i % chunks, tokens);
  });
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

}  // namespace

Result<TokenScores> knorm_scores(const HeadRows& keys, Executor* executor) {
  if (Status status = check(keys); !status) return failure(std::move(status));
  TokenScores scores{keys.heads, keys.tokens, std::vector<float>(std::size_t{keys.heads} * keys.tokens)};
  for_each_chunk(keys, executor, [&](std::uint32_t head, std::size_t, ColumnRange tokens) {
    float* of_chunk = scores.of(head).data() + tokens.begin;
    squared_norms(keys, head, tokens, of_chunk);
    for (std::uint32_t i = 0; i < tokens.end - tokens.begin; ++i) {
      of_chunk[i] = std::isfinite(of_chunk[i]) ? -std::sqrt(of_chunk[i]) : kNaN;
    }
  });
  return scores;
}

Result<TokenScores> keydiff_scores(const HeadRows& keys, Executor* executor) {
  if (Status status = check(keys); !status) return failure(std::move(status));
  TokenScores scores{keys.heads, keys.tokens, std::vector<float>(std::size_t{keys.heads} * keys.tokens)};
  const std::size_t chunks = (std::size_t{keys.tokens} + kChunkTokens - 1) / kChunkTokens;
  // 1/|k|, 0 for what has no direction.
  std::vector<float> inverses(scores.values.size());
  std::vector<float> partial(keys.heads * chunks * keys.dim);
  for_each_chunk(keys, executor, [&](std::uint32_t head, std::size_t chunk, ColumnRange tokens) {
    float* of_chunk = inverses.data() + std::size_t{head} * keys.tokens + tokens.begin;
    squared_norms(keys, head, tokens, of_chunk);
    for (std::uint32_t i = 0; i < tokens.end - tokens.begin; ++i) {
      const float squared = of_chunk[i];
      of_chunk[i] = std::isfinite(squared) && squared > 0 ? 1 / std::sqrt(squared) : 0;
      scores.of(head)[tokens.begin + i] = std::isfinite(squared) ? 0 : kNaN;
    }
    add_scaled_rows(keys, head, tokens, of_chunk, partial.data() + (head * chunks + chunk) * keys.dim);
  });
  // The mean's length does not matter to a cosine.
  std::vector<float> anchors(std::size_t{keys.heads} * keys.dim);
  for (std::uint32_t head = 0; head < keys.heads; ++head) {
    std::vector<double> sum(keys.dim);
    double squared = 0;
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
      const float* of_chunk = partial.data() + (head * chunks + chunk) * keys.dim;
      for (std::uint32_t i = 0; i < keys.dim; ++i) sum[i] += static_cast<double>(of_chunk[i]);
    }
    for (const double value : sum) squared += value * value;
    const double inverse = squared > 0 ? 1 / std::sqrt(squared) : 0;
    for (std::uint32_t i = 0; i < keys.dim; ++i) {
      anchors[std::size_t{head} * keys.dim + i] = static_cast<float>(sum[i] * inverse);
    }
  }
  for_each_chunk(keys, executor, [&](std::uint32_t head, std::size_t, ColumnRange tokens) {
    const std::size_t first = std::size_t{head} * keys.tokens + tokens.begin;
    std::vector<float> products(tokens.end - tokens.begin);
    dot_products(keys, head, tokens, anchors.data() + std::size_t{head} * keys.dim, products.data());
    for (std::size_t i = 0; i < products.size(); ++i) {
      float& score = scores.values[first + i];
      if (!std::isnan(score)) score = -products[i] * inverses[first + i];
    }
  });
  return scores;
}

}  // namespace kvern::evict
