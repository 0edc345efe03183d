#include "kernels/attend.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "base/executor.h"
#include "kernels/codec_step.h"
#include "tests/kernels/attend_samples.h"
#include "tests/kernels/targets.h"

namespace kvern {

MakeForm make_int8_form;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Attended {
  std::vector<float> output, lse;
};

Attended run(const AttendProblem& problem, Executor* executor = nullptr) {
  std::vector<float> workspace(attend_workspace_floats(problem));
  const std::size_t rows = std::size_t{problem.queries.heads} * problem.queries.tokens;
  Attended result{std::vector<float>(rows * problem.value_dim), std::vector<float>(rows)};
  const Status status = attend(problem, workspace, result.output, result.lse, executor);
  EXPECT_TRUE(status) << status.to_string();
  return result;
}

/// Compares with the definition in double precision.
void expect_defined(const AttendProblem& problem, const Matrix& queries, const std::vector<std::vector<Entry>>& heads,
                    const std::string& what) {
  const Attended got = run(problem);
  const std::size_t group = queries.heads / heads.size();
  for (std::uint32_t head = 0; head < queries.heads; ++head) {
    for (std::uint32_t row = 0; row < queries.tokens; ++row) {
      const std::int64_t position =
          problem.query_positions != nullptr ? problem.query_positions[row] : std::numeric_limits<std::int64_t>::max();
      std::vector<double> output(problem.value_dim);
      double total = 0;
      for (const Entry& entry : heads[head / group]) {
        if (entry.position > position) continue;
        double dot = 0;
        for (std::uint32_t c = 0; c < queries.dim; ++c) dot += entry.key[c] * double{queries.at(head, row, c)};
        const double weight = std::exp(dot / std::sqrt(double(queries.dim)) + entry.bias);
        total += weight;
        for (std::uint32_t c = 0; c < problem.value_dim; ++c) output[c] += weight * entry.value[c];
      }
      const std::size_t at = std::size_t{head} * queries.tokens + row;
      if (total == 0) {
        EXPECT_EQ(got.lse[at], -kInfinity) << what;
        total = 1;
      } else {
        ASSERT_NEAR(got.lse[at], std::log(total), 1e-5) << what << " head " << head << " row " << row;
      }
      for (std::uint32_t c = 0; c < problem.value_dim; ++c) {
        ASSERT_NEAR(got.output[at * problem.value_dim + c], output[c] / total, 1e-5)
            << what << " head " << head << " row " << row << " column " << c;
      }
    }
  }
}

TEST(Attend, IsItsDefinitionOnEveryInstructionSet) {
  const std::vector<std::int32_t> positions = {10, 63, 30};
  for_each_target([&](const char* target) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const std::uint32_t dim : {64U, 80U, 96U, 112U, 128U, 192U, 256U, 2U, 35U}) {
        for (const std::uint32_t group : {1U, 3U, 4U, 7U}) {
          const Matrix queries(dtype, 2 * group, group == 7 ? 1 : 3, dim, dim + group);
          const Cache cache(dtype, 2, dim, dim == 192 ? 128 : dim, {70, 0, 1, 33, 5}, dim);
          AttendProblem problem{queries.rows(), cache.values->dim, 0, positions.data(), cache.heads};
          expect_defined(problem, queries, cache.entries,
                         std::string(target) + " " + std::string(dtype_name(dtype)) + " " + std::to_string(dim));
          if (HasFatalFailure()) return;
        }
      }
    }
  });
}

TEST(Attend, TakesAnyNumberOfEntries) {
  for (const std::uint32_t entries : {1U, 2U, 3U, 4U, 63U, 64U, 65U, 2046U, 2048U, 4100U}) {
    const Matrix queries(DType::kBFloat16, 6, 2, 64, entries);
    const Cache cache(DType::kBFloat16, 2, 64, 64, {entries, entries / 2}, entries);
    expect_defined(
        {queries.rows(), 64, 0, nullptr, cache.heads}, queries,
        [&] {
          auto all = cache.entries;
          for (auto& head : all) {
            for (Entry& entry : head) entry.position = std::numeric_limits<std::int64_t>::min();
          }
          return all;
        }(),
        std::to_string(entries));
  }
}

TEST(Attend, AQueryThatSeesNothingGetsZeros) {
  const Matrix queries(DType::kFloat32, 2, 2, 64, 1);
  const Matrix keys(DType::kFloat32, 1, 5, 64, 2);
  const std::vector<std::int32_t> positions = {3, 4, 5, 6, 7};
  const std::vector<std::int32_t> query_positions = {2, 4};
  const AttendSegment segment{5, AttendRows::of(keys.rows(), 0), AttendRows::of(keys.rows(), 0), nullptr,
                              positions.data()};
  const std::span<const AttendSegment> head(&segment, 1);
  const Attended masked = run({queries.rows(), 64, 0, query_positions.data(), {&head, 1}});
  EXPECT_EQ(masked.lse[0], -kInfinity);
  EXPECT_EQ(masked.output[10], 0.0F);
  EXPECT_TRUE(std::isfinite(masked.lse[1]));
  const std::span<const AttendSegment> nothing;
  const Attended empty = run({queries.rows(), 64, 0, nullptr, {&nothing, 1}});
  EXPECT_EQ(empty.lse, std::vector<float>(4, -kInfinity));
  EXPECT_EQ(empty.output, std::vector<float>(4 * 64, 0.0F));
}

TEST(Attend, GivesTheSameBitsForAnyNumberOfThreads) {
  const Matrix queries(DType::kBFloat16, 8, 3, 128, 1);
  const Cache cache(DType::kBFloat16, 2, 128, 128, {5000, 700, 90}, 3);
  const AttendProblem problem{queries.rows(), 128, 0, nullptr, cache.heads};
  const Attended alone = run(problem);
  ThreadPool pool("attend", 5, 64);
  for (int i = 0; i < 10; ++i) {
    const Attended together = run(problem, &pool);
    ASSERT_EQ(together.output, alone.output);
    ASSERT_EQ(together.lse, alone.lse);
  }
}

TEST(Attend, ReadsRowsOfAFormAsTheyDecode) {
  const auto form = make_int8_form({"int8", {}}).value();
  constexpr std::uint32_t kTokens = 300;
  const Matrix queries(DType::kBFloat16, 4, 1, 128, 1);
  const Matrix keys(DType::kBFloat16, 1, kTokens, 128, 2);
  const Matrix values(DType::kBFloat16, 1, kTokens, 128, 3);
  Matrix decoded_keys = keys;
  Matrix decoded_values = values;
  std::vector<std::unique_ptr<AlignedBytes>> payloads;
  std::vector<PlaneReader> readers;
  for (const auto& [part, from, to] :
       {std::tuple{Part::kKey, &keys, &decoded_keys}, {Part::kValue, &values, &decoded_values}}) {
    const PlaneShape shape{DType::kBFloat16, part, kTokens, 128};
    auto& payload = payloads.emplace_back(std::make_unique<AlignedBytes>(form->max_bytes(shape)));
    const auto size = form->encode(shape, from->bytes, payload->span());
    ASSERT_TRUE(size);
    readers.emplace_back(*form, shape, payload->span().first(*size));
    ASSERT_TRUE(readers.back().read({0, kTokens}, to->bytes.data()));
  }
  std::vector<std::uint32_t> index;
  for (std::uint32_t i = 0; i < kTokens; i += i % 7 == 0 ? 2U : 1U) index.push_back(i);
  for (const bool indexed : {false, true}) {
    const auto entries = indexed ? static_cast<std::uint32_t>(index.size()) : kTokens;
    AttendSegment encoded{entries, AttendRows::of(readers[0], DType::kBFloat16),
                          AttendRows::of(readers[1], DType::kBFloat16)};
    AttendSegment plain{entries, AttendRows::of(decoded_keys.rows(), 0), AttendRows::of(decoded_values.rows(), 0)};
    if (indexed) {
      for (AttendRows* rows : {&encoded.keys, &encoded.values, &plain.keys, &plain.values}) rows->index = index.data();
    }
    const std::span<const AttendSegment> a(&encoded, 1);
    const std::span<const AttendSegment> b(&plain, 1);
    const Attended got = run({queries.rows(), 128, 0, nullptr, {&a, 1}});
    const Attended expected = run({queries.rows(), 128, 0, nullptr, {&b, 1}});
    EXPECT_EQ(got.output, expected.output);
    EXPECT_EQ(got.lse, expected.lse);
  }
}

TEST(Attend, ReportsAReaderThatFails) {
  class Broken final : public RowReader {
    Status read(TokenRange rows, std::byte*) const override {
      return rows.end > 128 ? Status(Code::kCorrupt, "broken") : Status::ok();
    }
  };
  const Broken reader;
  const Matrix queries(DType::kFloat32, 1, 1, 64, 1);
  const AttendSegment segment{200, AttendRows::of(reader, DType::kFloat32), AttendRows::of(reader, DType::kFloat32)};
  const std::span<const AttendSegment> head(&segment, 1);
  const AttendProblem problem{queries.rows(), 64, 0, nullptr, {&head, 1}};
  std::vector<float> workspace(attend_workspace_floats(problem)), output(64), lse(1);
  EXPECT_EQ(attend(problem, workspace, output, lse, nullptr).code(), Code::kCorrupt);
}

TEST(Attend, DoesNotHideWhatIsNotFinite) {
  for_each_target([](const char* target) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const Matrix queries(dtype, 2, 1, 64, 1);
      Matrix keys(dtype, 2, 100, 64, 2);
      const Matrix values(dtype, 2, 100, 64, 3);
      keys.set(40 * 64 + 9, std::numeric_limits<float>::quiet_NaN());
      std::vector<AttendSegment> segments;
      std::vector<std::span<const AttendSegment>> heads;
      for (std::uint32_t head = 0; head < 2; ++head) {
        segments.push_back({100, AttendRows::of(keys.rows(), head), AttendRows::of(values.rows(), head)});
      }
      for (const AttendSegment& segment : segments) heads.emplace_back(&segment, 1);
      const Attended got = run({queries.rows(), 64, 0, nullptr, heads});
      EXPECT_TRUE(std::isnan(got.lse[0]) && std::isnan(got.output[5])) << target;
      EXPECT_TRUE(std::isfinite(got.lse[1]) && std::isfinite(got.output[64 + 5])) << target;
    }
  });
}

TEST(Attend, LargeLogitsNeitherOverflowNorDependOnTheOrder) {
  Matrix queries(DType::kFloat32, 1, 1, 16, 1);
  Matrix keys(DType::kFloat32, 1, 130, 16, 2);
  for (std::size_t c = 0; c < 16; ++c) {
    queries.set(c, 20);
    for (std::size_t t = 0; t < 130; ++t) keys.set(t * 16 + c, t == 129 ? 100.0F : t == 0 ? -100.0F : 1.0F);
  }
  const AttendSegment segment{130, AttendRows::of(keys.rows(), 0), AttendRows::of(keys.rows(), 0)};
  const std::span<const AttendSegment> head(&segment, 1);
  const Attended got = run({queries.rows(), 16, 0, nullptr, {&head, 1}});
  EXPECT_FLOAT_EQ(got.lse[0], 8000);
  EXPECT_FLOAT_EQ(got.output[3], 100);
}

RC_GTEST_PROP(AttendProperty, SegmentsMayBeCutAnywhere, ()) {
  const auto entries = *rc::gen::inRange(1U, 300U);
  const auto cut = *rc::gen::inRange(0U, entries + 1);
  const Matrix queries(DType::kFloat32, 3, 1, 64, 1);
  const Matrix keys(DType::kFloat32, 1, entries, 64, entries);
  const Matrix values(DType::kFloat32, 1, entries, 64, entries + 1);
  const AttendSegment whole{entries, AttendRows::of(keys.rows(), 0), AttendRows::of(values.rows(), 0)};
  AttendSegment parts[2] = {whole, whole};
  parts[0].entries = cut;
  parts[1].entries = entries - cut;
  parts[1].keys.data += cut * parts[1].keys.stride_bytes;
  parts[1].values.data += cut * parts[1].values.stride_bytes;
  const std::span<const AttendSegment> one(&whole, 1);
  const std::span<const AttendSegment> two(parts);
  const Attended a = run({queries.rows(), 64, 0, nullptr, {&one, 1}});
  const Attended b = run({queries.rows(), 64, 0, nullptr, {&two, 1}});
  for (std::size_t i = 0; i < a.output.size(); ++i) RC_ASSERT(std::abs(a.output[i] - b.output[i]) < 1e-5F);
  for (std::size_t i = 0; i < a.lse.size(); ++i) RC_ASSERT(std::abs(a.lse[i] - b.lse[i]) < 1e-5F);
}

TEST(AttendArguments, AreChecked) {
  const Matrix queries(DType::kFloat32, 3, 1, 64, 1);
  const Matrix keys(DType::kFloat32, 2, 4, 64, 1);
  const AttendSegment segment{4, AttendRows::of(keys.rows(), 0), AttendRows::of(keys.rows(), 0)};
  const AttendSegment no_rows{4, {}, {}};
  const std::span<const AttendSegment> good(&segment, 1);
  const std::span<const AttendSegment> bad(&no_rows, 1);
  const std::vector<std::span<const AttendSegment>> two = {good, good};
  EXPECT_EQ((AttendProblem{queries.rows(), 64, 0, nullptr, two}).validate().code(), Code::kInvalid);
  EXPECT_EQ((AttendProblem{queries.rows(), 64, 0, nullptr, {}}).validate().code(), Code::kInvalid);
  EXPECT_EQ((AttendProblem{queries.rows(), 0, 0, nullptr, {&good, 1}}).validate().code(), Code::kInvalid);
  EXPECT_EQ((AttendProblem{queries.rows(), 257, 0, nullptr, {&good, 1}}).validate().code(), Code::kInvalid);
  EXPECT_EQ((AttendProblem{queries.rows(), 64, 0, nullptr, {&bad, 1}}).validate().code(), Code::kInvalid);
  const AttendProblem problem{queries.rows(), 64, 0, nullptr, {&good, 1}};
  EXPECT_TRUE(problem.validate());
  std::vector<float> workspace(attend_workspace_floats(problem) - 1), output(3 * 64), lse(3);
  EXPECT_EQ(attend(problem, workspace, output, lse, nullptr).code(), Code::kInvalid);
}

}  // namespace
}  // namespace kvern
