#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <numeric>

#include "base/executor.h"
#include "kernels/cascade.h"
#include "kernels/head_budgets.h"
#include "kernels/layer_budgets.h"
#include "kernels/preference_budgets.h"
#include "kernels/selection.h"
#include "tests/kernels/evict_samples.h"

namespace kvern::evict {
namespace {

using Tokens = std::vector<std::uint32_t>;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::uint64_t sum_of(const Tokens& budgets) {
  return std::accumulate(budgets.begin(), budgets.end(), std::uint64_t{0});
}

/// The order of section 0.3 of the specification, by sorting.
Tokens sorted_best(const std::vector<float>& scores, std::size_t count) {
  Tokens order(scores.size());
  std::iota(order.begin(), order.end(), 0U);
  const auto value = [&](std::uint32_t i) { return std::isnan(scores[i]) ? -kInfinity : scores[i]; };
  std::ranges::stable_sort(order, [&](std::uint32_t a, std::uint32_t b) { return value(a) > value(b); });
  order.resize(std::min(count, order.size()));
  std::ranges::sort(order);
  return order;
}

TEST(Selection, OrdersByScoreThenByIndexWithNaNAsMinusInfinity) {
  const std::vector<float> scores = {1, kNaN, 2, 2, -0.0F, 0.0F, -kInfinity, kInfinity};
  EXPECT_EQ(best_of(scores, 0), Tokens{});
  EXPECT_EQ(best_of(scores, 1), Tokens{7});
  EXPECT_EQ(best_of(scores, 2), (Tokens{2, 7}));
  EXPECT_EQ(best_of(scores, 5), (Tokens{0, 2, 3, 4, 7}));
  EXPECT_EQ(best_of(scores, 7), (Tokens{0, 1, 2, 3, 4, 5, 7}));
  EXPECT_EQ(best_of(scores, 99), (Tokens{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(ranked_best_of(scores, 99), (Tokens{7, 2, 3, 0, 4, 5, 1, 6}));
  EXPECT_EQ(count_nan(scores), 1U);
}

RC_GTEST_PROP(SelectionProperty, IsASortedPrefixOfTheOrder, ()) {
  const auto values = *rc::gen::container<std::vector<int>>(rc::gen::inRange(-5, 6));
  std::vector<float> scores;
  for (const int value : values) {
    scores.push_back(value == 5 ? kNaN : value == -5 ? -kInfinity : static_cast<float>(value) / 3);
  }
  const auto count = *rc::gen::inRange<std::size_t>(0, scores.size() + 3);
  RC_ASSERT(best_of(scores, count) == sorted_best(scores, count));
  // Nesting: what fewer keep, more keep too.
  const Tokens ranked = ranked_best_of(scores, count);
  for (std::size_t n = 0; n <= ranked.size(); ++n) {
    Tokens prefix(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(n));
    std::ranges::sort(prefix);
    RC_ASSERT(prefix == best_of(scores, n));
  }
}

TEST(Selection, KeepsTheTailAndDifferentNumbersPerHead) {
  const TokenScores scores{2, 4, {1, 4, 3, 2, 9, 9, 9, 9}};
  const Tokens counts = {2, 9};
  const auto kept = select_best(scores, counts, 2, nullptr);
  EXPECT_EQ(kept->offsets, (Tokens{0, 4, 10}));
  EXPECT_EQ(kept->tokens, (Tokens{1, 2, 4, 5, 0, 1, 2, 3, 4, 5}));
  ThreadPool pool("test", 2, 16);
  EXPECT_EQ(*select_best(scores, counts, 2, &pool), *kept);
  EXPECT_FALSE(select_best(scores, Tokens{1, 2, 3}, 0, nullptr));
  EXPECT_FALSE(select_best(scores, Tokens{1}, 0xFFFFFFFFU, nullptr));
}

TEST(Selection, SinksAndRecentNeverOverlap) {
  EXPECT_EQ(select_sinks_and_recent(2, 10, 2, 3).tokens, (Tokens{0, 1, 7, 8, 9, 0, 1, 7, 8, 9}));
  EXPECT_EQ(select_sinks_and_recent(1, 4, 3, 3).tokens, (Tokens{0, 1, 2, 3}));
  EXPECT_EQ(select_sinks_and_recent(1, 4, 9, 9).tokens, (Tokens{0, 1, 2, 3}));
  EXPECT_EQ(select_sinks_and_recent(1, 0, 2, 3).tokens, Tokens{});
  EXPECT_EQ(select_sinks_and_recent(1, 4, 0, 0).tokens, Tokens{});
}

TEST(GatherRows, CopiesRaggedRowsOfEveryTypeAndStride) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const SampleRows rows(dtype, 2, 3000, 96, 1, 5);
    Selection selection;
    selection.tokens = {7, 2999, 0};
    for (std::uint32_t token = 0; token < 3000; token += 2) selection.tokens.push_back(token);
    selection.offsets = {0, 2, 1503};
    std::vector<std::byte> out(gathered_bytes(rows.view(), selection));
    ThreadPool pool("test", 2, 16);
    ASSERT_TRUE(gather_rows(rows.view(), selection, out, &pool));
    const std::size_t row = 96 * dtype_bytes(dtype);
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t i = 0; i < selection.of(head).size(); ++i) {
        ASSERT_EQ(std::memcmp(out.data() + (selection.offsets[head] + i) * row,
                              rows.view().row(head, selection.of(head)[i]), row),
                  0);
      }
    }
  }
}

TEST(GatherRows, RefusesWhatDoesNotFit) {
  const SampleRows rows(DType::kFloat32, 1, 4, 16);
  Selection selection;
  selection.tokens = {1, 4};
  selection.offsets = {0, 2};
  std::vector<std::byte> out(2 * 64);
  EXPECT_EQ(gather_rows(rows.view(), selection, out, nullptr).code(), Code::kInvalid);
  selection.tokens[1] = 3;
  EXPECT_TRUE(gather_rows(rows.view(), selection, out, nullptr));
  EXPECT_EQ(gather_rows(rows.view(), selection, std::span(out).first(64), nullptr).code(), Code::kInvalid);
  selection.offsets = {0, 1, 2};
  EXPECT_EQ(gather_rows(rows.view(), selection, out, nullptr).code(), Code::kInvalid);
}

TEST(PreferenceBudgets, C2StagesWithACap) {
  const std::vector<double> preferences = {4, 1, 3, 2};
  const std::vector<Tokens> stages = {{30}, {30, 10}, {20, 5, 15}, {16, 4, 12, 8}};
  for (std::size_t m = 1; m <= 4; ++m) {
    const auto seen = std::span(preferences).first(m);
    EXPECT_EQ(fair_budgets(seen, {40, 30, 0}, 4), stages[m - 1]);
    EXPECT_EQ(reference_budgets(seen, {40, 30, 0}), stages[m - 1]);
  }
}

TEST(PreferenceBudgets, C3TheReferenceRoundingDoesNotNest) {
  const std::vector<double> preferences = {5, 2, 1};
  EXPECT_EQ(reference_budgets(std::span(preferences).first(2), {6, 7, 0}), (Tokens{5, 1}));
  EXPECT_EQ(reference_budgets(preferences, {6, 7, 0}), (Tokens{4, 2, 0}));
}

TEST(PreferenceBudgets, C4FloorAndCap) {
  const std::vector<double> preferences = {380, 2.1, 50, 10};
  const auto shares = preference_shares(preferences, {400, 200, 16});
  const std::vector<double> expected = {200, 16, 153.333333333, 30.666666667};
  for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(shares[i], expected[i], 1e-6);
  EXPECT_EQ(fair_budgets(preferences, {400, 200, 16}, 4), (Tokens{200, 16, 153, 31}));
}

TEST(PreferenceBudgets, ARoundingErrorDoesNotMoveAToken) {
  // A hair above 1, 1 and 7, and a hair below 1, 1 and 4.
  const std::vector<double> above = {0.1, 0.1, 0.7};
  const std::vector<double> below = {0.1, 0.1, 0.4};
  EXPECT_EQ(fair_budgets(above, {9, 100, 0}, 4), (Tokens{1, 1, 7}));
  EXPECT_EQ(fair_budgets(above, {9, 100, 0}, 3), (Tokens{1, 1, 7}));
  EXPECT_EQ(fair_budgets(below, {6, 100, 0}, 4), (Tokens{1, 1, 4}));
  EXPECT_EQ(fair_budgets(below, {6, 100, 0}, 3), (Tokens{1, 1, 4}));
}

TEST(PreferenceBudgets, OfPreferencesThatSayNothingAreEqual) {
  for (const double nothing : {0.0, -1.0, static_cast<double>(kNaN), static_cast<double>(kInfinity)}) {
    EXPECT_EQ(fair_budgets(std::vector<double>(3, nothing), {30, 20, 0}, 3), (Tokens{10, 10, 10}));
    EXPECT_EQ(reference_budgets(std::vector<double>(3, nothing), {30, 20, 0}), (Tokens{10, 10, 10}));
  }
  // The others are full, and what is left goes to the rest.
  EXPECT_EQ(fair_budgets(std::vector<double>{2, 0, 0}, {40, 15, 0}, 3), (Tokens{15, 13, 12}));
  EXPECT_TRUE(fair_budgets({}, {40, 15, 0}, 3).empty());
}

RC_GTEST_PROP(PreferenceBudgetsProperty, SumExactlyAndNestInEveryStage, ()) {
  const auto layers = *rc::gen::inRange<std::size_t>(1, 12);
  const auto raw = *rc::gen::container<std::vector<int>>(layers, rc::gen::inRange(-1, 2000));
  std::vector<double> preferences;
  for (const int value : raw) preferences.push_back(value < 0 ? static_cast<double>(kNaN) : value / 7.0);
  const TokenBudget budget{*rc::gen::inRange<std::uint64_t>(0, 4000), *rc::gen::inRange(0U, 600U),
                           *rc::gen::inRange(0U, 40U)};
  Tokens before;
  for (std::size_t m = 1; m <= layers; ++m) {
    const auto seen = std::span(preferences).first(m);
    const std::uint64_t target = std::min<std::uint64_t>(budget.total, m * std::uint64_t{budget.cap});
    const auto shares = preference_shares(seen, budget);
    RC_ASSERT(std::abs(std::accumulate(shares.begin(), shares.end(), 0.0) - static_cast<double>(target)) < 1e-6);
    const Tokens budgets = fair_budgets(seen, budget, static_cast<std::uint32_t>(layers));
    for (const std::uint32_t tokens : budgets) RC_ASSERT(tokens <= budget.cap);
    for (std::size_t i = 0; i < before.size(); ++i) RC_ASSERT(budgets[i] <= before[i]);
    RC_ASSERT(sum_of(budgets) >= target);
    RC_ASSERT(sum_of(budgets) <= target + m);
    if (m == layers) RC_ASSERT(sum_of(budgets) == target);
    before = budgets;
  }
}

TEST(LayerBudgets, UniformAndPyramidSumExactly) {
  EXPECT_EQ(uniform_budgets(3, 11, 100), (Tokens{4, 4, 3}));
  EXPECT_EQ(uniform_budgets(3, 11, 2), (Tokens{2, 2, 2}));
  EXPECT_TRUE(uniform_budgets(0, 11, 2).empty());
  EXPECT_EQ(pyramid_budgets(3, 300, 1000, 10), (Tokens{190, 100, 10}));
  EXPECT_EQ(pyramid_budgets(1, 300, 1000, 10), (Tokens{300}));
  for (const std::uint32_t layers : {2U, 5U, 31U}) {
    const Tokens budgets = pyramid_budgets(layers, 12345, 600, 14);
    EXPECT_EQ(sum_of(budgets), std::min(12345U, layers * 600U));
    EXPECT_TRUE(std::ranges::is_sorted(budgets, std::ranges::greater{}));
  }
}

TEST(LayerBudgets, W2WindowPyramidAsImplemented) {
  EXPECT_EQ(window_pyramid_implemented(2048, {32, 8}, 14), (Tokens{2926, 2341, 1756, 1170}));
  EXPECT_EQ(window_pyramid_implemented(1024, {32, 8}, 14), (Tokens{1463, 1171, 879, 585}));
  EXPECT_EQ(window_pyramid_implemented(512, {32, 8}, 14), (Tokens{732, 586, 440, 292}));
  EXPECT_EQ(window_pyramid_implemented(2048, {28, 7}, 14), (Tokens{3072, 2390, 1708, 1024}));
  EXPECT_EQ(window_pyramid_implemented(2048, {28, 14}, 14), (Tokens{2048, 2048}));
  const Tokens inverted = window_pyramid_implemented(2048, {32, 16}, 14);
  EXPECT_EQ(inverted, (Tokens{1756, 2340}));
  EXPECT_TRUE(is_inverted(inverted));
  EXPECT_EQ(window_pyramid_implemented(64, {32, 32}, 14), Tokens{64});
  // Groups of very many layers: nothing below zero.
  EXPECT_EQ(window_pyramid_implemented(100, {80, 40}, 14), (Tokens{0, 285}));
}

TEST(LayerBudgets, W2WindowPyramidAsPrinted) {
  const std::vector<double> expected = {3949.714286, 2681.904762, 1414.095238, 146.285714};
  const auto printed = window_pyramid_printed(2048, {32, 8}, 14);
  ASSERT_EQ(printed.size(), 4U);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(printed[i], expected[i], 1e-5);
  EXPECT_EQ(window_pyramid_printed(64, {32, 32}, 14), std::vector<double>{64});
}

TEST(HeadBudgets, GoWhereTheScoresAreAboveTheFloor) {
  const TokenScores scores{3, 4, {9, 8, 7, 6, 1, 1, 1, 1, 5, 2, 0, 0}};
  EXPECT_EQ(*adaptive_head_budgets(scores, {2, 0}), (Tokens{4, 0, 2}));
  EXPECT_EQ(*adaptive_head_budgets(scores, {2, 0.5}), (Tokens{4, 1, 1}));
  EXPECT_EQ(*adaptive_head_budgets(scores, {2, 1}), (Tokens{2, 2, 2}));
  EXPECT_EQ(*adaptive_head_budgets(scores, {9, 0.1}), (Tokens{4, 4, 4}));
  EXPECT_EQ(*adaptive_head_budgets(scores, {0, 0.5}), (Tokens{0, 0, 0}));
  EXPECT_FALSE(adaptive_head_budgets(scores, {2, 1.5}));
  EXPECT_FALSE(adaptive_head_budgets(scores, {2, static_cast<double>(kNaN)}));
}

RC_GTEST_PROP(HeadBudgetsProperty, SumExactlyAndKeepTheFloor, ()) {
  const auto heads = *rc::gen::inRange(1U, 6U);
  const auto tokens = *rc::gen::inRange(0U, 40U);
  TokenScores scores{heads, tokens, {}};
  for (std::uint32_t i = 0; i < heads * tokens; ++i) {
    scores.values.push_back(static_cast<float>(*rc::gen::inRange(0, 6)));
  }
  const HeadBudget budget{*rc::gen::inRange(0U, 50U), *rc::gen::inRange(0, 5) / 4.0};
  const auto budgets = adaptive_head_budgets(scores, budget);
  const std::uint32_t average = std::min(budget.tokens_per_head, tokens);
  RC_ASSERT(sum_of(*budgets) == std::uint64_t{heads} * average);
  for (const std::uint32_t of_head : *budgets) {
    RC_ASSERT(of_head <= tokens);
    RC_ASSERT(of_head >= static_cast<std::uint32_t>(budget.floor * average));
  }
}

TEST(Cascade, C5EqualsOneShot) {
  const std::vector<std::vector<float>> scores = {{.9F, .1F, .5F, .7F, .3F, .2F, .8F, .4F},
                                                  {.2F, .6F, .1F, .9F, .4F, .3F, .5F, .05F},
                                                  {.3F, .35F, .9F, .1F, .2F, .8F, .7F, .6F}};
  const std::vector<double> preferences = {3, 1, 2};
  const std::vector<Tokens> stages = {{8}, {7, 3}, {5, 1, 3}};
  Cascade cascade({.layers = 3, .cache_tokens = 5, .window = 2, .floor = 1}, 8);
  for (std::size_t layer = 0; layer < 3; ++layer) {
    ASSERT_TRUE(cascade.add_layer(preferences[layer], {1, 8, scores[layer]}));
    EXPECT_EQ(cascade.budgets(), stages[layer]);
  }
  EXPECT_EQ(cascade.kept(0).tokens, (Tokens{0, 2, 3, 6, 7, 8, 9}));
  EXPECT_EQ(cascade.kept(1).tokens, (Tokens{3, 8, 9}));
  EXPECT_EQ(cascade.kept(2).tokens, (Tokens{2, 5, 6, 8, 9}));
  EXPECT_FALSE(cascade.add_layer(1, {1, 8, scores[0]}));
}

RC_GTEST_PROP(CascadeProperty, EqualsOneEvictionWithTheLastBudgets, ()) {
  const auto layers = *rc::gen::inRange(1U, 8U);
  const auto candidates = *rc::gen::inRange(0U, 60U);
  const auto heads = *rc::gen::inRange(1U, 4U);
  const CascadeOptions options{layers, *rc::gen::inRange(5U, 50U), 4, *rc::gen::inRange(0U, 5U), BudgetRounding::kFair};
  RC_ASSERT(options.validate().is_ok());
  Cascade cascade(options, candidates);
  std::vector<TokenScores> scores;
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    TokenScores of_layer{heads, candidates, {}};
    for (std::uint32_t i = 0; i < heads * candidates; ++i) {
      const int value = *rc::gen::inRange(0, 20);
      of_layer.values.push_back(value == 19 ? kNaN : static_cast<float>(value));
    }
    RC_ASSERT(cascade.add_layer(*rc::gen::inRange(0, 50), of_layer).is_ok());
    scores.push_back(std::move(of_layer));
  }
  RC_ASSERT(sum_of(cascade.budgets()) == std::min<std::uint64_t>(options.total(), std::uint64_t{layers} * candidates));
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    const auto once = select_best(scores[layer], std::span(&cascade.budgets()[layer], 1), options.window, nullptr);
    RC_ASSERT(cascade.kept(layer) == *once);
    RC_ASSERT(cascade.held(layer) == std::min(candidates, cascade.budgets()[layer]));
  }
}

TEST(Cascade, WithReferenceRoundingHoldsNoMoreThanIsLeft) {
  Cascade cascade({.layers = 3, .cache_tokens = 3, .window = 1, .floor = 0, .rounding = BudgetRounding::kReference}, 7);
  for (const double preference : {5.0, 2.0, 1.0}) {
    ASSERT_TRUE(cascade.add_layer(preference, {1, 7, {1, 2, 3, 4, 5, 6, 7}}));
  }
  EXPECT_EQ(cascade.budgets(), (Tokens{4, 2, 0}));
  EXPECT_EQ(cascade.held(0), 4U);
  EXPECT_EQ(cascade.held(1), 1U);
  EXPECT_EQ(cascade.kept(1).tokens, (Tokens{6, 7}));
  EXPECT_EQ(cascade.kept(2).tokens, Tokens{7});
}

TEST(Cascade, RefusesWhatDoesNotFit) {
  EXPECT_FALSE((CascadeOptions{.layers = 2, .cache_tokens = 32, .window = 32}.validate()));
  EXPECT_FALSE((CascadeOptions{.layers = 0, .cache_tokens = 33, .window = 32}.validate()));
  Cascade cascade({.layers = 2, .cache_tokens = 33, .window = 32}, 8);
  EXPECT_EQ(cascade.add_layer(1, {1, 7, std::vector<float>(7)}).code(), Code::kInvalid);
  EXPECT_EQ(cascade.layers_seen(), 0U);
}

TEST(PrefillRule, ShortPromptsAreNeitherScoredNorEvicted) {
  for (const std::uint64_t tokens : {0U, 1U, 7U, 8U}) {
    EXPECT_FALSE(has_candidates(tokens, 8));
    EXPECT_FALSE(evicts(PrefillRule::kStrict, tokens, 4, 8));
  }
  EXPECT_FALSE(evicts(PrefillRule::kReference, 72, 64, 8));
  EXPECT_TRUE(evicts(PrefillRule::kReference, 73, 64, 8));
  EXPECT_FALSE(evicts(PrefillRule::kStrict, 64, 64, 8));
  EXPECT_TRUE(evicts(PrefillRule::kStrict, 65, 64, 8));
}

}  // namespace
}  // namespace kvern::evict
