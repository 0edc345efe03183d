#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "base/status.h"
#include "kernels/head_rows.h"

namespace kvern {

class Executor;

namespace evict {

/// What is observed of the attention of a prompt's last tokens.
struct ObservationOptions {
  /// Columns that statistics are made of: keys [0, columns). Default: all keys before the observation window.
  std::optional<std::uint32_t> columns;
  /// Factor of <q, k>. Default: 1/sqrt(dim).
  std::optional<float> scale;
  /// Whether variances, dispersion and shift are made too (CAKE). Means alone take less time.
  bool dispersion = true;
};

/// Statistics of A[h, i, j] = exp(x[h, i, j] - lse[h, i]), the causal attention of the last `rows` queries over all
/// keys, where x = scale * <Q[h, i], K[h / g, j]> and key j is masked when it comes after query i. Rows are not
/// renormalised when columns are left out.
///
/// A logit that is not finite counts as masked: a damaged key costs itself alone (its statistics are 0), a damaged
/// query contributes nothing.
struct Observation {
  std::uint32_t query_heads = 0;
  std::uint32_t rows = 0;
  std::uint32_t columns = 0;
  /// ln sum_j exp(x) over all unmasked keys, [query head][row]. -infinity where every key is masked.
  std::vector<float> lse;
  /// mean_i A, [query head][column].
  std::vector<float> mean;
  /// var_i A with divisor rows - 1, [query head][column]; 0 for one row. Empty without `dispersion`.
  std::vector<float> variance;
  /// CAKE's H = -sum A ln A in nat, over all heads, rows and columns. 0 without `dispersion`.
  double dispersion = 0;
  /// CAKE's V = sum of the variances over all heads and columns. 0 without `dispersion`.
  double shift = 0;
  /// Logits that were not finite.
  std::uint64_t not_finite = 0;

  const float* mean_of(std::size_t head) const { return mean.data() + head * columns; }
  const float* variance_of(std::size_t head) const { return variance.data() + head * columns; }
};

/// Scratch of observe(), kept between calls to save allocations. Not for two calls at a time. Its size is bounded by
/// the largest of 32 MiB and 4 bytes per row of one query head and column, and 4 bytes per element of the queries.
struct ObservationWorkspace {
  std::vector<float> queries;
  std::vector<float> exponentials;
  std::vector<float> references;
  std::vector<float> totals;
};

/// About what it grows to: by query heads that share a KV head, rows and columns.
std::uint64_t observation_workspace_bytes(std::uint32_t sharing, std::uint32_t rows, std::uint32_t columns);

/// Observes queries [query heads][w][dim], the last w positions of the sequence, over keys [KV heads][S][dim]. Reads
/// the keys once per KV head, whatever the number of query heads that share it, and never holds the attention of more
/// than a tile of rows. Work is shared with executor (null: none). The result is the same bit for bit whatever the
/// executor, and equal keys get equal statistics wherever they stand before the window.
///
/// kInvalid, with `out` in any state: element types that are no floats, a dim that is 0 or differs, query heads that
/// are no multiple of KV heads, more rows than keys, columns beyond the keys. No rows or no columns are fine and give
/// empty statistics (S <= w: nothing to score).
Status observe(const HeadRows& queries, const HeadRows& keys, const ObservationOptions& options,
               ObservationWorkspace& workspace, Executor* executor, Observation& out);

}  // namespace evict
}  // namespace kvern
