#include "kernels/cpu/attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attend.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
// clang-format on

#include "kernels/cpu/elements-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::attention {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

constexpr std::uint32_t kLanes = hn::MaxLanes(DF());
// Queries that are worked on together, so that an element is converted once for all of them: as many as leave room in
// the registers for four rows (or four vectors of a row).
constexpr std::uint32_t kQueries = kLanes == 16 ? 4 : 2;
// Rows that are multiplied together: as many dot products as a 128-bit block has lanes.
constexpr std::uint32_t kRows = 4;

#if HWY_TARGET == HWY_SCALAR
HWY_INLINE void store_sums(VF a, VF b, VF c, VF d, float* HWY_RESTRICT out) {
  out[0] = hn::GetLane(a);
  out[1] = hn::GetLane(b);
  out[2] = hn::GetLane(c);
  out[3] = hn::GetLane(d);
}
#else
template <class D>
HWY_INLINE auto sum_of_blocks([[maybe_unused]] D d, hn::VFromD<D> v) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return sum_of_blocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}
// The sums of the lanes of four vectors.
HWY_INLINE void store_sums(VF a, VF b, VF c, VF d, float* HWY_RESTRICT out) {
  const VF ac = hn::Add(hn::InterleaveLower(DF(), a, c), hn::InterleaveUpper(DF(), a, c));
  const VF bd = hn::Add(hn::InterleaveLower(DF(), b, d), hn::InterleaveUpper(DF(), b, d));
  const VF abcd = hn::Add(hn::InterleaveLower(DF(), ac, bd), hn::InterleaveUpper(DF(), ac, bd));
  hn::StoreU(sum_of_blocks(DF(), abcd), hn::CappedTag<float, 4>(), out);
}
#endif

// Dot products of kCount queries with the rows of a tile, whose number is rounded up to whole kRows.
template <class E, std::uint32_t kCount>
void dot_products(const typename E::Raw* const* HWY_RESTRICT rows, std::uint32_t tokens,
                  const float* HWY_RESTRICT queries, std::uint32_t dim, float* HWY_RESTRICT out) {
  for (std::uint32_t token = 0; token < tokens; token += kRows) {
    VF sums[kCount][kRows];
    for (auto& of_query : sums) {
      for (VF& sum : of_query) sum = hn::Zero(DF());
    }
    for (std::uint32_t column = 0; column < dim; column += kLanes) {
      VF keys[kRows];
      for (std::uint32_t i = 0; i < kRows; ++i) keys[i] = E::load(rows[token + i] + column);
      for (std::uint32_t query = 0; query < kCount; ++query) {
        const VF factor = hn::LoadU(DF(), queries + std::size_t{query} * dim + column);
        for (std::uint32_t i = 0; i < kRows; ++i) sums[query][i] = hn::MulAdd(keys[i], factor, sums[query][i]);
      }
    }
    for (std::uint32_t query = 0; query < kCount; ++query) {
      const auto& of = sums[query];
      store_sums(of[0], of[1], of[2], of[3], out + std::size_t{query} * kTile + token);
    }
  }
}

// Adds the weighted rows of a tile, kVectors vectors of them, to the sums of kCount queries.
template <class E, std::uint32_t kCount, std::uint32_t kVectors>
HWY_INLINE void add_columns(const typename E::Raw* const* HWY_RESTRICT rows, std::uint32_t tokens,
                            const float* HWY_RESTRICT weights, std::uint32_t dim, std::uint32_t column,
                            float* HWY_RESTRICT sums) {
  VF sum[kCount][kVectors];
  for (std::uint32_t query = 0; query < kCount; ++query) {
    for (std::uint32_t i = 0; i < kVectors; ++i) {
      sum[query][i] = hn::LoadU(DF(), sums + std::size_t{query} * dim + column + std::size_t{i} * kLanes);
    }
  }
  for (std::uint32_t token = 0; token < tokens; ++token) {
    VF values[kVectors];
    for (std::uint32_t i = 0; i < kVectors; ++i) values[i] = E::load(rows[token] + column + std::size_t{i} * kLanes);
    for (std::uint32_t query = 0; query < kCount; ++query) {
      const VF weight = hn::Set(DF(), weights[std::size_t{query} * kTile + token]);
      for (std::uint32_t i = 0; i < kVectors; ++i) sum[query][i] = hn::MulAdd(values[i], weight, sum[query][i]);
    }
  }
  for (std::uint32_t query = 0; query < kCount; ++query) {
    for (std::uint32_t i = 0; i < kVectors; ++i) {
      hn::StoreU(sum[query][i], DF(), sums + std::size_t{query} * dim + column + std::size_t{i} * kLanes);
    }
  }
}

template <class E, std::uint32_t kCount>
void add_rows(const typename E::Raw* const* HWY_RESTRICT rows, std::uint32_t tokens, const float* HWY_RESTRICT weights,
              std::uint32_t dim, float* HWY_RESTRICT sums) {
  constexpr std::uint32_t kVectors = 4;
  std::uint32_t column = 0;
  for (; column + kVectors * kLanes <= dim; column += kVectors * kLanes) {
    add_columns<E, kCount, kVectors>(rows, tokens, weights, dim, column, sums);
  }
  for (; column < dim; column += kLanes) add_columns<E, kCount, 1>(rows, tokens, weights, dim, column, sums);
}

// Calls run.template operator()<kCount>(first) for all queries, as many at a time as there is room for.
template <class Run>
HWY_INLINE void for_each_query_block(std::uint32_t count, Run run) {
  std::uint32_t query = 0;
  if constexpr (kQueries == 4) {
    for (; query + 4 <= count; query += 4) run.template operator()<4>(query);
  }
  for (; query + 2 <= count; query += 2) run.template operator()<2>(query);
  for (; query < count; ++query) run.template operator()<1>(query);
}

// The rows of up to kTile entries as the loops above read them: pointers to whole vectors of one element type.
class Tile {
 public:
  // Entries begin .. begin + count of the rows.
  Status fetch(const AttendRows& from, std::uint32_t dim, std::uint32_t begin, std::uint32_t count) {
    dtype_ = from.dtype;
    const std::size_t row_bytes = std::size_t{dim} * dtype_bytes(from.dtype);
    for (std::uint32_t i = 0; i < count;) {
      const std::uint32_t row = from.index != nullptr ? from.index[begin + i] : begin + i;
      std::uint32_t run = 1;
      while (i + run < count && (from.index == nullptr || from.index[begin + i + run] == row + run)) ++run;
      const std::byte* first = from.data + row * from.stride_bytes;
      std::size_t stride = from.stride_bytes;
      if (from.reader != nullptr) {
        if (Status status = from.reader->read({row, row + run}, scratch_ + i * row_bytes); !status) return status;
        first = scratch_ + i * row_bytes;
        stride = row_bytes;
      }
      for (std::uint32_t j = 0; j < run; ++j) rows_[i + j] = first + j * stride;
      i += run;
    }
    if (dim != padded(dim)) pad(dim, count);
    // Whole groups of rows are multiplied; what the repeated ones give is not used.
    for (std::uint32_t i = count; i % kRows != 0; ++i) rows_[i] = rows_[count - 1];
    return Status::ok();
  }

  // Calls run.template operator()<E>(rows).
  template <class Run>
  HWY_INLINE void visit(Run run) const {
    switch (dtype_) {
      case DType::kFloat32:
        return run.template operator()<Float32>(reinterpret_cast<const Float32::Raw* const*>(rows_));
      case DType::kFloat16:
        return run.template operator()<Float16>(reinterpret_cast<const Float16::Raw* const*>(rows_));
      case DType::kBFloat16:
        return run.template operator()<BFloat16>(reinterpret_cast<const BFloat16::Raw* const*>(rows_));
      case DType::kOpaqueBytes:
        return;
    }
  }

 private:
  // Copies the rows to the scratch with zeros behind them, from the last one on, since they may lie there already.
  void pad(std::uint32_t dim, std::uint32_t count) {
    const std::size_t element = dtype_bytes(dtype_);
    const std::size_t stride = padded(dim) * element;
    for (std::uint32_t i = count; i-- > 0;) {
      std::byte* to = scratch_ + i * stride;
      std::memmove(to, rows_[i], dim * element);
      std::memset(to + dim * element, 0, stride - dim * element);
      rows_[i] = to;
    }
  }

  DType dtype_ = DType::kFloat32;
  const std::byte* rows_[kTile] = {};
  alignas(64) std::byte scratch_[std::size_t{kTile} * kMaxAttendDim * 4];
};

// Turns the logits of one query into weights and brings its sums to the new largest logit.
void weigh(const Piece& piece, std::uint32_t query, std::uint32_t begin, std::uint32_t count) {
  const AttendSegment& segment = *piece.segment;
  const float infinity = std::numeric_limits<float>::infinity();
  float* HWY_RESTRICT logits = piece.weights + std::size_t{query} * kTile;
  if (segment.keys.lengths != nullptr) {
    for (std::uint32_t i = 0; i < count; ++i) logits[i] *= segment.keys.lengths[begin + i];
  }
  if (segment.bias != nullptr) {
    for (std::uint32_t i = 0; i < count; ++i) logits[i] += segment.bias[begin + i];
  }
  if (segment.positions != nullptr && piece.query_positions != nullptr) {
    const std::int32_t position = piece.query_positions[query % piece.rows];
    for (std::uint32_t i = 0; i < count; ++i) {
      if (segment.positions[begin + i] > position) logits[i] = -infinity;
    }
  }
  for (std::uint32_t i = count; i % kLanes != 0; ++i) logits[i] = -infinity;
  VF largest = hn::Set(DF(), -infinity);
  for (std::uint32_t i = 0; i < count; i += kLanes) largest = hn::Max(largest, hn::LoadU(DF(), logits + i));
  float& before = piece.largest[query];
  const float now = std::max(before, hn::GetLane(hn::MaxOfLanes(DF(), largest)));
  float* HWY_RESTRICT sums = piece.sums + std::size_t{query} * padded(piece.value_dim);
  if (now > before) {
    const float factor = std::exp(before - now);
    piece.totals[query] *= factor;
    for (std::uint32_t column = 0; column < padded(piece.value_dim); ++column) sums[column] *= factor;
    before = now;
  }
  // Nothing seen so far: any finite number does, every weight is 0.
  const VF reference = hn::Set(DF(), now == -infinity ? 0.0F : now);
  VF total = hn::Zero(DF());
  for (std::uint32_t i = 0; i < count; i += kLanes) {
    const VF difference = hn::Sub(hn::LoadU(DF(), logits + i), reference);
    // Exp() would make 0 of NaN.
    const VF weight = hn::IfThenElse(hn::IsNaN(difference), difference, hn::Exp(DF(), difference));
    total = hn::Add(total, weight);
    hn::StoreU(weight, DF(), logits + i);
  }
  piece.totals[query] += hn::GetLane(hn::SumOfLanes(DF(), total));
  if (segment.values.lengths != nullptr) {
    for (std::uint32_t i = 0; i < count; ++i) logits[i] *= segment.values.lengths[begin + i];
  }
}

Status attend_piece_here(const Piece& piece) {
  const std::uint32_t key_columns = padded(piece.key_dim);
  const std::uint32_t value_columns = padded(piece.value_dim);
  std::fill_n(piece.sums, std::size_t{piece.count} * value_columns, 0.0F);
  std::fill_n(piece.totals, piece.count, 0.0F);
  std::fill_n(piece.largest, piece.count, -std::numeric_limits<float>::infinity());
  Tile tile;
  for (std::uint32_t begin = piece.range.begin; begin < piece.range.end; begin += kTile) {
    const std::uint32_t count = std::min(kTile, piece.range.end - begin);
    if (Status status = tile.fetch(piece.segment->keys, piece.key_dim, begin, count); !status) return status;
    tile.visit([&]<class E>(const typename E::Raw* const* rows) HWY_ATTR {
      for_each_query_block(piece.count, [&]<std::uint32_t kCount>(std::uint32_t query) HWY_ATTR {
        dot_products<E, kCount>(rows, count, piece.queries + std::size_t{query} * key_columns, key_columns,
                                piece.weights + std::size_t{query} * kTile);
      });
    });
    for (std::uint32_t query = 0; query < piece.count; ++query) weigh(piece, query, begin, count);
    if (Status status = tile.fetch(piece.segment->values, piece.value_dim, begin, count); !status) return status;
    tile.visit([&]<class E>(const typename E::Raw* const* rows) HWY_ATTR {
      for_each_query_block(piece.count, [&]<std::uint32_t kCount>(std::uint32_t query) HWY_ATTR {
        add_rows<E, kCount>(rows, count, piece.weights + std::size_t{query} * kTile, value_columns,
                            piece.sums + std::size_t{query} * value_columns);
      });
    });
  }
  return Status::ok();
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::attention
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern {
namespace attention {

HWY_EXPORT(attend_piece_here);

Status attend_piece(const Piece& piece) { return HWY_DYNAMIC_DISPATCH(attend_piece_here)(piece); }

}  // namespace attention

namespace {

using attention::kPiece;
using attention::kTile;
using attention::padded;
using attention::Piece;

std::uint32_t queries_per_head(const AttendProblem& problem) {
  return problem.queries.heads / static_cast<std::uint32_t>(problem.heads.size()) * problem.queries.tokens;
}

std::size_t pieces_of(std::span<const AttendSegment> segments) {
  std::size_t pieces = 0;
  for (const AttendSegment& segment : segments) pieces += (std::size_t{segment.entries} + kPiece - 1) / kPiece;
  return pieces;
}

/// Floats that a piece needs: scratch, sums, largest logits, totals.
std::size_t piece_floats(const AttendProblem& problem) {
  return std::size_t{queries_per_head(problem)} * (kTile + padded(problem.value_dim) + 2);
}

bool has_sections(const AttendProblem& problem) {
  for (const auto& segments : problem.heads) {
    for (const AttendSegment& segment : segments) {
      if (segment.keys.section.index() != 0 || segment.values.section.index() != 0) return true;
    }
  }
  return false;
}

bool has_rows(const AttendRows& rows) {
  return rows.dtype != DType::kOpaqueBytes && (rows.reader != nullptr || rows.data != nullptr);
}

float element_value(DType dtype, const std::byte* at) {
  if (dtype == DType::kFloat32) {
    float value = 0;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, at, sizeof bits);
  return dtype == DType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

/// The queries in fp32, scaled and padded, [query heads][rows][padded dim].
void prepare_queries(const AttendProblem& problem, float* out) {
  const HeadRows& queries = problem.queries;
  const float scale =
      problem.scale != 0 ? problem.scale : static_cast<float>(1.0 / std::sqrt(static_cast<double>(queries.dim)));
  for (std::uint32_t head = 0; head < queries.heads; ++head) {
    for (std::uint32_t row = 0; row < queries.tokens; ++row, out += padded(queries.dim)) {
      const std::byte* from = queries.row(head, row);
      for (std::uint32_t column = 0; column < queries.dim; ++column) {
        out[column] = scale * element_value(queries.dtype, from + column * dtype_bytes(queries.dtype));
      }
      std::fill(out + queries.dim, out + padded(queries.dim), 0.0F);
    }
  }
}

/// One query's results from those of its pieces, in order.
void combine(std::span<const Piece> pieces, std::uint32_t query, std::uint32_t value_dim, float* output, float* lse) {
  const float infinity = std::numeric_limits<float>::infinity();
  float largest = -infinity;
  for (const Piece& piece : pieces) largest = std::max(largest, piece.largest[query]);
  const float reference = largest == -infinity ? 0.0F : largest;
  std::fill_n(output, value_dim, 0.0F);
  float total = 0;
  for (const Piece& piece : pieces) {
    const float factor = std::exp(piece.largest[query] - reference);
    total += factor * piece.totals[query];
    const float* sums = piece.sums + std::size_t{query} * padded(value_dim);
    for (std::uint32_t column = 0; column < value_dim; ++column) output[column] += factor * sums[column];
  }
  *lse = reference + std::log(total);
  if (total == 0) return;
  for (std::uint32_t column = 0; column < value_dim; ++column) output[column] /= total;
}

}  // namespace

Status AttendProblem::validate() const {
  const auto invalid = [](std::string message) { return Status(Code::kInvalid, "attend: " + std::move(message)); };
  if (heads.empty() || queries.heads == 0 || queries.heads % heads.size() != 0) {
    return invalid(std::to_string(queries.heads) + " query heads over " + std::to_string(heads.size()) +
                   " KV heads; the first must be a multiple of the second");
  }
  if (queries.tokens == 0 || queries.data == nullptr || queries.dtype == DType::kOpaqueBytes) {
    return invalid("there are no queries");
  }
  if (queries.dim == 0 || queries.dim > kMaxAttendDim || value_dim == 0 || value_dim > kMaxAttendDim) {
    return invalid("dimensions of " + std::to_string(queries.dim) + " and " + std::to_string(value_dim) +
                   "; they may be 1 to " + std::to_string(kMaxAttendDim));
  }
  for (const auto& segments : heads) {
    for (const AttendSegment& segment : segments) {
      if (segment.entries > 0 && (!has_rows(segment.keys) || !has_rows(segment.values))) {
        return invalid("a segment has entries and no rows");
      }
    }
  }
  return Status::ok();
}

std::size_t attend_workspace_floats(const AttendProblem& problem) {
  std::size_t pieces = 0;
  for (const auto& segments : problem.heads) pieces += pieces_of(segments);
  return std::size_t{problem.queries.heads} * problem.queries.tokens * padded(problem.queries.dim) +
         pieces * piece_floats(problem);
}

Status attend(const AttendProblem& problem, std::span<float> workspace, std::span<float> output, std::span<float> lse,
              Executor* executor) {
  if (Status status = problem.validate(); !status) return status;
  const HeadRows& queries = problem.queries;
  const std::size_t rows = std::size_t{queries.heads} * queries.tokens;
  if (workspace.size() < attend_workspace_floats(problem) || output.size() < rows * problem.value_dim ||
      lse.size() < rows) {
    return {Code::kInvalid, "attend: workspace or output is too small"};
  }
  if (has_sections(problem)) {
    return {Code::kRefused, "attend: sections are for the GPU; give the CPU a reader that decodes them"};
  }
  prepare_queries(problem, workspace.data());
  const std::uint32_t count = queries_per_head(problem);
  const std::size_t floats = piece_floats(problem);
  float* scratch = workspace.data() + rows * padded(queries.dim);
  std::vector<Piece> pieces;
  std::vector<std::size_t> first_piece;
  for (std::size_t head = 0; head < problem.heads.size(); ++head) {
    first_piece.push_back(pieces.size());
    for (const AttendSegment& segment : problem.heads[head]) {
      for (std::uint32_t begin = 0; begin < segment.entries;) {
        const std::uint32_t end = begin + std::min(kPiece, segment.entries - begin);
        Piece piece{&segment, {begin, end}, queries.dim, problem.value_dim, nullptr, count, queries.tokens};
        piece.query_positions = problem.query_positions;
        piece.queries = workspace.data() + head * count * padded(queries.dim);
        piece.weights = scratch + pieces.size() * floats;
        piece.sums = piece.weights + std::size_t{count} * kTile;
        piece.largest = piece.sums + std::size_t{count} * padded(problem.value_dim);
        piece.totals = piece.largest + count;
        pieces.push_back(piece);
        begin = end;
      }
    }
  }
  first_piece.push_back(pieces.size());
  std::vector<Status> statuses(pieces.size());
  parallel_for(executor, pieces.size(), [&](std::size_t i) { statuses[i] = attention::attend_piece(pieces[i]); });
  for (const Status& status : statuses) {
    if (!status) return status;
  }
  parallel_for(executor, problem.heads.size(), [&](std::size_t head) {
    const auto of_head = std::span(pieces).subspan(first_piece[head], first_piece[head + 1] - first_piece[head]);
    for (std::uint32_t query = 0; query < count; ++query) {
      const std::size_t row = head * count + query;
      combine(of_head, query, problem.value_dim, output.data() + row * problem.value_dim, lse.data() + row);
    }
  });
  return Status::ok();
}

}  // namespace kvern
#endif
