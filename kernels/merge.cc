#include "kernels/merge.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "base/parallel.h"
#include "kernels/cpu/merge.h"
#include "kernels/merge_arithmetic.h"

namespace kvern::merge {
namespace {

/// Rows per task: enough to hide what a task costs, few enough to share one head among threads.
constexpr std::uint32_t kTaskRows = 256;

Status check_rows(const HeadRows& rows) {
  if (rows.dtype == DType::kOpaqueBytes) return {Code::kInvalid, "opaque bytes have no direction"};
  if (rows.dim == 0 || rows.dim > kMaxDim) {
    return {Code::kInvalid,
            "merging takes head dimensions of 1 to " + std::to_string(kMaxDim) + ", not " + std::to_string(rows.dim)};
  }
  return Status::ok();
}

Status check_pair(const HeadRows& x, const HeadRows& y) {
  if (x.dtype != y.dtype || x.heads != y.heads || x.tokens != y.tokens || x.dim != y.dim) {
    return {Code::kInvalid, "layers that are merged must have the same dtype, heads, tokens and dimension"};
  }
  return check_rows(x);
}

std::size_t row_count(const HeadRows& rows) { return std::size_t{rows.heads} * rows.tokens; }

/// body(head, first token, count), over all rows.
template <typename Body>
void for_each_task(const HeadRows& rows, Executor* executor, Body body) {
  const std::size_t pieces = (rows.tokens + kTaskRows - 1) / kTaskRows;
  parallel_for(executor, pieces * rows.heads, [&](std::size_t task) {
    const auto head = static_cast<std::uint32_t>(task / pieces);
    const auto token = static_cast<std::uint32_t>(task % pieces) * kTaskRows;
    body(head, token, std::min(kTaskRows, rows.tokens - token));
  });
}

std::size_t index_of(const HeadRows& rows, std::uint32_t head, std::uint32_t token) {
  return std::size_t{head} * rows.tokens + token;
}

}  // namespace

Status Options::validate() const {
  if (!(weight >= 0 && weight <= 1)) return {Code::kInvalid, "merging: the weight must be 0 to 1"};
  if (!(retain >= 0 && retain <= 1)) return {Code::kInvalid, "merging: the retained share must be 0 to 1"};
  return Status::ok();
}

Status StreamingOptions::validate() const {
  return block_tokens > 0 ? Status::ok() : Status{Code::kInvalid, "merging: a block has at least one token"};
}

Status measure_angles(const HeadRows& x, const HeadRows& y, std::span<float> angles, Executor* executor) {
  if (Status status = check_pair(x, y); !status) return status;
  if (angles.size() != row_count(x)) return {Code::kInvalid, "merging: there must be one angle per row"};
  for_each_task(x, executor, [&](std::uint32_t head, std::uint32_t token, std::uint32_t count) {
    measure_rows(Rows::of(x, head, token, count), Rows::of(y, head, token, count),
                 angles.data() + index_of(x, head, token));
  });
  return Status::ok();
}

Status merge_layers(const HeadRows& x, const HeadRows& y, float weight, const MergedRows& out, Executor* executor) {
  if (Status status = check_pair(x, y); !status) return status;
  if (out.direction_dtype == DType::kOpaqueBytes) return {Code::kInvalid, "directions cannot be opaque bytes"};
  const std::size_t row_bytes = x.dim * dtype_bytes(out.direction_dtype);
  for_each_task(x, executor, [&](std::uint32_t head, std::uint32_t token, std::uint32_t count) {
    const std::size_t at = index_of(x, head, token);
    merge_rows(Rows::of(x, head, token, count), Rows::of(y, head, token, count), weight,
               {out.directions + at * row_bytes, out.direction_dtype, out.x_lengths + at, out.y_lengths + at,
                out.angles + at});
  });
  return Status::ok();
}

std::uint32_t top_count(std::size_t tokens, double retain) {
  // Snapped, since 0.05 * 140 in binary lies above 7.
  const double count = std::ceil(retain * static_cast<double>(tokens) - 1e-6);
  return static_cast<std::uint32_t>(std::clamp(count, tokens == 0 ? 0.0 : 1.0, static_cast<double>(tokens)));
}

std::vector<std::uint32_t> retained_tokens(std::span<const float> angles, const Options& options) {
  const auto tokens = static_cast<std::uint32_t>(angles.size());
  std::vector<std::uint32_t> kept;
  if (options.rule == Retention::kTopK) {
    const std::uint32_t count = top_count(tokens, options.retain);
    std::vector<std::uint32_t> order(tokens);
    std::iota(order.begin(), order.end(), 0U);
    const auto before = [&](std::uint32_t a, std::uint32_t b) {
      return angles[a] != angles[b] ? angles[a] > angles[b] : a < b;
    };
    if (count < tokens) std::nth_element(order.begin(), order.begin() + count, order.end(), before);
    kept.assign(order.begin(), order.begin() + count);
    for (auto other = order.begin() + count; other != order.end(); ++other) {
      if (is_forced(angles[*other])) kept.push_back(*other);
    }
    std::ranges::sort(kept);
    return kept;
  }
  float low = kPi;
  float high = 0;
  for (const float angle : angles) {
    if (is_forced(angle)) continue;
    low = std::min(low, angle);
    high = std::max(high, angle);
  }
  const float limit = high - static_cast<float>(options.retain) * (high - low);
  for (std::uint32_t token = 0; token < tokens; ++token) {
    if (angles[token] > limit || is_forced(angles[token])) kept.push_back(token);
  }
  return kept;
}

float mean_angle(std::span<const float> angles) {
  double sum = 0;
  std::size_t count = 0;
  for (const float angle : angles) {
    if (is_forced(angle)) continue;
    sum += static_cast<double>(angle);
    ++count;
  }
  return count == 0 ? 0.0F : static_cast<float>(sum / static_cast<double>(count));
}

Status restore_rows(const HeadRows& directions, std::span<const float> lengths, std::byte* out, Executor* executor) {
  if (Status status = check_rows(directions); !status) return status;
  if (lengths.size() != row_count(directions)) return {Code::kInvalid, "merging: there must be one length per row"};
  const std::size_t row_bytes = directions.dim * dtype_bytes(directions.dtype);
  for_each_task(directions, executor, [&](std::uint32_t head, std::uint32_t token, std::uint32_t count) {
    const std::size_t at = index_of(directions, head, token);
    scale_rows(Rows::of(directions, head, token, count), lengths.data() + at, out + at * row_bytes);
  });
  return Status::ok();
}

Status fold_lengths(const HeadRows& directions, std::span<float> x_lengths, std::span<float> y_lengths,
                    Executor* executor) {
  if (Status status = check_rows(directions); !status) return status;
  if (x_lengths.size() != row_count(directions) || y_lengths.size() != x_lengths.size()) {
    return {Code::kInvalid, "merging: there must be one length per row"};
  }
  for_each_task(directions, executor, [&](std::uint32_t head, std::uint32_t token, std::uint32_t count) {
    float lengths[kTaskRows];
    row_lengths(Rows::of(directions, head, token, count), lengths);
    const std::size_t at = index_of(directions, head, token);
    for (std::uint32_t row = 0; row < count; ++row) {
      if (!(lengths[row] * lengths[row] >= kMinSquaredLength)) continue;
      x_lengths[at + row] /= lengths[row];
      y_lengths[at + row] /= lengths[row];
    }
  });
  return Status::ok();
}

std::optional<TokenRange> next_block(const StreamingOptions& options, std::uint32_t merged, std::uint32_t tokens) {
  const std::uint64_t end = std::uint64_t{merged} + options.block_tokens;
  if (end + options.recent_tokens > tokens) return std::nullopt;
  return TokenRange{merged, static_cast<std::uint32_t>(end)};
}

}  // namespace kvern::merge
