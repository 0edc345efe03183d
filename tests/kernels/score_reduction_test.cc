#include "kernels/score_reduction.h"

#include <gtest/gtest.h>

#include <thread>

#include "kernels/window_scores.h"
#include "tests/kernels/evict_samples.h"

namespace kvern {
namespace {

/// Runs body(reduction, rank) on a thread per rank.
template <class Body>
void on_ranks(std::uint32_t ranks, Body body) {
  auto reductions = make_thread_reductions(ranks);
  ASSERT_TRUE(reductions);
  std::vector<std::thread> threads;
  for (std::uint32_t rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] { body(*(*reductions)[rank], rank); });
  }
  for (std::thread& thread : threads) thread.join();
}

HeadRows heads_of(HeadRows rows, std::uint32_t first, std::uint32_t count) {
  rows.data += first * rows.head_stride_bytes;
  rows.heads = count;
  return rows;
}

TEST(ScoreReduction, RanksWithHalfOfTheHeadsDecideAsOneWithAll) {
  const evict::SampleRows queries(DType::kFloat32, 8, 16, 64, 1);
  const evict::SampleRows keys(DType::kFloat32, 4, 400, 64, 2);
  const evict::WindowRule rule{8, 8};
  const auto observe = [&](std::uint32_t first, std::uint32_t kv_heads) {
    evict::ObservationWorkspace workspace;
    evict::Observation observation;
    EXPECT_TRUE(evict::observe(heads_of(queries.view(), 2 * first, 2 * kv_heads),
                               heads_of(keys.view(), first, kv_heads), {}, workspace, nullptr, observation));
    return observation;
  };
  const evict::Observation whole = observe(0, 4);
  const auto whole_scores = evict::window_scores(whole, rule, nullptr);
  ASSERT_TRUE(whole_scores);
  const auto expected = evict::select_windows(*whole_scores, rule, whole.columns, 96);

  on_ranks(2, [&](ScoreReduction& reduction, std::uint32_t rank) {
    const evict::Observation part = observe(2 * rank, 2);
    auto scores = evict::window_scores(part, rule, nullptr);
    ASSERT_TRUE(scores);
    EXPECT_NE(evict::select_windows(*scores, rule, part.columns, 96), expected);
    double preference[2] = {part.dispersion, part.shift};
    ASSERT_TRUE(reduction.mean(*scores));
    ASSERT_TRUE(reduction.sum(preference));
    EXPECT_EQ(evict::select_windows(*scores, rule, part.columns, 96), expected);
    EXPECT_NEAR(preference[0], whole.dispersion, 1e-9 * whole.dispersion);
    EXPECT_NEAR(preference[1], whole.shift, 1e-9 * whole.shift);
  });
}

TEST(ScoreReduction, GivesAllRanksTheSameRoundAfterRound) {
  on_ranks(3, [](ScoreReduction& reduction, std::uint32_t rank) {
    EXPECT_EQ(reduction.ranks(), 3U);
    for (int round = 0; round < 1000; ++round) {
      std::vector<double> sums = {static_cast<double>(rank + 1), static_cast<double>(round)};
      std::vector<float> means = {static_cast<float>(rank)};
      ASSERT_TRUE(reduction.sum(sums));
      ASSERT_TRUE(reduction.mean(means));
      ASSERT_EQ(sums, (std::vector<double>{6, 3.0 * round}));
      ASSERT_EQ(means, std::vector<float>{1});
    }
  });
}

TEST(ScoreReduction, RefusesWhatRanksDoNotHaveInCommon) {
  on_ranks(2, [](ScoreReduction& reduction, std::uint32_t rank) {
    std::vector<double> values(rank + 1, 7.0);
    EXPECT_EQ(reduction.sum(values).code(), Code::kInvalid);
    EXPECT_EQ(values, std::vector<double>(rank + 1, 7.0));
  });
  EXPECT_EQ(make_thread_reductions(0).error().code(), Code::kInvalid);
}

TEST(ScoreReduction, DoesNotWaitForARankThatIsGone) {
  auto reductions = make_thread_reductions(2);
  ASSERT_TRUE(reductions);
  Status status;
  std::thread waiting([&] {
    double value[1] = {1};
    status = (*reductions)[0]->sum(value);
  });
  (*reductions)[1].reset();
  waiting.join();
  EXPECT_EQ(status.code(), Code::kUnavailable);
}

}  // namespace
}  // namespace kvern
