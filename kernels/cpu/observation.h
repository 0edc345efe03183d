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

/// Pass 1 over columns [begin, end) of one KV head: totals[group] over them, causal, and, unless exponentials is null,
/// 2^(y - M) as [group][column rounded up to blocks][row] (strides in floats; column 0 is `begin`) and the M of each
/// block as [group][block][row]. Returns the number of logits that were not finite.
std::uint64_t observe_columns(const ObservedRows& rows, const HeadRows& keys, std::uint32_t kv_head,
                              ColumnRange columns, float* exponentials, std::size_t exponentials_stride,
                              float* references, std::size_t references_stride, float* totals);

/// Pass 2 over the same columns: means and, unless null, variances per query head, strides in floats. finals holds per
/// group [M of the whole row][1 / sum over the whole row, 0 for what is no row]. sums[head] receives the sum of the
/// variances.
void column_statistics(const ObservedRows& rows, ColumnRange columns, const float* exponentials,
                       std::size_t exponentials_stride, const float* references, std::size_t references_stride,
                       const float* finals, float* means, float* variances, std::size_t statistics_stride,
                       double* sums);

}  // namespace kvern::evict
