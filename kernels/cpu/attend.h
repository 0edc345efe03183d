#pragma once

#include <cstdint>

#include "kernels/attend.h"

namespace kvern::attention {

/// Entries that are read together: their rows stay in the L1 cache between the pass over K and the pass over V.
constexpr std::uint32_t kTile = 64;
/// Entries of a piece. Large enough that combining costs nothing, small enough that one head's cache spreads over
/// threads. A multiple of kTile. Results depend on it, so it is one number for every machine.
constexpr std::uint32_t kPiece = 2048;

/// Rows are padded to whole vectors with zeros.
constexpr std::uint32_t padded(std::uint32_t dim) { return (dim + 15) / 16 * 16; }

/// What the queries of one KV head see of entries [begin, end) of a segment.
struct Piece {
  const AttendSegment* segment = nullptr;
  TokenRange range;
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
  /// [count][padded(key_dim)], scaled; query i is row i % rows of its head.
  const float* queries = nullptr;
  std::uint32_t count = 0;
  std::uint32_t rows = 1;
  const std::int32_t* query_positions = nullptr;
  /// Scratch, [count][kTile].
  float* weights = nullptr;
  /// Results: the sum of the weighted values [count][padded(value_dim)], and per query the largest logit and the sum of
  /// the weights, which are exp(logit - largest).
  float* sums = nullptr;
  float* largest = nullptr;
  float* totals = nullptr;
};

Status attend_piece(const Piece& piece);

}  // namespace kvern::attention
