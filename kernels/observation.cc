#include "kernels/observation.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <string>

#include "base/parallel.h"
#include "kernels/cpu/observation.h"

namespace kvern::evict {
namespace {

/// Columns that a thread works on at a time: enough to pay for a task, few enough for many threads at 4,096 tokens.
constexpr std::uint32_t kChunkColumns = 10 * kBlockColumns;
/// Most bytes of exponentials at a time, unless one query head alone needs more: 64 rows of 4 heads at 32,768 tokens.
constexpr std::size_t kTileBytes = std::size_t{32} << 20;

constexpr std::uint32_t round_up(std::uint32_t value, std::uint32_t unit) { return (value + unit - 1) / unit * unit; }

/// 2^exponent for whole exponents up to 0.
double power_of_two(double exponent) {
  if (!(exponent > -1000)) return 0;
  return std::bit_cast<double>(static_cast<std::uint64_t>(1023 + static_cast<std::int64_t>(exponent)) << 52);
}

/// Room for `count` floats at a multiple of 64 bytes.
float* aligned(std::vector<float>& memory, std::size_t count) {
  constexpr std::size_t kAlignment = 64;
  memory.resize(std::max(memory.size(), count + kAlignment / sizeof(float)));
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (kAlignment - address % kAlignment) % kAlignment / sizeof(float);
}

std::uint64_t head_exponentials_bytes(std::uint32_t rows, std::uint32_t columns) {
  return std::uint64_t{round_up(columns, kBlockColumns)} * round_up(rows, kGroupRows) * sizeof(float);
}

Status check(const HeadRows& queries, const HeadRows& keys, std::uint32_t columns) {
  const auto invalid = [](std::string message) { return Status(Code::kInvalid, "observe: " + std::move(message)); };
  if (queries.dtype == DType::kOpaqueBytes || keys.dtype == DType::kOpaqueBytes) {
    return invalid("queries and keys must be of a float type");
  }
  if (keys.dim == 0 || queries.dim != keys.dim) {
    return invalid("queries have dim " + std::to_string(queries.dim) + ", keys " + std::to_string(keys.dim));
  }
  if (keys.heads == 0 || queries.heads == 0 || queries.heads % keys.heads != 0) {
    return invalid(std::to_string(queries.heads) + " query heads are no multiple of " + std::to_string(keys.heads) +
                   " KV heads");
  }
  if (queries.tokens > keys.tokens) {
    return invalid(std::to_string(queries.tokens) + " query rows for " + std::to_string(keys.tokens) + " keys");
  }
  if (columns > keys.tokens) {
    return invalid(std::to_string(columns) + " columns of " + std::to_string(keys.tokens) + " keys");
  }
  return Status::ok();
}

/// The query heads of one KV head that are observed together.
class Tile {
 public:
  Tile(const HeadRows& queries, const HeadRows& keys, ObservationWorkspace& workspace, Executor* executor,
       Observation& out)
      : keys_(keys), executor_(executor), out_(out) {
    groups_per_head_ = round_up(queries.tokens, kGroupRows) / kGroupRows;
    blocks_ = round_up(out.columns, kBlockColumns) / kBlockColumns;
    const std::uint64_t head_bytes = head_exponentials_bytes(queries.tokens, out.columns);
    const std::uint32_t sharing = queries.heads / keys.heads;
    most_heads_ = head_bytes == 0
                      ? sharing
                      : static_cast<std::uint32_t>(std::clamp<std::size_t>(kTileBytes / head_bytes, 1, sharing));
    for (std::uint32_t begin = 0; begin < out.columns; begin += kChunkColumns) {
      chunks_.push_back({begin, std::min(out.columns, begin + kChunkColumns)});
    }
    observed_chunks_ = chunks_.size();
    for (std::uint32_t begin = out.columns; begin < keys.tokens; begin += kChunkColumns) {
      chunks_.push_back({begin, std::min(keys.tokens, begin + kChunkColumns)});
    }
    const std::size_t groups = std::size_t{most_heads_} * groups_per_head_;
    exponentials_ = aligned(workspace.exponentials, groups * exponentials_stride());
    // The M of each block, then the finals.
    references_ = aligned(workspace.references, groups * (references_stride() + kFinals));
    finals_ = references_ + groups * references_stride();
    totals_ = aligned(workspace.totals, chunks_.size() * groups * kTotals);
    not_finite_.resize(chunks_.size());
    shift_.resize(observed_chunks_ * most_heads_);
    dispersion_.resize(groups);
  }

  std::uint32_t most_heads() const { return most_heads_; }

  /// Observes query heads [head, head + count), which share the KV head. Of rows, queries and how they were packed are
  /// given.
  void observe(std::uint32_t kv_head, std::uint32_t head, std::uint32_t count, ObservedRows rows) {
    rows.groups = count * groups_per_head_;
    rows.groups_per_head = groups_per_head_;
    rows.rows_per_head = out_.rows;
    const bool dispersion = !out_.variance.empty();
    parallel_for(executor_, chunks_.size(), [&](std::size_t i) {
      const KeptColumns kept = i < observed_chunks_ ? kept_of(chunks_[i]) : KeptColumns{};
      not_finite_[i] = observe_columns(rows, keys_, kv_head, chunks_[i], kept, totals_of(i, rows.groups));
    });
    parallel_for(executor_, rows.groups, [&](std::size_t group) { finish_rows(rows, head, group); });
    parallel_for(executor_, observed_chunks_, [&](std::size_t i) {
      const std::size_t first = std::size_t{head} * out_.columns + chunks_[i].begin;
      column_statistics(rows, chunks_[i], kept_of(chunks_[i]), finals_,
                        {.means = out_.mean.data() + first,
                         .variances = dispersion ? out_.variance.data() + first : nullptr,
                         .stride = out_.columns,
                         .shifts = shift_.data() + i * count});
    });
    out_.not_finite = std::accumulate(not_finite_.begin(), not_finite_.end(), out_.not_finite);
    if (!dispersion) return;
    for (std::size_t group = 0; group < rows.groups; ++group) out_.dispersion += dispersion_[group];
    for (std::size_t i = 0; i < observed_chunks_ * count; ++i) out_.shift += shift_[i];
  }

 private:
  static constexpr std::size_t kFinals = std::size_t{2} * kGroupRows;

  /// Floats per group.
  std::size_t exponentials_stride() const { return std::size_t{blocks_} * kBlockColumns * kGroupRows; }
  std::size_t references_stride() const { return std::size_t{blocks_} * kGroupRows; }
  /// Chunks are whole blocks, but for the last.
  KeptColumns kept_of(ColumnRange chunk) const {
    return {.exponentials = exponentials_ + std::size_t{chunk.begin} * kGroupRows,
            .group_stride = exponentials_stride(),
            .references = references_ + std::size_t{chunk.begin} / kBlockColumns * kGroupRows,
            .reference_stride = references_stride()};
  }
  float* totals_of(std::size_t chunk, std::size_t groups) { return totals_ + chunk * groups * kTotals; }

  /// Puts the totals of all chunks together: the log-sum-exp of the group's rows and their dispersion.
  void finish_rows(const ObservedRows& rows, std::uint32_t head, std::size_t group) {
    const auto first_row = static_cast<std::uint32_t>(group % groups_per_head_) * kGroupRows;
    float* lse = out_.lse.data() + (head + group / groups_per_head_) * out_.rows + first_row;
    float* finals = finals_ + group * kFinals;
    double dispersion = 0;
    for (std::uint32_t row = 0; row < kGroupRows; ++row) {
      const auto total = [&](std::size_t chunk, std::size_t which) {
        return static_cast<double>(totals_of(chunk, rows.groups)[group * kTotals + which * kGroupRows + row]);
      };
      double reference = total(0, 0);
      for (std::size_t chunk = 1; chunk < chunks_.size(); ++chunk) reference = std::max(reference, total(chunk, 0));
      double sum = 0;
      double observed = 0;
      double weighted = 0;
      for (std::size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
        const double change = total(chunk, 0) - reference;
        const double factor = power_of_two(change);
        if (factor == 0) continue;
        sum += factor * total(chunk, 1);
        if (chunk >= observed_chunks_) continue;
        observed += factor * total(chunk, 1);
        weighted += factor * (total(chunk, 2) + change * total(chunk, 1));
      }
      const bool is_row = first_row + row < out_.rows;
      const bool sees_keys = sum > 0;
      finals[row] = static_cast<float>(reference);
      finals[kGroupRows + row] = is_row && sees_keys ? static_cast<float>(1 / sum) : 0.0F;
      if (!is_row) continue;
      lse[row] = sees_keys ? static_cast<float>(std::numbers::ln2 * (reference + std::log2(sum)))
                           : -std::numeric_limits<float>::infinity();
      // -A ln A = A * (lse - x) with lse - x = ln 2 * (log2 sum - (y - M)).
      if (sees_keys) dispersion += std::numbers::ln2 * (observed * std::log2(sum) - weighted) / sum;
    }
    dispersion_[group] = dispersion;
  }

  const HeadRows& keys_;
  Executor* executor_;
  Observation& out_;
  std::uint32_t groups_per_head_ = 0;
  std::uint32_t blocks_ = 0;
  std::uint32_t most_heads_ = 0;
  std::vector<ColumnRange> chunks_;
  std::size_t observed_chunks_ = 0;
  float* exponentials_ = nullptr;
  float* references_ = nullptr;
  float* finals_ = nullptr;
  float* totals_ = nullptr;
  std::vector<std::uint64_t> not_finite_;
  std::vector<double> shift_;
  std::vector<double> dispersion_;
};

}  // namespace

std::uint64_t observation_workspace_bytes(std::uint32_t sharing, std::uint32_t rows, std::uint32_t columns) {
  const std::uint64_t one = head_exponentials_bytes(rows, columns);
  return std::min(sharing * one, std::max<std::uint64_t>(one, kTileBytes));
}

Status observe(const HeadRows& queries, const HeadRows& keys, const ObservationOptions& options,
               ObservationWorkspace& workspace, Executor* executor, Observation& out) {
  const std::uint32_t columns =
      options.columns.value_or(keys.tokens > queries.tokens ? keys.tokens - queries.tokens : 0);
  if (Status status = check(queries, keys, columns); !status) return status;
  out.query_heads = queries.heads;
  out.rows = queries.tokens;
  out.columns = columns;
  out.lse.resize(std::size_t{queries.heads} * queries.tokens);
  out.mean.resize(std::size_t{queries.heads} * columns);
  out.variance.resize(options.dispersion ? out.mean.size() : 0);
  out.dispersion = 0;
  out.shift = 0;
  out.not_finite = 0;
  if (queries.tokens == 0) {
    std::ranges::fill(out.mean, 0.0F);
    std::ranges::fill(out.variance, 0.0F);
    return Status::ok();
  }
  const float scale = options.scale.value_or(1.0F / std::sqrt(static_cast<float>(keys.dim)));
  const float binary_scale = scale * std::numbers::log2e_v<float>;
  const bool tiles = multiplies_in_tiles(queries.dtype, keys.dtype);
  const std::size_t head_floats = round_up(queries.tokens, kGroupRows) / kGroupRows * group_floats(keys.dim, tiles);
  float* packed = aligned(workspace.queries, queries.heads * head_floats);
  parallel_for(executor, queries.heads, [&](std::size_t head) {
    pack_queries(queries, static_cast<std::uint32_t>(head), binary_scale, tiles, packed + head * head_floats);
  });
  Tile tile(queries, keys, workspace, executor, out);
  const std::uint32_t sharing = queries.heads / keys.heads;
  for (std::uint32_t kv_head = 0; kv_head < keys.heads; ++kv_head) {
    for (std::uint32_t first = 0; first < sharing; first += tile.most_heads()) {
      const std::uint32_t head = kv_head * sharing + first;
      tile.observe(kv_head, head, std::min(tile.most_heads(), sharing - first),
                   {.queries = packed + head * head_floats, .tiles = tiles, .scale = binary_scale});
    }
  }
  return Status::ok();
}

}  // namespace kvern::evict
