#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "kernels/cuda/cluster.h"
#include "kernels/cuda/int8.h"
#include "kernels/cuda/merge.h"
#include "kernels/cuda/observation.h"
#include "kernels/cuda/quantise.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/selection.h"
#include "tests/golden_vectors/backend.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/device_problem.h"

namespace kvern::golden {

namespace {

using namespace evict;

/// Waits for the device and takes an array from it.
template <typename T>
void take(const DeviceArray<T>& from, T* to) {
  const std::vector<T> values = from.get();
  std::ranges::copy(values, to);
}

TokenScores pooled_scores(const Observation& observation, std::uint32_t kv_heads, float gamma, const Pooling& pooling) {
  const DeviceArray<float> means(observation.mean);
  const DeviceArray<float> variances(observation.variance);
  const DeviceArray<float> scores(std::size_t{kv_heads} * observation.columns);
  check(cuda_cake_scores(means.data(), gamma == 0 ? nullptr : variances.data(), observation.query_heads, kv_heads,
                         observation.columns, gamma, pooling, scores.data(), nullptr));
  return {kv_heads, observation.columns, scores.get()};
}

/// From the means of `rows` rows.
std::vector<float> scored_windows(const std::vector<float>& means, std::uint32_t heads, std::uint32_t rows,
                                  const WindowRule& rule) {
  const auto columns = static_cast<std::uint32_t>(means.size() / heads);
  const DeviceArray<float> on_device(means);
  const DeviceArray<float> scores(rule.count(columns));
  check(cuda_window_scores(on_device.data(), heads, columns, rows, rule, scores.data(), nullptr));
  return scores.get();
}

// Strides of one plane or section do not matter.
template <typename Form>
std::vector<std::byte> encoded(const Form& form, std::span<const std::byte> plane, auto encode_planes) {
  const DeviceArray<std::byte> from(std::vector<std::byte>(plane.begin(), plane.end()));
  const DeviceArray<std::byte> section(form.section_bytes());
  const DeviceFlag not_finite;
  check(encode_planes(form, from.data(), 0, 1, section.data(), 0, not_finite.pointer(), nullptr));
  if (not_finite.value() != 0) throw std::runtime_error("an element is not finite");
  return section.get();
}

template <typename Form>
std::vector<std::byte> decoded(const Form& form, std::span<const std::byte> section, auto decode_rows) {
  const DeviceArray<std::byte> from(std::vector<std::byte>(section.begin(), section.end()));
  const DeviceArray<std::byte> rows(std::size_t{form.tokens} * form.dim * dtype_bytes(form.dtype));
  const DeviceFlag invalid;
  check(decode_rows(form, from.data(), 0, 1, 0, form.tokens, rows.data(), 0, invalid.pointer(), nullptr));
  if (invalid.value() != 0) throw std::runtime_error("a scale or code is none that encoding makes");
  return rows.get();
}

class CudaBackend final : public Backend {
 public:
  Observation observe(const HeadRows& queries, const HeadRows& keys, const ObservationOptions& options) const override {
    Observation seen;
    seen.query_heads = queries.heads;
    seen.rows = queries.tokens;
    seen.columns = options.columns.value_or(keys.tokens - queries.tokens);
    if (queries.tokens == 0) return seen;  // which the device's kernel does not take
    const DeviceRows device_queries(queries);
    const DeviceRows device_keys(keys);
    const std::size_t statistics = std::size_t{seen.query_heads} * seen.columns;
    const DeviceArray<float> lse(std::size_t{seen.query_heads} * seen.rows), mean(statistics), variance(statistics);
    const DeviceArray<double> totals(2);
    const DeviceArray<std::uint64_t> not_finite(1);
    const DeviceArray<std::byte> scratch(cuda_observation_bytes(device_queries.view(), device_keys.view()));
    check(cuda_observe(device_queries.view(), device_keys.view(), seen.columns,
                       options.scale.value_or(1 / std::sqrt(static_cast<float>(keys.dim))), scratch.data(),
                       {lse.data(), mean.data(), options.dispersion ? variance.data() : nullptr,
                        options.dispersion ? totals.data() : nullptr, not_finite.data()},
                       nullptr));
    seen.lse = lse.get();
    seen.mean = mean.get();
    seen.not_finite = not_finite.get().front();
    if (!options.dispersion) return seen;
    seen.variance = variance.get();
    seen.dispersion = totals.get()[0];
    seen.shift = totals.get()[1];
    return seen;
  }
  TokenScores cake_scores(const Observation& observation, std::uint32_t kv_heads, float gamma,
                          const Pooling& pooling) const override {
    return pooled_scores(observation, kv_heads, gamma, pooling);
  }
  TokenScores snapkv_scores(const Observation& observation, std::uint32_t kv_heads,
                            const Pooling& pooling) const override {
    return pooled_scores(observation, kv_heads, 0, pooling);
  }
  TokenScores decode_scores(const HeadRows& query, const HeadRows& keys, const DecodeRule& rule) const override {
    ObservationOptions options;
    options.columns = keys.tokens - rule.window;
    options.dispersion = false;
    return pooled_scores(observe(query, keys, options), keys.heads, 0, rule.pooling);
  }
  Selection decode_keep(const HeadRows& query, const HeadRows& keys, const DecodeRule& rule) const override {
    return select_best(decode_scores(query, keys, rule), rule.budget, rule.window);
  }
  std::vector<float> window_scores(const Observation& observation, const WindowRule& rule) const override {
    if (observation.columns == 0) return {};
    return scored_windows(observation.mean, observation.query_heads, observation.rows, rule);
  }
  std::vector<float> window_scores(std::span<const float> sums, std::uint32_t heads,
                                   const WindowRule& rule) const override {
    return scored_windows({sums.begin(), sums.end()}, heads, 1, rule);
  }
  Selection select_best(const TokenScores& scores, std::uint32_t count, std::uint32_t tail) const override {
    const std::uint32_t per_head = std::min(count, scores.tokens) + tail;
    const DeviceArray<float> on_device(scores.values);
    const DeviceArray<std::uint32_t> kept(std::size_t{scores.heads} * per_head);
    const DeviceArray<std::byte> scratch(cuda_selection_bytes(scores.heads, scores.tokens));
    check(cuda_select_best(on_device.data(), scores.heads, scores.tokens, count, tail, scratch.data(), kept.data(),
                           nullptr));
    Selection selection;
    selection.tokens = kept.get();
    for (std::uint32_t head = 1; head <= scores.heads; ++head) selection.offsets.push_back(head * per_head);
    return selection;
  }

  void merge_layers(const HeadRows& x, const HeadRows& y, float weight, const merge::MergedRows& out) const override {
    const std::size_t rows = std::size_t{x.heads} * x.tokens;
    const DeviceRows device_x(x);
    const DeviceRows device_y(y);
    const DeviceArray<std::byte> directions(rows * x.dim * dtype_bytes(out.direction_dtype));
    const DeviceArray<float> x_lengths(rows), y_lengths(rows), angles(rows);
    check(merge::cuda_merge_layers(
        device_x.view(), device_y.view(), weight,
        {directions.data(), out.direction_dtype, x_lengths.data(), y_lengths.data(), angles.data()}, nullptr));
    take(directions, out.directions);
    take(x_lengths, out.x_lengths);
    take(y_lengths, out.y_lengths);
    take(angles, out.angles);
  }
  void restore_rows(const HeadRows& directions, std::span<const float> lengths, std::byte* out) const override {
    const DeviceRows on_device(directions);
    const DeviceArray<float> device_lengths(std::vector<float>(lengths.begin(), lengths.end()));
    const DeviceArray<std::byte> rows(lengths.size() * directions.dim * dtype_bytes(directions.dtype));
    check(merge::cuda_restore_rows(on_device.view(), device_lengths.data(), rows.data(), nullptr));
    take(rows, out);
  }
  std::vector<HeadEntries> compress(const HeadRows& keys, const HeadRows& values,
                                    const cluster::Options& options) const override {
    const std::size_t count = std::size_t{keys.heads} * keys.tokens;
    const DeviceRows device_keys(keys);
    const DeviceRows device_values(values);
    const DeviceArray<float> key_rows(count * keys.dim), value_rows(count * values.dim);
    const DeviceArray<cluster::Members> members(count);
    const DeviceArray<std::uint32_t> assignment(count), entries(keys.heads);
    const DeviceArray<std::byte> workspace(
        cluster::cuda_compress_workspace_bytes(device_keys.view(), device_values.view(), options));
    check(
        cluster::cuda_compress(device_keys.view(), device_values.view(), options,
                               {key_rows.data(), value_rows.data(), members.data(), assignment.data(), entries.data()},
                               workspace.data(), nullptr));
    std::vector<HeadEntries> heads;
    for (const std::uint32_t used : entries.get()) {
      const std::size_t first = heads.size() * keys.tokens;
      heads.push_back({used, key_rows.get(first * keys.dim, std::size_t{used} * keys.dim),
                       value_rows.get(first * values.dim, std::size_t{used} * values.dim), members.get(first, used),
                       assignment.get(first, keys.tokens)});
    }
    return heads;
  }

  rope::Turns turns_at(std::span<const double> inverse_frequencies,
                       std::span<const std::int64_t> positions) const override {
    rope::Turns turns{
        static_cast<std::uint32_t>(positions.size()), static_cast<std::uint32_t>(inverse_frequencies.size()), {}, {}};
    const DeviceArray<double> frequencies(std::vector<double>(inverse_frequencies.begin(), inverse_frequencies.end()));
    const DeviceArray<std::int64_t> at(std::vector<std::int64_t>(positions.begin(), positions.end()));
    const DeviceArray<float> cosines(positions.size() * turns.pairs), sines(positions.size() * turns.pairs);
    check(rope::cuda_turns(frequencies.data(), turns.pairs, at.data(), 0, turns.rows, cosines.data(), sines.data(),
                           nullptr));
    turns.cosines = cosines.get();
    turns.sines = sines.get();
    return turns;
  }
  std::vector<float> rotate(const HeadRows& rows, const rope::Turns& turns, rope::Direction direction) const override {
    const DeviceRows on_device(rows);
    const DeviceArray<float> cosines(turns.cosines), sines(turns.sines);
    const DeviceArray<float> out(std::size_t{rows.heads} * rows.tokens * rows.dim);
    check(rope::cuda_rotate(on_device.view(), {turns.rows, turns.pairs, cosines.data(), sines.data()},
                            rope::Style::kNeox, direction, DType::kFloat32, reinterpret_cast<std::byte*>(out.data()),
                            nullptr));
    return out.get();
  }

  std::vector<std::byte> encode(const quantise::Form& form, std::span<const std::byte> plane) const override {
    return encoded(form, plane, quantise::cuda_encode_planes);
  }
  std::vector<std::byte> encode(const int8::Form& form, std::span<const std::byte> plane) const override {
    return encoded(form, plane, int8::cuda_encode_planes);
  }
  std::vector<std::byte> decode(const quantise::Form& form, std::span<const std::byte> section) const override {
    return decoded(form, section, quantise::cuda_decode_rows);
  }
  std::vector<std::byte> decode(const int8::Form& form, std::span<const std::byte> section) const override {
    return decoded(form, section, int8::cuda_decode_rows);
  }

  Attended attend(const AttendProblem& problem) const override {
    auto [output, lse] = DeviceProblem(problem).run();
    return {std::move(output), std::move(lse)};
  }
};

}  // namespace

const Backend& cuda_backend() {
  static const CudaBackend backend;
  return backend;
}

}  // namespace kvern::golden
