#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/amx.h"
#include "kernels/head_rows.h"

/// The inner loops of observe() (kernels/observation.h), one instruction set chosen at run time.
///
/// Rows of one query head go in groups of kGroupRows, the last filled up, so that a vector holds rows and a column's
/// logits lie side by side. Logits are in base 2: y = x / ln 2 = n + f with n whole, and what is kept of them is
/// 2^(y - M), M a whole number per row and block. Since 2^f does not depend on M, rescaling is exact, and equal logits
/// stay equal wherever they stand.
namespace kvern::evict {

constexpr std::uint32_t kGroupRows = 16;
/// Columns that are multiplied while their keys, as floats, lie in the L1 cache; a whole number of register tiles (12,
/// 6 and 2 columns).
constexpr std::uint32_t kBlockColumns = 48;

/// Running sums over columns, kGroupRows each per group: [reference M][sum of 2^(y - M)][sum of (y - M) 2^(y - M)].
constexpr std::uint32_t kTotals = 3 * kGroupRows;

/// True where products of these types go through tile registers (amx.h), on the instruction set in use.
bool multiplies_in_tiles(DType queries, DType keys);

/// A row in tiles is filled up with zeros to this.
constexpr std::uint32_t tile_dim(std::uint32_t dim) {
  return (dim + amx::kTileDim - 1) / amx::kTileDim * amx::kTileDim;
}

/// Floats that a group of packed queries takes.
constexpr std::size_t group_floats(std::uint32_t dim, bool tiles) {
  return std::size_t{tiles ? tile_dim(dim) / 2 : dim} * kGroupRows;
}

struct ObservedRows {
  const float* queries = nullptr;  ///< groups as pack_queries() leaves them; 64-byte aligned
  bool tiles = false;              ///< as they were packed
  float scale = 1;                 ///< of logits in tiles: scale / ln 2
  std::uint32_t groups = 0;
  std::uint32_t groups_per_head = 0;
  std::uint32_t rows_per_head = 0;  ///< at most groups_per_head * kGroupRows; the others are no rows
};

/// Rows of one query head as ObservedRows wants them: [group][dim][kGroupRows], times `scale`, which includes 1 / ln 2;
/// in tiles bf16 [group][dim / 2][kGroupRows][2], not scaled.
void pack_queries(const HeadRows& queries, std::uint32_t head, float scale, bool tiles, float* packed);

struct ColumnRange {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
};

/// What pass 1 keeps of a range of columns for pass 2, column 0 being the first of the range. All null: nothing.
struct KeptColumns {
  float* exponentials = nullptr;  ///< 2^(y - M), [group][column, rounded up to whole blocks][row]
  std::size_t group_stride = 0;   ///< floats between groups of exponentials
  float* references = nullptr;    ///< M, [group][block][row]
  std::size_t reference_stride = 0;
};

/// Pass 1 over columns [begin, end) of one KV head: what is kept of them, and totals[group] over them, causal. Returns
/// the number of logits that were not finite.
std::uint64_t observe_columns(const ObservedRows& rows, const HeadRows& keys, std::uint32_t kv_head,
                              ColumnRange columns, const KeptColumns& kept, float* totals);

/// Where pass 2 puts its results: of query head and column at head * stride + column, column 0 being the first of the
/// range.
struct ColumnStatistics {
  float* means = nullptr;
  float* variances = nullptr;  ///< null: not wanted
  std::size_t stride = 0;
  double* shifts = nullptr;  ///< per query head, the sum of its variances
};

/// Pass 2 over the same columns. finals holds per group [M of the whole row][1 / sum over the whole row, 0 for what is
/// no row].
void column_statistics(const ObservedRows& rows, ColumnRange columns, const KeptColumns& kept, const float* finals,
                       const ColumnStatistics& out);

}  // namespace kvern::evict
