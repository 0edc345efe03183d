// A small case of every family of kernels, held against the CPU: what compute-sanitizer, under which kernels take some
// hundred times as long, has the time to watch (tools/gpu_sanitize.sh). Pages are in cuda_page_coder_test.cc.

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "kernels/cuda/key_scores.h"
#include "kernels/cuda/selection.h"
#include "kernels/key_scores.h"
#include "tests/golden_vectors/backend.h"
#include "tests/kernels/device_problem.h"
#include "tests/kernels/evict_samples.h"

namespace kvern {
namespace {

using evict::SampleRows;

class CudaSmall : public CudaTest {
 protected:
  const golden::Backend& cpu = golden::cpu_backend();
  const golden::Backend& cuda = golden::cuda_backend();
};

void expect_near(const std::vector<float>& got, const std::vector<float>& expected, double absolute, double relative) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], expected[i], absolute + relative * std::abs(double{expected[i]})) << "at " << i;
  }
}

/// Rows that take different ways through the kernels.
struct Kind {
  DType dtype;
  std::uint32_t dim;
};
constexpr Kind kKinds[] = {
    {DType::kFloat32, 64}, {DType::kFloat16, 64}, {DType::kBFloat16, 64}, {DType::kBFloat16, 128}};

constexpr std::uint32_t kHeads = 2;
constexpr std::uint32_t kQueryHeads = 6;
/// No multiple of any tile.
constexpr std::uint32_t kTokens = 77;

evict::Observation observation_of(const golden::Backend& on, const Kind& kind) {
  const SampleRows queries(kind.dtype, kQueryHeads, 8, kind.dim, 1);
  const SampleRows keys(kind.dtype, kHeads, kTokens, kind.dim, 2);
  return on.observe(queries.view(), keys.view(), {});
}

TEST_F(CudaSmall, Observe) {
  for (const Kind& kind : kKinds) {
    const evict::Observation expected = observation_of(cpu, kind);
    const evict::Observation got = observation_of(cuda, kind);
    expect_near(got.lse, expected.lse, 1e-4, 1e-5);
    expect_near(got.mean, expected.mean, 1e-6, 2e-4);
    expect_near(got.variance, expected.variance, 1e-8, 5e-4);
    EXPECT_NEAR(got.dispersion, expected.dispersion, 1e-3 + 1e-4 * expected.dispersion);
    EXPECT_NEAR(got.shift, expected.shift, 1e-7 + 5e-4 * expected.shift);
  }
}

TEST_F(CudaSmall, Scores) {
  const evict::Observation seen = observation_of(cpu, kKinds[0]);
  for (const evict::Pooling pooling :
       {evict::Pooling{}, {evict::Pooling::Kind::kMaximum, 7}, {evict::Pooling::Kind::kNone, 1}}) {
    expect_near(cuda.cake_scores(seen, kHeads, evict::kCakeGamma, pooling).values,
                cpu.cake_scores(seen, kHeads, evict::kCakeGamma, pooling).values, 1e-6, 2e-4);
    expect_near(cuda.snapkv_scores(seen, kHeads, pooling).values, cpu.snapkv_scores(seen, kHeads, pooling).values, 1e-6,
                2e-4);
  }
}

TEST_F(CudaSmall, Windows) {
  const evict::Observation seen = observation_of(cpu, kKinds[0]);
  for (const evict::WindowRule rule : {evict::WindowRule{8, 8}, {8, 4}}) {
    expect_near(cuda.window_scores(seen, rule), cpu.window_scores(seen, rule), 1e-7, 1e-5);
  }
}

TEST_F(CudaSmall, KeyScores) {
  for (const Kind& kind : kKinds) {
    const SampleRows keys(kind.dtype, kHeads, kTokens, kind.dim, 3);
    const DeviceRows rows(keys.view());
    const DeviceArray<float> scores(std::size_t{kHeads} * kTokens);
    const DeviceArray<std::byte> scratch(evict::cuda_keydiff_bytes(rows.view()));
    ASSERT_TRUE(evict::cuda_knorm_scores(rows.view(), scores.data(), nullptr));
    expect_near(scores.get(), evict::knorm_scores(keys.view(), nullptr)->values, 2e-6, 1e-5);
    ASSERT_TRUE(evict::cuda_keydiff_scores(rows.view(), scratch.data(), scores.data(), nullptr));
    expect_near(scores.get(), evict::keydiff_scores(keys.view(), nullptr)->values, 2e-6, 1e-5);
  }
}

/// Scores of which many are equal.
evict::TokenScores scores_of(std::uint32_t tokens) {
  evict::TokenScores scores{kHeads, tokens, {}};
  std::mt19937 generator(tokens);
  for (std::uint32_t i = 0; i < kHeads * tokens; ++i) scores.values.push_back(static_cast<float>(generator() % 50));
  return scores;
}

TEST_F(CudaSmall, Select) {
  for (const std::uint32_t tokens : {kTokens, 5000U}) {
    const evict::TokenScores scores = scores_of(tokens);
    EXPECT_EQ(cuda.select_best(scores, tokens / 3, 5), cpu.select_best(scores, tokens / 3, 5));
  }
}

TEST_F(CudaSmall, Gather) {
  for (const std::size_t gap : {std::size_t{0}, std::size_t{3}}) {  // rows at multiples of 16 bytes, and others
    const SampleRows rows(DType::kBFloat16, kHeads, kTokens + 5, 64, 4, gap);
    const evict::Selection selection = cpu.select_best(scores_of(kTokens), 20, 5);
    std::vector<std::byte> expected(evict::gathered_bytes(rows.view(), selection));
    ASSERT_TRUE(evict::gather_rows(rows.view(), selection, expected, nullptr));
    const DeviceRows from(rows.view());
    const DeviceArray<std::uint32_t> kept(selection.tokens);
    const DeviceArray<std::byte> to(expected.size());
    ASSERT_TRUE(evict::cuda_gather_rows(from.view(), kept.data(), 25, to.data(), nullptr));
    EXPECT_EQ(to.get(), expected);
  }
}

/// The parts of merged rows, and what a layer is restored to.
struct Merged {
  Merged(const golden::Backend& on, const Kind& kind) {
    const SampleRows x(kind.dtype, kHeads, kTokens, kind.dim, 5), y(kind.dtype, kHeads, kTokens, kind.dim, 6);
    const std::size_t rows = std::size_t{kHeads} * kTokens;
    directions.resize(rows * kind.dim * dtype_bytes(kind.dtype));
    restored.resize(directions.size());
    for (auto* values : {&x_lengths, &y_lengths, &angles}) values->resize(rows);
    on.merge_layers(x.view(), y.view(), 0.6F,
                    {directions.data(), kind.dtype, x_lengths.data(), y_lengths.data(), angles.data()});
    on.restore_rows(HeadRows::contiguous(directions.data(), kind.dtype, kHeads, kTokens, kind.dim), x_lengths,
                    restored.data());
  }
  bool operator==(const Merged&) const = default;
  std::vector<std::byte> directions, restored;
  std::vector<float> x_lengths, y_lengths, angles;
};

TEST_F(CudaSmall, MergeAndRestore) {
  for (const Kind& kind : kKinds) EXPECT_EQ(Merged(cuda, kind), Merged(cpu, kind));
}

TEST_F(CudaSmall, Cluster) {
  cluster::Options options;
  options.chunk = 32;
  options.recent = 9;
  options.merges = {16, 10};
  for (const Kind& kind : kKinds) {
    const SampleRows keys(kind.dtype, kHeads, kTokens, kind.dim, 7), values(kind.dtype, kHeads, kTokens, kind.dim, 8);
    EXPECT_EQ(cuda.compress(keys.view(), values.view(), options), cpu.compress(keys.view(), values.view(), options));
  }
}

TEST_F(CudaSmall, Rope) {
  rope::Parameters parameters;
  parameters.rotary_dim = 64;
  const auto frequencies = parameters.inverse_frequencies();
  std::vector<std::int64_t> positions(kTokens);
  std::iota(positions.begin(), positions.end(), 1000);
  const rope::Turns turns = cpu.turns_at(frequencies, positions);
  const rope::Turns on_device = cuda.turns_at(frequencies, positions);
  EXPECT_EQ(on_device.cosines, turns.cosines);
  EXPECT_EQ(on_device.sines, turns.sines);
  for (const Kind& kind : kKinds) {
    const SampleRows rows(kind.dtype, kHeads, kTokens, kind.dim, 9);
    EXPECT_EQ(cuda.rotate(rows.view(), turns, rope::Direction::kForward),
              cpu.rotate(rows.view(), turns, rope::Direction::kForward));
  }
}

/// Sections of every form over one plane, K and V, and their rows.
template <typename Form>
void expect_same_sections(const golden::Backend& cuda, const golden::Backend& cpu, const Form& form) {
  const SampleRows rows(form.dtype, 1, form.tokens, form.dim, 10);
  const std::span plane(rows.view().data, rows.view().head_stride_bytes);
  const auto section = cuda.encode(form, plane);
  EXPECT_EQ(section, cpu.encode(form, plane));
  EXPECT_EQ(cuda.decode(form, section), cpu.decode(form, section));
}

int8::Form int8_form(const Kind& kind, bool keys) {
  return {kind.dtype, keys, kTokens, kind.dim, keys ? 64 : int8::Form::channel_group(kind.dim)};
}
quantise::Form quantised_form(const Kind& kind, bool keys, quantise::Kind form) {
  const auto scheme = form == quantise::Kind::kFp8 ? quantise::Scheme::kSymmetric : quantise::Scheme::kAsymmetric;
  return {kind.dtype, keys, kTokens, kind.dim, keys ? 64 : quantise::Form::channel_group(kind.dim, 64), form, scheme};
}

TEST_F(CudaSmall, Int8) {
  for (const Kind& kind : kKinds) {
    for (const bool keys : {true, false}) expect_same_sections(cuda, cpu, int8_form(kind, keys));
  }
}

TEST_F(CudaSmall, Quantise) {
  for (const Kind& kind : kKinds) {
    for (const quantise::Kind form : {quantise::Kind::kFp8, quantise::Kind::kInt4, quantise::Kind::kInt3,
                                      quantise::Kind::kInt2, quantise::Kind::kInt8Residual}) {
      for (const bool keys : {true, false}) expect_same_sections(cuda, cpu, quantised_form(kind, keys, form));
    }
  }
}

void expect_same_attention(const golden::Attended& got, const golden::Attended& expected) {
  expect_near(got.output, expected.output, 2e-5, 0);
  expect_near(got.lse, expected.lse, 2e-5, 0);
}

/// Biases and lengths of kTokens entries.
struct Weights {
  Weights() {
    for (std::uint32_t i = 0; i < kTokens; ++i) {
      bias.push_back(std::log(1.0F + static_cast<float>(i % 5)));
      lengths.push_back(0.25F + static_cast<float>(i % 7) / 4);
    }
  }
  std::vector<float> bias, lengths;
};

TEST_F(CudaSmall, AttendRows) {
  const Weights weights;
  std::vector<std::uint32_t> index(kTokens);
  for (std::uint32_t i = 0; i < kTokens; ++i) index[i] = i * 5 % kTokens;
  for (const Kind& kind : kKinds) {
    const SampleRows queries(kind.dtype, kQueryHeads, 1, kind.dim, 11);
    const SampleRows keys(kind.dtype, kHeads, kTokens, kind.dim, 12), values(kind.dtype, kHeads, kTokens, kind.dim, 13);
    std::vector<std::vector<AttendSegment>> segments;
    for (std::uint32_t head = 0; head < kHeads; ++head) {
      AttendSegment plain{kTokens, AttendRows::of(keys.view(), head), AttendRows::of(values.view(), head)};
      AttendSegment picked = plain;
      picked.keys.index = picked.values.index = index.data();
      picked.values.lengths = weights.lengths.data();
      picked.bias = weights.bias.data();
      segments.push_back({plain, picked});
    }
    const std::vector<std::span<const AttendSegment>> heads(segments.begin(), segments.end());
    const AttendProblem problem{queries.view(), kind.dim, 0, nullptr, heads};
    expect_same_attention(cuda.attend(problem), cpu.attend(problem));
  }
}

/// Attention over K and V as sections, of which the CPU is given the rows that they decode to.
template <typename Form>
void expect_same_over_sections(const golden::Backend& cuda, const golden::Backend& cpu, const Form& key_form,
                               const Form& value_form) {
  const Weights weights;
  const SampleRows queries(key_form.dtype, kQueryHeads, 1, key_form.dim, 14);
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::vector<AttendSegment>> coded(kHeads), decoded(kHeads);
  for (std::uint32_t head = 0; head < kHeads; ++head) {
    AttendSegment of_codes{kTokens, {}, {}, weights.bias.data()};
    AttendSegment of_rows = of_codes;
    for (const Form* form : {&key_form, &value_form}) {
      const SampleRows rows(form->dtype, 1, kTokens, form->dim, 15 + head);
      const auto& section =
          memory.emplace_back(cpu.encode(*form, std::span(rows.view().data, rows.view().head_stride_bytes)));
      (form == &key_form ? of_codes.keys : of_codes.values) = AttendRows::of_section(section.data(), *form);
      const auto& plane = memory.emplace_back(cpu.decode(*form, section));
      (form == &key_form ? of_rows.keys : of_rows.values) =
          AttendRows::of(HeadRows::contiguous(plane.data(), form->dtype, 1, kTokens, form->dim), 0);
    }
    for (AttendSegment* segment : {&of_codes, &of_rows}) segment->values.lengths = weights.lengths.data();
    coded[head] = {of_codes};
    decoded[head] = {of_rows};
  }
  const std::vector<std::span<const AttendSegment>> coded_heads(coded.begin(), coded.end());
  const std::vector<std::span<const AttendSegment>> decoded_heads(decoded.begin(), decoded.end());
  expect_same_attention(cuda.attend({queries.view(), value_form.dim, 0, nullptr, coded_heads}),
                        cpu.attend({queries.view(), value_form.dim, 0, nullptr, decoded_heads}));
}

TEST_F(CudaSmall, AttendSections) {
  for (const Kind& kind : std::span(kKinds).subspan(1)) {  // of 16 bits
    expect_same_over_sections(cuda, cpu, quantised_form(kind, true, quantise::Kind::kInt4),
                              quantised_form(kind, false, quantise::Kind::kInt4));
    expect_same_over_sections(cuda, cpu, int8_form(kind, true), int8_form(kind, false));
  }
}

}  // namespace
}  // namespace kvern
