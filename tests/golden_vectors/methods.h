#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "tests/golden_vectors/backend.h"
#include "tests/golden_vectors/vectors.h"

namespace kvern::golden {

/// The methods of each family, their kernels run on a backend, which is to outlive them.
void add_evict_methods(Methods& methods, const Backend& on);
void add_merge_methods(Methods& methods, const Backend& on);
void add_cluster_methods(Methods& methods, const Backend& on);
void add_quantise_methods(Methods& methods, const Backend& on);
void add_rotate_methods(Methods& methods, const Backend& on);
/// All of those.
inline Methods methods_on(const Backend& on) {
  Methods methods;
  add_evict_methods(methods, on);
  add_merge_methods(methods, on);
  add_cluster_methods(methods, on);
  add_quantise_methods(methods, on);
  add_rotate_methods(methods, on);
  return methods;
}
/// Methods of which no part runs on a device.
void add_host_methods(Methods& methods);

inline Method run_on(void (*method)(CaseRun&, const Backend&), const Backend& on) {
  return [method, &on](CaseRun& run) { method(run, on); };
}

/// Values as a tensor of that many rows.
inline Tensor as_rows(const std::vector<std::uint32_t>& values, std::size_t rows) {
  return Tensor::of<std::uint32_t>(values, {rows, rows == 0 ? 0 : values.size() / rows});
}

/// Preferences of a manifest, where what is no number stands for NaN.
inline std::vector<double> preferences(const nlohmann::json& json) {
  std::vector<double> values;
  for (const auto& value : json) values.push_back(value.is_number() ? value.get<double>() : std::nan(""));
  return values;
}

/// Attention of the queries over the segments of each KV head.
inline Attended attention(const Backend& on, const HeadRows& queries, std::uint32_t value_dim,
                          const std::vector<std::vector<AttendSegment>>& segments) {
  const std::vector<std::span<const AttendSegment>> heads(segments.begin(), segments.end());
  return on.attend({queries, value_dim, 0, nullptr, heads});
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
