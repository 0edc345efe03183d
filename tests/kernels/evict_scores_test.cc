#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>

#include "base/executor.h"
#include "kernels/key_scores.h"
#include "kernels/selection.h"
#include "kernels/token_scores.h"
#include "kernels/window_scores.h"
#include "tests/kernels/evict_samples.h"
#include "tests/kernels/targets.h"

namespace kvern::evict {
namespace {

using Tokens = std::vector<std::uint32_t>;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Test C1 of the specification: the statistics of its attention of two heads, two rows and six columns.
Observation observation_c1() {
  const float attention[2][2][6] = {{{.30F, .10F, .05F, .20F, .05F, .10F}, {.10F, .10F, .25F, .10F, .05F, .10F}},
                                    {{.05F, .40F, .05F, .10F, .10F, .10F}, {.15F, .20F, .05F, .10F, .20F, .10F}}};
  Observation observation;
  observation.query_heads = 2;
  observation.rows = 2;
  observation.columns = 6;
  for (const auto& head : attention) {
    for (std::size_t j = 0; j < 6; ++j) {
      const float difference = head[0][j] - head[1][j];
      observation.mean.push_back((head[0][j] + head[1][j]) / 2);
      observation.variance.push_back(difference * difference / 2);
    }
  }
  return observation;
}

void expect_scores(std::span<const float> got, const std::vector<double>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], expected[i], 1e-5) << i;
}

TEST(CakeScores, C1WithoutPooling) {
  const auto scores = cake_scores(observation_c1(), 1, 200, {Pooling::Kind::kNone, 1}, nullptr);
  expect_scores(scores->of(0), {2.65, 2.2, 2.1, 0.625, 0.6, 0.1});
  EXPECT_EQ(best_of(scores->of(0), 2), (Tokens{0, 1}));
}

TEST(CakeScores, C1AveragesOverFiveAndThree) {
  const auto five = cake_scores(observation_c1(), 1, 200, {Pooling::Kind::kAverage, 5}, nullptr);
  expect_scores(five->of(0), {1.39, 1.515, 1.635, 1.125, 0.685, 0.265});
  EXPECT_EQ(best_of(five->of(0), 2), (Tokens{1, 2}));
  const auto three = cake_scores(observation_c1(), 1, 200, {Pooling::Kind::kAverage, 3}, nullptr);
  expect_scores(three->of(0), {1.616667, 2.316667, 1.641667, 1.108333, 0.441667, 0.233333});
  EXPECT_EQ(best_of(three->of(0), 2), (Tokens{1, 2}));
}

TEST(CakeScores, C1MaximumOverFiveIsDecidedByATie) {
  const auto scores = cake_scores(observation_c1(), 1, 200, {Pooling::Kind::kMaximum, 5}, nullptr);
  expect_scores(scores->of(0), {4.25, 4.25, 4.25, 4.225, 2.65, 1.15});
  EXPECT_EQ(best_of(scores->of(0), 2), (Tokens{0, 1}));
}

TEST(CakeScores, C1Preference) {
  EXPECT_NEAR((Preference{1, 1}.of(5.756075751, 0.075)), 0.431705681, 1e-8);
  EXPECT_NEAR((Preference{1.6, 0.4}.of(5.756075751, 0.075)), 0.004599728747, 1e-11);
}

TEST(CakeScores, OfGammaZeroAreThoseOfSnapKv) {
  Observation observation = observation_c1();
  const auto cake = cake_scores(observation, 1, 0, {}, nullptr);
  observation.variance.clear();
  const auto snapkv = snapkv_scores(observation, 1, {}, nullptr);
  EXPECT_EQ(cake->values, snapkv->values);
  EXPECT_FALSE(cake_scores(observation, 1, 200, {}, nullptr));
}

TEST(Pooling, IsItsDefinitionOnEveryTargetForEveryWidth) {
  for_each_target([](const char* target) {
    for (const std::uint32_t columns : {1U, 2U, 15U, 16U, 17U, 100U}) {
      Observation observation;
      observation.query_heads = 3;
      observation.rows = 4;
      observation.columns = columns;
      std::mt19937 generator(columns);
      std::uniform_real_distribution<float> uniform;
      for (std::uint32_t i = 0; i < 3 * columns; ++i) {
        observation.mean.push_back(uniform(generator));
        observation.variance.push_back(uniform(generator) / 100);
      }
      for (const std::uint32_t width : {1U, 3U, 5U, 7U, 255U}) {
        for (const auto kind : {Pooling::Kind::kAverage, Pooling::Kind::kMaximum}) {
          const auto scores = cake_scores(observation, 1, 20, {kind, width}, nullptr);
          for (std::int64_t j = 0; j < columns; ++j) {
            double total = 0;
            for (std::size_t head = 0; head < 3; ++head) {
              double pooled = 0;
              for (std::int64_t u = j - width / 2; u <= j + width / 2; ++u) {
                if (u < 0 || u >= columns) continue;
                const auto at = static_cast<std::size_t>(u);
                const double value = static_cast<double>(observation.mean_of(head)[at]) +
                                     20 * static_cast<double>(observation.variance_of(head)[at]);
                pooled = kind == Pooling::Kind::kMaximum ? std::max(pooled, value) : pooled + value / width;
              }
              total += pooled / 3;
            }
            ASSERT_NEAR(scores->values[static_cast<std::size_t>(j)], total, 1e-5)
                << target << " " << columns << " width " << width << " column " << j;
          }
        }
      }
    }
  });
}

TEST(Pooling, EqualNeighbourhoodsScoreEqually) {
  Observation observation;
  observation.query_heads = 1;
  observation.rows = 2;
  observation.columns = 200;
  for (std::uint32_t i = 0; i < 200; ++i) observation.mean.push_back(1 / static_cast<float>(3 + i % 20));
  const auto scores = snapkv_scores(observation, 1, {}, nullptr);
  for (std::uint32_t j = 22; j < 198; ++j) EXPECT_EQ(scores->values[j], scores->values[j - 20]) << j;
}

TEST(Pooling, RefusesEvenAndHugeWidths) {
  EXPECT_FALSE((Pooling{Pooling::Kind::kAverage, 4}.validate()));
  EXPECT_FALSE((Pooling{Pooling::Kind::kMaximum, 257}.validate()));
  EXPECT_TRUE((Pooling{Pooling::Kind::kNone, 4}.validate()));
  EXPECT_FALSE(snapkv_scores(observation_c1(), 1, {Pooling::Kind::kAverage, 4}, nullptr));
  EXPECT_FALSE(snapkv_scores(observation_c1(), 3, {}, nullptr));
}

RC_GTEST_PROP(CakeProperty, PermutingHeadsPermutesScoresAndLeavesThePreference, ()) {
  const auto tokens = *rc::gen::inRange(20U, 300U);
  const SampleRows queries(DType::kBFloat16, 6, 16, 64, tokens);
  const SampleRows keys(DType::kBFloat16, 3, tokens, 64, tokens + 1);
  SampleRows turned_queries = queries;
  SampleRows turned_keys = keys;
  for (std::size_t head = 0; head < 6; ++head) {
    for (std::size_t row = 0; row < 16; ++row) {
      for (std::size_t i = 0; i < 64; ++i) turned_queries.set((head + 2) % 6, row, i, queries.at(head, row, i));
    }
  }
  for (std::size_t head = 0; head < 3; ++head) {
    for (std::size_t token = 0; token < tokens; ++token) {
      for (std::size_t i = 0; i < 64; ++i) turned_keys.set((head + 1) % 3, token, i, keys.at(head, token, i));
    }
  }
  const Observation seen = observed(queries.view(), keys.view());
  const Observation turned = observed(turned_queries.view(), turned_keys.view());
  const auto scores = cake_scores(seen, 3, kCakeGamma, {}, nullptr);
  const auto turned_scores = cake_scores(turned, 3, kCakeGamma, {}, nullptr);
  for (std::size_t head = 0; head < 3; ++head) {
    RC_ASSERT(std::ranges::equal(scores->of(head), turned_scores->of((head + 1) % 3)));
  }
  const Preference preference{1.6, 0.4};
  const double expected = preference.of(seen.dispersion, seen.shift);
  RC_ASSERT(std::abs(preference.of(turned.dispersion, turned.shift) - expected) <= 1e-9 * expected);
}

TEST(KeyScores, AreTheirDefinitionsOnEveryTargetForEveryTypeAndShape) {
  for_each_target([](const char* target) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const std::uint32_t dim : {64U, 80U, 96U, 112U, 128U, 192U, 256U, 35U, 1U}) {
        for (const std::uint32_t tokens : {1U, 17U, 600U}) {
          const SampleRows keys(dtype, 2, tokens, dim, tokens, tokens == 17 ? 3 : 0);
          const auto knorm = knorm_scores(keys.view(), nullptr);
          const auto keydiff = keydiff_scores(keys.view(), nullptr);
          for (std::size_t head = 0; head < 2; ++head) {
            std::vector<double> mean(dim);
            std::vector<double> norms(tokens);
            for (std::size_t token = 0; token < tokens; ++token) {
              for (std::size_t i = 0; i < dim; ++i) norms[token] += std::pow(keys.at(head, token, i), 2);
              norms[token] = std::sqrt(norms[token]);
              for (std::size_t i = 0; i < dim; ++i) {
                mean[i] += static_cast<double>(keys.at(head, token, i)) / norms[token];
              }
            }
            double length = 0;
            for (const double value : mean) length += value * value;
            for (std::size_t token = 0; token < tokens; ++token) {
              double product = 0;
              for (std::size_t i = 0; i < dim; ++i) product += static_cast<double>(keys.at(head, token, i)) * mean[i];
              ASSERT_NEAR(knorm->of(head)[token], -norms[token], 1e-5 * norms[token]) << target << " " << dim;
              ASSERT_NEAR(keydiff->of(head)[token], -product / norms[token] / std::sqrt(length), 2e-6)
                  << target << " " << dim;
            }
          }
        }
      }
    }
  });
}

TEST(KeyScores, ADamagedKeyIsTheWorstAndHurtsNoOther) {
  SampleRows keys(DType::kBFloat16, 1, 40, 64);
  keys.set_row(0, 3, 0);
  keys.set_row(0, 9, 0);
  const auto before = keydiff_scores(keys.view(), nullptr);
  keys.set(0, 9, 5, kNaN);
  for (const auto& scores : {knorm_scores(keys.view(), nullptr), keydiff_scores(keys.view(), nullptr)}) {
    EXPECT_TRUE(std::isnan(scores->values[9]));
    EXPECT_EQ(count_nan(scores->values), 1U);
    EXPECT_EQ(scores->values[3], 0);
  }
  const auto after = keydiff_scores(keys.view(), nullptr);
  for (std::size_t i = 0; i < 40; ++i) {
    if (i != 9) {
      EXPECT_EQ(after->values[i], before->values[i]);
    }
  }
}

TEST(KeyScores, AreTheSameBitForBitWhateverTheThreads) {
  const SampleRows keys(DType::kBFloat16, 3, 2000, 64);
  ThreadPool pool("test", 3, 64);
  EXPECT_EQ(keydiff_scores(keys.view(), nullptr)->values, keydiff_scores(keys.view(), &pool)->values);
  EXPECT_EQ(knorm_scores(keys.view(), nullptr)->values, knorm_scores(keys.view(), &pool)->values);
}

TEST(KeyScores, OfNothingAreEmptyAndOfBytesRefused) {
  const SampleRows none(DType::kFloat32, 2, 0, 64);
  EXPECT_TRUE(keydiff_scores(none.view(), nullptr)->values.empty());
  HeadRows opaque = none.view();
  opaque.dtype = DType::kOpaqueBytes;
  EXPECT_FALSE(knorm_scores(opaque, nullptr));
  EXPECT_FALSE(keydiff_scores(opaque, nullptr));
}

/// Test W1 of the specification: column sums of two heads, windows of four tokens.
const std::vector<float> kSumsW1 = {.10F, .02F, .02F, .02F, .09F, .09F, .09F, .09F, .20F, .04F,
                                    .02F, .02F, .30F, .02F, .08F, .08F, .08F, .08F, .02F, .10F};

TEST(WindowScores, W1MeanAndTopTwo) {
  const auto mean = window_scores(kSumsW1, 2, {4, 4}, nullptr);
  expect_scores(*mean, {0.065, 0.085, 0.090});
  const auto top = window_scores(kSumsW1, 2, {4, 2}, nullptr);
  expect_scores(*top, {0.110, 0.085, 0.090});
}

TEST(WindowScores, W1SelectsByBudget) {
  const auto mean = window_scores(kSumsW1, 2, {4, 4}, nullptr);
  const auto top = window_scores(kSumsW1, 2, {4, 2}, nullptr);
  EXPECT_EQ(select_windows(*mean, {4, 4}, 10, 1), Tokens{});
  for (const std::uint32_t budget : {2U, 5U}) {
    EXPECT_EQ(select_windows(*mean, {4, 4}, 10, budget), Tokens{2});
    EXPECT_EQ(select_windows(*top, {4, 2}, 10, budget), Tokens{0});
  }
  for (const std::uint32_t budget : {6U, 9U}) {
    EXPECT_EQ(select_windows(*mean, {4, 4}, 10, budget), (Tokens{1, 2}));
    EXPECT_EQ(select_windows(*top, {4, 2}, 10, budget), (Tokens{0, 2}));
  }
  EXPECT_EQ(select_windows(*mean, {4, 4}, 10, 10), (Tokens{0, 1, 2}));
}

TEST(WindowScores, TokensOfWindowsAreThoseBeforeTheWindowAndIt) {
  const Selection tokens = window_tokens(Tokens{0, 2}, {4, 4}, 10, 3, 2);
  const Tokens expected = {0, 1, 2, 3, 8, 9, 10, 11, 12};
  EXPECT_TRUE(std::ranges::equal(tokens.of(0), expected));
  EXPECT_TRUE(std::ranges::equal(tokens.of(1), expected));
}

TEST(WindowScores, W3AFollowerGathersTheLeadersTokensOfItsOwn) {
  const LayerGroups groups{7, 3};
  EXPECT_EQ(groups.count(), 3U);
  EXPECT_TRUE(groups.leads(6));
  EXPECT_EQ(groups.leader_of(5), 3U);
  const auto scores = window_scores(kSumsW1, 2, {4, 4}, nullptr);
  const Selection leader = window_tokens(select_windows(*scores, {4, 4}, 10, 6), {4, 4}, 10, 2, 2);
  const SampleRows follower(DType::kBFloat16, 2, 12, 64);
  std::vector<std::byte> compact(gathered_bytes(follower.view(), leader));
  ASSERT_TRUE(gather_rows(follower.view(), leader, compact, nullptr));
  const std::size_t row = 64 * 2;
  for (std::size_t head = 0; head < 2; ++head) {
    for (std::size_t i = 0; i < leader.of(head).size(); ++i) {
      EXPECT_EQ(std::memcmp(compact.data() + (leader.offsets[head] + i) * row,
                            follower.view().row(head, leader.of(head)[i]), row),
                0);
    }
  }
}

TEST(WindowScores, OfAnObservationAreThoseOfItsColumnSums) {
  const SampleRows queries(DType::kFloat32, 4, 16, 64, 3);
  const SampleRows keys(DType::kFloat32, 2, 1000, 64, 4);
  const Observation seen = observed(queries.view(), keys.view());
  std::vector<float> sums = seen.mean;
  for (float& sum : sums) sum *= 16;
  ThreadPool pool("test", 2, 64);
  for (const WindowRule rule : {WindowRule{8, 8}, WindowRule{8, 4}, WindowRule{32, 16}, WindowRule{5000, 1}}) {
    const auto scores = window_scores(seen, rule, &pool);
    EXPECT_EQ(scores->size(), rule.count(seen.columns));
    const auto expected = window_scores(sums, 4, rule, nullptr);
    for (std::size_t i = 0; i < scores->size(); ++i) EXPECT_NEAR((*scores)[i], (*expected)[i], 1e-6F * 16);
  }
}

TEST(WindowScores, AWindowWithNaNSortsLast) {
  std::vector<float> sums = kSumsW1;
  sums[8] = kNaN;
  const auto scores = window_scores(sums, 2, {4, 4}, nullptr);
  EXPECT_EQ(select_windows(*scores, {4, 4}, 10, 6), (Tokens{0, 1}));
}

TEST(WindowScores, RefusesEmptyRules) {
  EXPECT_FALSE((WindowRule{0, 1}.validate()));
  EXPECT_FALSE((WindowRule{8, 0}.validate()));
  EXPECT_FALSE(window_scores(kSumsW1, 3, {4, 4}, nullptr));
}

}  // namespace
}  // namespace kvern::evict
