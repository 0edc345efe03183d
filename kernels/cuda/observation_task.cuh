#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/elements.cuh"
#include "kernels/head_rows.h"

/// What the kernels of an observation share.
namespace kvern::evict {

constexpr float kLowest = -3.402823466e38F;

/// Sums over the logits y of a row, in base 2, of a piece of the columns.
struct alignas(16) Totals {
  float largest = kLowest;  ///< M; kLowest where there is no logit
  float sum = 0;            ///< of 2^(y - M)
  float observed = 0;       ///< the same over the observed columns alone
  float weighted = 0;       ///< of (y - M) 2^(y - M) over those
};

/// A row is one of a KV head's: its query heads' rows one after the other.
struct Problem {
  HeadRows queries;
  HeadRows keys;
  std::uint32_t columns;
  float scale;  ///< times 1 / ln 2: logits are in base 2
  std::uint32_t sharing;
  std::uint32_t piece;         ///< columns
  std::uint32_t pieces;        ///< of which there are totals
  std::uint32_t shift_slices;  ///< of a query head's variances
  Totals* totals;              ///< [KV head][piece][row]
  double* dispersions;         ///< [KV head][row]
  double* shifts;              ///< [query head][slice]
  float* references;           ///< [KV head][row]: log2 of the whole sum; +infinity where there is none
};

__host__ __device__ inline std::uint32_t rows_of(const Problem& problem) {
  return problem.sharing * problem.queries.tokens;
}

}  // namespace kvern::evict
