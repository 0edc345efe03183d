#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attend.h"
#include "tests/golden_vectors/vectors.h"

namespace kvern::golden {

/// The methods of each family.
void add_evict_methods(Methods& methods);
void add_merge_methods(Methods& methods);
void add_cluster_methods(Methods& methods);
void add_quantise_methods(Methods& methods);
void add_rotate_methods(Methods& methods);

/// What a kernel answered, or an exception that says why not.
inline void check(const Status& status) {
  if (!status) throw std::runtime_error(status.to_string());
}
template <typename T>
T check(Result<T> result) {
  check(status_of(result));
  return *std::move(result);
}

struct Attended {
  std::vector<float> output;
  std::vector<float> lse;
};

/// Attention of the queries over the segments of each KV head.
inline Attended attention(const HeadRows& queries, std::uint32_t value_dim,
                          const std::vector<std::vector<AttendSegment>>& segments) {
  const std::vector<std::span<const AttendSegment>> heads(segments.begin(), segments.end());
  const AttendProblem problem{queries, value_dim, 0, nullptr, heads};
  check(problem.validate());
  std::vector<float> workspace(attend_workspace_floats(problem));
  const std::size_t rows = std::size_t{queries.heads} * queries.tokens;
  Attended result{std::vector<float>(rows * value_dim), std::vector<float>(rows)};
  check(attend(problem, workspace, result.output, result.lse, nullptr));
  return result;
}

/// One segment per head: entry i of head h is row index[h][i].
inline std::vector<std::vector<AttendSegment>> gathered(const HeadRows& keys, const HeadRows& values,
                                                        const std::vector<std::vector<std::uint32_t>>& index) {
  std::vector<std::vector<AttendSegment>> segments;
  for (std::uint32_t head = 0; head < keys.heads; ++head) {
    AttendSegment segment{static_cast<std::uint32_t>(index[head].size()), AttendRows::of(keys, head),
                          AttendRows::of(values, head)};
    segment.keys.index = segment.values.index = index[head].data();
    segments.push_back({segment});
  }
  return segments;
}

/// One segment per head: all rows.
inline std::vector<std::vector<AttendSegment>> whole(const HeadRows& keys, const HeadRows& values) {
  std::vector<std::vector<AttendSegment>> segments;
  for (std::uint32_t head = 0; head < keys.heads; ++head) {
    segments.push_back({{keys.tokens, AttendRows::of(keys, head), AttendRows::of(values, head)}});
  }
  return segments;
}

/// Rows [begin, begin + count) of every head.
inline HeadRows rows_from(HeadRows rows, std::uint32_t begin, std::uint32_t count) {
  rows.data += begin * rows.token_stride_bytes;
  rows.tokens = count;
  return rows;
}

}  // namespace kvern::golden
