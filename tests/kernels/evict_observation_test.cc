#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "base/executor.h"
#include "kernels/decode_eviction.h"
#include "kernels/heavy_hitters.h"
#include "tests/kernels/evict_samples.h"
#include "tests/kernels/targets.h"

namespace kvern::evict {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void expect_near(const std::vector<float>& got, const std::vector<double>& expected, double absolute, double relative,
                 const std::string& what) {
  ASSERT_EQ(got.size(), expected.size()) << what;
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], expected[i], absolute + relative * std::abs(expected[i])) << what << " at " << i;
  }
}

void expect_observation(const Observation& got, const ExpectedObservation& expected, const std::string& what) {
  expect_near(got.lse, expected.lse, 1e-5, 1e-6, what + " lse");
  expect_near(got.mean, expected.mean, 1e-8, 2e-5, what + " mean");
  expect_near(got.variance, expected.variance, 1e-11, 1e-4, what + " variance");
  EXPECT_NEAR(got.dispersion, expected.dispersion, 1e-4 + 1e-5 * std::abs(expected.dispersion)) << what;
  EXPECT_NEAR(got.shift, expected.shift, 1e-8 + 1e-4 * expected.shift) << what;
  EXPECT_EQ(got.not_finite, 0U) << what;
}

struct Shape {
  std::uint32_t query_heads, kv_heads, rows, tokens, dim;
};

const std::vector<Shape> kShapes = {{4, 2, 8, 40, 64},  {9, 3, 32, 200, 64}, {4, 4, 16, 97, 80},   {5, 1, 17, 530, 96},
                                    {8, 2, 1, 60, 112}, {6, 2, 33, 49, 128}, {2, 1, 4, 1000, 192}, {2, 2, 20, 64, 256},
                                    {1, 1, 48, 49, 16}, {3, 1, 5, 5, 64},    {2, 1, 8, 9, 8},      {2, 1, 3, 50, 35}};

TEST(Observation, IsItsDefinitionOnEveryTargetForEveryTypeAndShape) {
  for_each_target([](const char* target) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const Shape& s : kShapes) {
        const SampleRows queries(dtype, s.query_heads, s.rows, s.dim, 1);
        const SampleRows keys(dtype, s.kv_heads, s.tokens, s.dim, 2);
        const std::string what = std::string(target) + " " + std::string(dtype_name(dtype)) + " " +
                                 std::to_string(s.tokens) + " x " + std::to_string(s.dim);
        expect_observation(observed(queries.view(), keys.view()), ExpectedObservation(queries, keys, s.tokens - s.rows),
                           what);
      }
    }
  });
}

TEST(Observation, ReadsRowsWithGapsAndWithoutAlignment) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const SampleRows queries(dtype, 6, 12, 64, 3, 5);
    const SampleRows keys(dtype, 3, 150, 64, 4, 7);
    expect_observation(observed(queries.view(), keys.view()), ExpectedObservation(queries, keys, 138), "gaps");
  }
}

TEST(Observation, TakesOtherScalesAndColumns) {
  const SampleRows queries(DType::kFloat32, 2, 8, 64, 3);
  const SampleRows keys(DType::kFloat32, 1, 100, 64, 4);
  expect_observation(observed(queries.view(), keys.view(), {.columns = 100, .scale = 0.25F}),
                     ExpectedObservation(queries, keys, 100, 0.25), "all columns");
  expect_observation(observed(queries.view(), keys.view(), {.columns = 10, .scale = {}}),
                     ExpectedObservation(queries, keys, 10), "ten columns");
}

TEST(Observation, WithoutDispersionHasTheSameMeans) {
  const SampleRows queries(DType::kBFloat16, 4, 16, 64, 3);
  const SampleRows keys(DType::kBFloat16, 2, 300, 64, 4);
  const Observation full = observed(queries.view(), keys.view());
  const Observation means = observed(queries.view(), keys.view(), {.columns = {}, .scale = {}, .dispersion = false});
  EXPECT_EQ(means.mean, full.mean);
  EXPECT_EQ(means.lse, full.lse);
  EXPECT_TRUE(means.variance.empty());
  EXPECT_EQ(means.shift, 0);
  EXPECT_EQ(means.dispersion, 0);
}

TEST(Observation, IsTheSameBitForBitWhateverTheThreadsAndTheWorkspaceBefore) {
  const SampleRows queries(DType::kBFloat16, 6, 20, 64, 3);
  const SampleRows keys(DType::kBFloat16, 2, 2100, 64, 4);
  const Observation alone = observed(queries.view(), keys.view());
  for (const std::size_t threads : {1U, 3U}) {
    ThreadPool pool("test", threads, 64);
    ObservationWorkspace workspace;
    Observation out;
    const SampleRows other(DType::kFloat32, 8, 40, 128, 9);
    ASSERT_TRUE(observe(other.view(), other.view(), {}, workspace, &pool, out));
    ASSERT_TRUE(observe(queries.view(), keys.view(), {}, workspace, &pool, out));
    EXPECT_EQ(out.lse, alone.lse);
    EXPECT_EQ(out.mean, alone.mean);
    EXPECT_EQ(out.variance, alone.variance);
    EXPECT_EQ(out.dispersion, alone.dispersion);
    EXPECT_EQ(out.shift, alone.shift);
  }
}

TEST(Observation, OfMoreRowsThanATileHoldsIsTheSame) {
  // 40,000 columns of 224 rows do not fit one tile, so that the heads go one by one.
  const SampleRows queries(DType::kBFloat16, 2, 224, 16, 3);
  const SampleRows keys(DType::kBFloat16, 1, 40000, 16, 4);
  const Observation both = observed(queries.view(), keys.view());
  HeadRows second = queries.view();
  second.data = second.row(1, 0);
  second.heads = 1;
  const Observation alone = observed(second, keys.view());
  EXPECT_TRUE(std::equal(alone.mean.begin(), alone.mean.end(), both.mean_of(1)));
  EXPECT_TRUE(std::equal(alone.variance.begin(), alone.variance.end(), both.variance_of(1)));
}

TEST(Observation, EqualKeysHaveEqualStatisticsWhereverTheyStand) {
  for_each_target([](const char* target) {
    const SampleRows queries(DType::kFloat32, 2, 24, 64, 3);
    SampleRows keys(DType::kFloat32, 1, 1500, 64, 4);
    // The key is one that few rows care for, next to ones that they do.
    for (const std::size_t token : {0U, 47U, 48U, 700U, 1475U}) keys.set_row(0, token, 0.01F);
    for (std::uint32_t i = 0; i < 64; ++i) keys.set(0, 600, i, 4 * queries.at(0, 3, i));
    const Observation seen = observed(queries.view(), keys.view());
    for (std::size_t head = 0; head < 2; ++head) {
      for (const std::size_t token : {47U, 48U, 700U, 1475U}) {
        EXPECT_EQ(seen.mean_of(head)[token], seen.mean_of(head)[0]) << target << " " << token;
        EXPECT_EQ(seen.variance_of(head)[token], seen.variance_of(head)[0]) << target << " " << token;
      }
    }
  });
}

TEST(Observation, SurvivesLogitsOfEverySize) {
  for (const float size : {1e-20F, 1.0F, 30.0F, 1e4F, 1e9F, 1e17F}) {
    SampleRows queries(DType::kFloat32, 2, 8, 64, 3);
    const SampleRows keys(DType::kFloat32, 1, 700, 64, 4);
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t row = 0; row < 8; ++row) {
        for (std::uint32_t i = 0; i < 64; ++i) queries.set(head, row, i, size * queries.at(head, row, i));
      }
    }
    const Observation seen = observed(queries.view(), keys.view());
    double total = 0;
    for (const float mean : seen.mean) {
      ASSERT_TRUE(mean >= 0 && mean <= 1.0001F) << size;
      total += static_cast<double>(mean);
    }
    EXPECT_LE(total, 2.001) << size;
    EXPECT_TRUE(std::isfinite(seen.dispersion) && seen.dispersion >= 0) << size;
    EXPECT_EQ(seen.not_finite, 0U) << size;
  }
}

TEST(Observation, ADamagedKeyCostsItselfAlone) {
  for (const float damage : {kNaN, kInfinity, -kInfinity}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      const SampleRows queries(dtype, 4, 8, 64, 3);
      SampleRows keys(dtype, 2, 200, 64, 4);
      keys.set(1, 60, 17, damage);
      const Observation seen = observed(queries.view(), keys.view());
      EXPECT_EQ(seen.not_finite, 2U * 8U);
      EXPECT_EQ(seen.mean_of(2)[60], 0);
      EXPECT_EQ(seen.variance_of(3)[60], 0);
      for (const float mean : seen.mean) ASSERT_TRUE(std::isfinite(mean));
      EXPECT_GT(seen.mean_of(2)[61], 0);
      // As if the key were far from every query.
      double of_row = 0;
      for (std::size_t j = 0; j < 192; ++j) of_row += static_cast<double>(seen.mean_of(2)[j]);
      EXPECT_GT(of_row, 0.5);
      EXPECT_TRUE(std::isfinite(seen.dispersion) && std::isfinite(seen.shift));
    }
  }
}

TEST(Observation, ADamagedQueryContributesNothing) {
  SampleRows queries(DType::kFloat32, 1, 4, 64, 3);
  const SampleRows keys(DType::kFloat32, 1, 50, 64, 4);
  queries.set(0, 2, 0, kNaN);
  const Observation seen = observed(queries.view(), keys.view());
  EXPECT_EQ(seen.lse[2], -kInfinity);
  EXPECT_TRUE(std::isfinite(seen.lse[1]) && std::isfinite(seen.lse[3]));
  EXPECT_EQ(seen.not_finite, 50U);
  for (const float mean : seen.mean) EXPECT_TRUE(std::isfinite(mean));
}

TEST(Observation, EqualRowsHaveNoVariance) {
  SampleRows queries(DType::kFloat32, 2, 32, 64, 3);
  for (std::size_t head = 0; head < 2; ++head) {
    for (std::size_t row = 0; row < 32; ++row) queries.set_row(head, row, 0);
  }
  const SampleRows keys(DType::kFloat32, 1, 500, 64, 4);
  // All logits are 0; rows see different numbers of keys of the window, which are left out here.
  const Observation seen = observed(queries.view(), keys.view());
  for (std::size_t j = 1; j < seen.columns; ++j) ASSERT_EQ(seen.mean[j], seen.mean[0]);
  EXPECT_LT(seen.shift, 1e-5);
}

TEST(Observation, OfNoRowsOrNoColumnsIsEmpty) {
  for (const std::uint32_t tokens : {0U, 1U, 7U, 8U, 9U}) {
    const std::uint32_t rows = std::min(tokens, 8U);
    const SampleRows queries(DType::kFloat32, 2, rows, 64, 3);
    const SampleRows keys(DType::kFloat32, 1, tokens, 64, 4);
    const Observation seen = observed(queries.view(), keys.view());
    EXPECT_EQ(seen.columns, tokens - rows);
    EXPECT_EQ(seen.mean.size(), 2 * (tokens - rows));
    EXPECT_EQ(seen.lse.size(), 2 * rows);
  }
}

TEST(Observation, RefusesWhatDoesNotFit) {
  const SampleRows queries(DType::kFloat32, 4, 8, 64);
  const SampleRows keys(DType::kFloat32, 2, 40, 64);
  ObservationWorkspace workspace;
  Observation out;
  const auto code = [&](HeadRows q, HeadRows k, const ObservationOptions& options = {}) {
    return observe(q, k, options, workspace, nullptr, out).code();
  };
  EXPECT_EQ(code(queries.view(), SampleRows(DType::kFloat32, 2, 40, 32).view()), Code::kInvalid);
  EXPECT_EQ(code(queries.view(), SampleRows(DType::kFloat32, 3, 40, 64).view()), Code::kInvalid);
  EXPECT_EQ(code(queries.view(), SampleRows(DType::kFloat32, 2, 7, 64).view()), Code::kInvalid);
  EXPECT_EQ(code(queries.view(), keys.view(), {.columns = 41, .scale = {}}), Code::kInvalid);
  HeadRows opaque = keys.view();
  opaque.dtype = DType::kOpaqueBytes;
  EXPECT_EQ(code(queries.view(), opaque), Code::kInvalid);
  HeadRows none = keys.view();
  none.heads = 0;
  EXPECT_EQ(code(queries.view(), none), Code::kInvalid);
}

RC_GTEST_PROP(ObservationProperty, RowsOfAttentionSumToOneOverAllKeys, ()) {
  const auto kv_heads = *rc::gen::inRange(1U, 3U);
  const auto sharing = *rc::gen::inRange(1U, 4U);
  const auto rows = *rc::gen::inRange(1U, 20U);
  const auto tokens = rows + *rc::gen::inRange(0U, 600U);
  const SampleRows queries(DType::kBFloat16, kv_heads * sharing, rows, 32, tokens);
  const SampleRows keys(DType::kBFloat16, kv_heads, tokens, 32, rows);
  const Observation seen = observed(queries.view(), keys.view(), {.columns = tokens, .scale = {}});
  for (std::size_t head = 0; head < kv_heads * sharing; ++head) {
    double sum = 0;
    for (std::size_t j = 0; j < tokens; ++j) sum += static_cast<double>(seen.mean_of(head)[j]);
    RC_ASSERT(std::abs(sum - 1) < 1e-5);
  }
}

TEST(HeavyHitters, AreTheColumnSumsOfTheWholeCausalAttention) {
  const SampleRows queries(DType::kFloat32, 4, 150, 32, 3);
  const SampleRows keys(DType::kFloat32, 2, 150, 32, 4);
  ObservationWorkspace workspace;
  const auto sums = heavy_hitter_scores(queries.view(), keys.view(), ColumnSum::kSum, workspace, nullptr);
  const auto means = heavy_hitter_scores(queries.view(), keys.view(), ColumnSum::kMean, workspace, nullptr);
  ASSERT_TRUE(sums && means);
  const ExpectedObservation expected(queries, keys, 150);
  for (std::size_t head = 0; head < 2; ++head) {
    for (std::size_t j = 0; j < 150; ++j) {
      const double sum = 150 * (expected.mean[2 * head * 150 + j] + expected.mean[(2 * head + 1) * 150 + j]) / 2;
      EXPECT_NEAR(sums->of(head)[j], sum, 1e-4 * sum);
      EXPECT_NEAR(means->of(head)[j], sum / static_cast<double>(150 - j), 1e-4 * sum);
    }
  }
}

TEST(HeavyHitters, DecodedRowsAddUpToThePromptsSums) {
  const SampleRows queries(DType::kFloat32, 2, 40, 32, 3);
  const SampleRows keys(DType::kFloat32, 1, 40, 32, 4);
  const auto first = [](const HeadRows& rows, std::uint32_t begin, std::uint32_t end) {
    HeadRows part = rows;
    part.data = rows.row(0, begin);
    part.tokens = end - begin;
    return part;
  };
  ObservationWorkspace workspace;
  const auto whole = heavy_hitter_scores(queries.view(), keys.view(), ColumnSum::kSum, workspace, nullptr);
  auto sums =
      heavy_hitter_scores(first(queries.view(), 0, 33), first(keys.view(), 0, 33), ColumnSum::kSum, workspace, nullptr);
  for (std::uint32_t token = 33; token < 40; ++token) {
    sums->values.push_back(0);
    ++sums->tokens;
    ASSERT_TRUE(add_heavy_hitter_row(first(queries.view(), token, token + 1), first(keys.view(), 0, token + 1),
                                     workspace, nullptr, *sums));
  }
  for (std::size_t j = 0; j < 40; ++j) EXPECT_NEAR(sums->values[j], whole->values[j], 1e-5);
}

TEST(HeavyHitters, KeepTheBestBeforeTheRecentOnes) {
  const TokenScores sums{2, 6, {.5F, .1F, .9F, .2F, 7, 8, .1F, .2F, .3F, .4F, 0, 0}};
  const auto kept = select_heavy_and_recent(sums, 2, 2, nullptr);
  EXPECT_EQ(kept->tokens, (std::vector<std::uint32_t>{0, 2, 4, 5, 2, 3, 4, 5}));
  const auto all = select_heavy_and_recent(sums, 2, 9, nullptr);
  EXPECT_EQ(all->of(1).size(), 6U);
}

TEST(HeavyHitters, RefuseWhatDoesNotFit) {
  const SampleRows queries(DType::kFloat32, 2, 8, 32);
  const SampleRows keys(DType::kFloat32, 1, 9, 32);
  ObservationWorkspace workspace;
  EXPECT_FALSE(heavy_hitter_scores(queries.view(), keys.view(), ColumnSum::kSum, workspace, nullptr));
  TokenScores sums{1, 9, std::vector<float>(9)};
  EXPECT_EQ(add_heavy_hitter_row(queries.view(), keys.view(), workspace, nullptr, sums).code(), Code::kInvalid);
}

TEST(DecodeRule, KeepsAllWhileItFitsAndThenTheBestAndTheWindow) {
  const SampleRows query(DType::kFloat32, 4, 1, 64, 3);
  const SampleRows keys(DType::kFloat32, 2, 21, 64, 4);
  ObservationWorkspace workspace;
  DecodeRule rule;
  rule.window = 8;
  rule.budget = 13;
  const auto all = decode_keep(query.view(), keys.view(), rule, workspace, nullptr);
  EXPECT_EQ(all->of(0).size(), 21U);
  rule.budget = 12;
  const auto cut = decode_keep(query.view(), keys.view(), rule, workspace, nullptr);
  EXPECT_EQ(cut->of(0).size(), 20U);
  EXPECT_EQ(cut->of(1).back(), 20U);
  const auto scores = decode_scores(query.view(), keys.view(), rule, workspace, nullptr);
  for (std::size_t head = 0; head < 2; ++head) {
    const auto best = best_of(scores->of(head), 12);
    EXPECT_TRUE(std::equal(best.begin(), best.end(), cut->of(head).begin()));
  }
  rule.pooling.width = 4;
  EXPECT_FALSE(decode_keep(query.view(), keys.view(), rule, workspace, nullptr));
}

}  // namespace
}  // namespace kvern::evict
