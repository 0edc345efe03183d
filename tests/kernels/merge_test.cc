#include "kernels/merge.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "base/executor.h"
#include "kernels/attend.h"
#include "kernels/merge_arithmetic.h"
#include "samples.h"
#include "targets.h"

namespace kvern::merge {
namespace {

using testing::ElementsAre;
using testing::FloatNear;
using testing::Pointwise;

struct Merged {
  std::vector<float> directions;
  std::vector<float> x_lengths;
  std::vector<float> y_lengths;
  std::vector<float> angles;

  bool operator==(const Merged&) const = default;
};

HeadRows view(const std::vector<float>& rows, std::uint32_t dim, std::uint32_t heads = 1) {
  const auto tokens = static_cast<std::uint32_t>(rows.size() / dim / heads);
  return HeadRows::contiguous(reinterpret_cast<const std::byte*>(rows.data()), DType::kFloat32, heads, tokens, dim);
}

Merged merged(const HeadRows& x, const HeadRows& y, float weight = 0.6F, Executor* executor = nullptr) {
  const std::size_t rows = std::size_t{x.heads} * x.tokens;
  Merged out{std::vector<float>(rows * x.dim), std::vector<float>(rows), std::vector<float>(rows),
             std::vector<float>(rows)};
  const Status status = merge_layers(x, y, weight,
                                     {reinterpret_cast<std::byte*>(out.directions.data()), DType::kFloat32,
                                      out.x_lengths.data(), out.y_lengths.data(), out.angles.data()},
                                     executor);
  EXPECT_TRUE(status) << status.to_string();
  return out;
}

Merged merged(const std::vector<float>& x, const std::vector<float>& y, std::uint32_t dim, float weight = 0.6F) {
  return merged(view(x, dim), view(y, dim), weight);
}

std::vector<float> restored(const Merged& pair, const std::vector<float>& lengths, std::uint32_t dim) {
  std::vector<float> rows(pair.directions.size());
  EXPECT_TRUE(restore_rows(view(pair.directions, dim), lengths, reinterpret_cast<std::byte*>(rows.data()), nullptr));
  return rows;
}

std::vector<float> random_rows(std::size_t count, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count);
  for (float& value : rows) value = normal(generator);
  return rows;
}

float distance(std::span<const float> a, std::span<const float> b) {
  float sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

TEST(Merge, M1DirectionAndRestoredRowsOfTwoVectors) {
  const std::vector<float> x = {3, 4, 0, 0};
  const std::vector<float> y = {0, 4, 3, 0};
  const Merged pair = merged(x, y, 4);
  EXPECT_NEAR(pair.angles[0], 0.876298061F, 1e-6F);
  EXPECT_THAT(pair.directions, Pointwise(FloatNear(1e-6F), {0.268139F, 0.880062F, 0.391908F, 0.0F}));
  const std::vector<float> row = {1.340695F, 4.400312F, 1.959539F, 0.0F};
  EXPECT_THAT(restored(pair, pair.x_lengths, 4), Pointwise(FloatNear(3e-6F), row));
  EXPECT_THAT(restored(pair, pair.y_lengths, 4), Pointwise(FloatNear(3e-6F), row));
  EXPECT_NEAR(distance(x, row) / 5, 0.519743559F, 1e-6F);
  EXPECT_NEAR(distance(y, row) / 5, 0.348727558F, 1e-6F);
}

TEST(Merge, M2RightAngleKeepsBothLengths) {
  const Merged pair = merged({2, 0, 0, 0}, {0, 1, 0, 0}, 4);
  EXPECT_THAT(pair.directions, Pointwise(FloatNear(1e-6F), {0.587785F, 0.809017F, 0.0F, 0.0F}));
  EXPECT_THAT(restored(pair, pair.x_lengths, 4), Pointwise(FloatNear(1e-6F), {1.175571F, 1.618034F, 0.0F, 0.0F}));
  EXPECT_THAT(restored(pair, pair.y_lengths, 4), Pointwise(FloatNear(1e-6F), {0.587785F, 0.809017F, 0.0F, 0.0F}));
}

TEST(Merge, M3RetentionKeepsTheTokensThatDifferMost) {
  const std::vector<float> angles = {.10F, .15F, .90F, .20F, .12F, .88F, .11F, .13F};
  EXPECT_THAT(retained_tokens(angles, {.rule = Retention::kRange, .retain = 0.05}), ElementsAre(2, 5));
  EXPECT_THAT(retained_tokens(angles, {.rule = Retention::kTopK, .retain = 0.25}), ElementsAre(2, 5));
}

TEST(Merge, CountOfRetainedTokensIsSnapped) {
  EXPECT_EQ(top_count(140, 0.05), 7U);
  EXPECT_EQ(top_count(1408, 0.05), 71U);
  EXPECT_EQ(top_count(3, 0.05), 1U);
  EXPECT_EQ(top_count(0, 0.05), 0U);
  EXPECT_EQ(top_count(9, 1), 9U);
}

TEST(Merge, M4RotatingByRopeCommutesWithMerging) {
  constexpr std::uint32_t kDim = 64;
  const auto rotated = [](std::vector<float> row, float position) {
    for (std::uint32_t i = 0; i < kDim / 2; ++i) {
      const float angle = position * std::pow(10000.0F, -2.0F * static_cast<float>(i) / kDim);
      const float a = row[i];
      const float b = row[i + kDim / 2];
      row[i] = a * std::cos(angle) - b * std::sin(angle);
      row[i + kDim / 2] = b * std::cos(angle) + a * std::sin(angle);
    }
    return row;
  };
  for (std::uint32_t seed = 0; seed < 20; ++seed) {
    const auto x = random_rows(kDim, seed);
    const auto y = random_rows(kDim, seed + 100);
    const float position = static_cast<float>(seed * 37);
    const Merged before = merged(rotated(x, position), rotated(y, position), kDim);
    const Merged after = merged(x, y, kDim);
    EXPECT_THAT(before.directions, Pointwise(FloatNear(1e-6F), rotated(after.directions, position)));
    EXPECT_NEAR(before.angles[0], after.angles[0], 1e-6F);
  }
}

TEST(Merge, M5LengthOfAQuantisedDirectionIsFoldedAway) {
  const Merged pair = merged({3, 4, 0, 0}, {0, 4, 3, 0}, 4);
  const float step = 0.0586708F;
  const std::vector<float> quantised = {5 * step, 15 * step, 7 * step, 0};
  std::vector<float> x_lengths = pair.x_lengths;
  std::vector<float> y_lengths = pair.y_lengths;
  ASSERT_TRUE(fold_lengths(view(quantised, 4), x_lengths, y_lengths, nullptr));
  EXPECT_NEAR(x_lengths[0], 5 / 1.014513F, 1e-5F);
  EXPECT_NEAR(y_lengths[0], 5 / 1.014513F, 1e-5F);
}

TEST(Merge, M6EqualRowsAreRestored) {
  const auto rows = random_rows(40 * 64, 1);
  const Merged pair = merged(rows, rows, 64);
  EXPECT_THAT(pair.angles, testing::Each(0.0F));
  EXPECT_THAT(restored(pair, pair.x_lengths, 64), Pointwise(FloatNear(2e-6F), rows));
}

TEST(Merge, M6AttentionOverDirectionsAndRetainedRowsEqualsAttentionOverRestoredRows) {
  constexpr std::uint32_t kDim = 64;
  constexpr std::uint32_t kTokens = 50;
  const auto x = random_rows(kTokens * kDim, 2);
  const auto y = random_rows(kTokens * kDim, 3);
  const auto queries = random_rows(2 * kDim, 4);
  const Merged pair = merged(x, y, kDim);
  const auto kept = retained_tokens(pair.angles, {});
  std::vector<float> whole = restored(pair, pair.y_lengths, kDim);
  std::vector<std::uint32_t> shared;
  std::vector<float> lengths;
  for (std::uint32_t token = 0; token < kTokens; ++token) {
    if (std::ranges::binary_search(kept, token)) {
      std::copy_n(y.begin() + token * kDim, kDim, whole.begin() + token * kDim);
    } else {
      shared.push_back(token);
      lengths.push_back(pair.y_lengths[token]);
    }
  }
  const auto attention = [&](std::span<const AttendSegment> segments) {
    const std::span<const AttendSegment> heads[] = {segments};
    const AttendProblem problem{view(queries, kDim), kDim, 0, nullptr, heads};
    std::vector<float> workspace(attend_workspace_floats(problem));
    std::vector<float> output(2 * kDim);
    std::vector<float> lse(2);
    EXPECT_TRUE(attend(problem, workspace, output, lse, nullptr));
    return output;
  };
  AttendRows directions = AttendRows::of(view(pair.directions, kDim), 0);
  directions.index = shared.data();
  directions.lengths = lengths.data();
  AttendRows exact = AttendRows::of(view(y, kDim), 0);
  exact.index = kept.data();
  const AttendSegment folded[] = {{static_cast<std::uint32_t>(shared.size()), directions, directions, nullptr, nullptr},
                                  {static_cast<std::uint32_t>(kept.size()), exact, exact, nullptr, nullptr}};
  const AttendRows rows = AttendRows::of(view(whole, kDim), 0);
  const AttendSegment plain[] = {{kTokens, rows, rows, nullptr, nullptr}};
  EXPECT_THAT(attention(folded), Pointwise(FloatNear(2e-6F), attention(plain)));
}

TEST(Merge, VectorsWithoutADirectionAreForced) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> x = {0, 0, kInfinity, 1, 1, 2, 3, 1e38F, 1, 1e-30F, 1, 1};
  const std::vector<float> y = {1, 1, 1, 1, kNan, 1, -3, -1e38F, 1, 1, 1, 1};
  const Merged pair = merged(x, y, 2);
  EXPECT_THAT(pair.angles, testing::ElementsAre(kPi, kPi, kPi, kPi, testing::Lt(kForcedAngle), FloatNear(0, 1e-6F)));
  EXPECT_THAT(std::span(pair.directions).first(8), testing::Each(0.0F));
  EXPECT_EQ(pair.x_lengths[1], 0);
  EXPECT_EQ(pair.y_lengths[2], 0);
  for (const Retention rule : {Retention::kTopK, Retention::kRange}) {
    EXPECT_THAT(retained_tokens(pair.angles, {.rule = rule, .retain = 0.0}), testing::IsSupersetOf({0, 1, 2, 3}));
  }
}

TEST(Merge, ForcedTokensDoNotStretchTheRange) {
  const std::vector<float> angles = {kPi, 0.5F, 0.1F, 0.49F};
  EXPECT_THAT(retained_tokens(angles, {.rule = Retention::kRange, .retain = 0.05}), ElementsAre(0, 1, 3));
  EXPECT_FLOAT_EQ(mean_angle(angles), (0.5F + 0.1F + 0.49F) / 3);
}

TEST(Merge, EqualAnglesAreRetainedFromTheLowestToken) {
  const std::vector<float> angles(20, 0.5F);
  EXPECT_THAT(retained_tokens(angles, {.rule = Retention::kTopK, .retain = 0.15}), ElementsAre(0, 1, 2));
  EXPECT_THAT(retained_tokens(angles, {.rule = Retention::kRange, .retain = 0.15}), testing::IsEmpty());
}

TEST(Merge, WholeRetentionKeepsEveryToken) {
  EXPECT_EQ(retained_tokens(std::vector<float>(7, 0.1F), {.rule = Retention::kTopK, .retain = 1.0}).size(), 7U);
}

RC_GTEST_PROP(Merge, ErrorIsWhatTheAngleSays, ()) {
  const auto dim = *rc::gen::element(16U, 64U, 80U, 128U, 256U, 6U);
  const auto seed = *rc::gen::inRange(0U, 1000000U);
  const auto weight = static_cast<float>(*rc::gen::inRange(0, 11)) / 10;
  const auto x = random_rows(dim, seed);
  const auto y = random_rows(dim, seed + 1);
  const Merged pair = merged(x, y, dim, weight);
  const auto rx = restored(pair, pair.x_lengths, dim);
  const auto ry = restored(pair, pair.y_lengths, dim);
  const float angle = pair.angles[0];
  RC_ASSERT(std::abs(distance(x, rx) / pair.x_lengths[0] - 2 * std::sin(weight * angle / 2)) < 1e-5F);
  RC_ASSERT(std::abs(distance(y, ry) / pair.y_lengths[0] - 2 * std::sin((1 - weight) * angle / 2)) < 1e-5F);
}

RC_GTEST_PROP(Merge, SameBytesOnEveryInstructionSetAndThreadCount, ()) {
  const auto dim = *rc::gen::element(2U, 16U, 64U, 112U, 256U);
  const auto heads = *rc::gen::inRange(1U, 4U);
  const auto tokens = *rc::gen::element(1U, 15U, 16U, 17U, 300U);
  const auto seed = *rc::gen::inRange(0U, 1000000U);
  const DType dtype = *rc::gen::element(DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  const auto x = sample_canonical({dtype, 0, 1, 0, heads, tokens, dim, 0}, seed);
  const auto y = sample_canonical({dtype, 0, 1, 0, heads, tokens, dim, 0}, seed + 1);
  const auto rows = [&](const Bytes& bytes) { return HeadRows::contiguous(bytes.data(), dtype, heads, tokens, dim); };
  std::vector<Merged> results;
  for_each_target([&](const char*) { results.push_back(merged(rows(x), rows(y))); });
  ThreadPool pool("merge", 3, 64);
  results.push_back(merged(rows(x), rows(y), 0.6F, &pool));
  std::vector<float> angles(std::size_t{heads} * tokens);
  RC_ASSERT(bool(measure_angles(rows(x), rows(y), angles, nullptr)));
  RC_ASSERT(angles == results[0].angles);
  for (const Merged& result : results) RC_ASSERT(result == results[0]);
}

TEST(Merge, ScalarArithmeticIsThatOfVectors) {
  for (std::uint32_t seed = 0; seed < 50; ++seed) {
    const auto x = random_rows(2, seed);
    const auto y = random_rows(2, seed + 50);
    const Merged pair = merged(x, y, 2);
    const float nx = 1.0F / std::sqrt(x[0] * x[0] + x[1] * x[1]);
    const float ny = 1.0F / std::sqrt(y[0] * y[0] + y[1] * y[1]);
    const auto square = [](float a, float b) { return a * a + b * b; };
    const float difference = square(x[0] * nx - y[0] * ny, x[1] * nx - y[1] * ny);
    const float sum = square(x[0] * nx + y[0] * ny, x[1] * nx + y[1] * ny);
    const float angle = angle_between<ScalarOps>(difference, sum);
    EXPECT_FLOAT_EQ(pair.angles[0], angle);
    const auto weights = slerp_weights<ScalarOps>(difference, sum, angle, 0.6F);
    EXPECT_NEAR(pair.directions[0], weights.x * nx * x[0] + weights.y * ny * y[0], 2e-6F);
  }
}

TEST(Merge, StridedRowsAreReadWhereTheyLie) {
  const auto x = random_rows(2 * 10 * 16, 5);
  const auto y = random_rows(2 * 10 * 16, 6);
  // The same numbers as [token][head][dim].
  const auto turned = [](const std::vector<float>& rows) {
    std::vector<float> out(rows.size());
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t token = 0; token < 10; ++token) {
        std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>((head * 10 + token) * 16), 16,
                    out.begin() + static_cast<std::ptrdiff_t>((token * 2 + head) * 16));
      }
    }
    return out;
  };
  const auto tx = turned(x);
  const auto ty = turned(y);
  const auto strided = [](const std::vector<float>& rows) {
    return HeadRows{reinterpret_cast<const std::byte*>(rows.data()), DType::kFloat32, 2, 10, 16, 64, 128};
  };
  EXPECT_EQ(merged(strided(tx), strided(ty)), merged(view(x, 16, 2), view(y, 16, 2)));
}

TEST(Merge, LayersOfDifferentShapeAreRefused) {
  const std::vector<float> rows(64);
  std::vector<float> angles(4);
  EXPECT_EQ(measure_angles(view(rows, 16), view(rows, 32), angles, nullptr).code(), Code::kInvalid);
  HeadRows half = view(rows, 16);
  half.dtype = DType::kFloat16;
  EXPECT_EQ(measure_angles(view(rows, 16), half, angles, nullptr).code(), Code::kInvalid);
  EXPECT_EQ(measure_angles(view(rows, 16), view(rows, 16), std::span(angles).first(3), nullptr).code(), Code::kInvalid);
  HeadRows wide = view(rows, 16);
  wide.dim = kMaxDim + 1;
  EXPECT_EQ(measure_angles(wide, wide, angles, nullptr).code(), Code::kInvalid);
}

TEST(Merge, OptionsThatMakeNoSenseAreRefused) {
  EXPECT_TRUE(Options{}.validate());
  EXPECT_EQ((Options{.weight = 1.5F}).validate().code(), Code::kInvalid);
  EXPECT_EQ((Options{.retain = -0.1}).validate().code(), Code::kInvalid);
  EXPECT_TRUE(StreamingOptions{}.validate());
  EXPECT_EQ((StreamingOptions{.block_tokens = 0}).validate().code(), Code::kInvalid);
}

TEST(Merge, StreamMergesWholeBlocksBeforeTheRecentTail) {
  const StreamingOptions options{.recent_tokens = 10, .block_tokens = 4};
  EXPECT_FALSE(next_block(options, 0, 13).has_value());
  const auto first = next_block(options, 0, 18);
  ASSERT_TRUE(first.has_value());
  EXPECT_EQ(first->begin, 0U);
  EXPECT_EQ(first->end, 4U);
  EXPECT_EQ(next_block(options, 4, 18)->end, 8U);
  EXPECT_FALSE(next_block(options, 8, 18).has_value());
}

}  // namespace
}  // namespace kvern::merge
