#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "store/frequency_sketch.h"
#include "store/reuse_model.h"

namespace kvern {
namespace {

TEST(FrequencySketch, CountsWhatItHasRoomFor) {
  FrequencySketch sketch(15);
  sketch.grow(1000);
  for (std::uint64_t each = 0; each < 40; ++each) {
    for (std::uint64_t use = 0; use < each; ++use) EXPECT_EQ(sketch.add(each), std::min<std::uint64_t>(use, 15));
  }
  for (std::uint64_t each = 0; each < 40; ++each) EXPECT_EQ(sketch.estimate(each), std::min<std::uint64_t>(each, 15));
}

TEST(FrequencySketch, KeepsCountsWhenItGrows) {
  FrequencySketch sketch(3);
  sketch.grow(100);
  for (std::uint64_t each = 0; each < 30; ++each) {
    for (std::uint64_t use = 0; use < each % 4; ++use) sketch.add(each);
  }
  sketch.grow(10'000);
  for (std::uint64_t each = 0; each < 30; ++each) EXPECT_EQ(sketch.estimate(each), each % 4);
}

TEST(FrequencySketch, ForgetsHalfInTime) {
  FrequencySketch sketch(15);
  sketch.grow(128);
  for (int use = 0; use < 8; ++use) sketch.add(1);
  for (std::uint64_t other = 100; sketch.estimate(1) == 8 && other < 1000; ++other) sketch.add(other);
  EXPECT_EQ(sketch.estimate(1), 4U);
}

RC_GTEST_PROP(FrequencySketch, NeverCountsTooLittle, (const std::vector<std::uint8_t>& uses)) {
  FrequencySketch sketch(3);
  sketch.grow(4096);
  std::map<std::uint64_t, std::uint32_t> counts;
  for (const std::uint64_t each : uses) {
    RC_ASSERT(sketch.add(each) >= std::min(3U, counts[each]));
    ++counts[each];
  }
}

TEST(ReuseModel, AgeStepsGrowByTheSquareRootOfTwo) {
  EXPECT_EQ(ReuseModel::age_step(0), 0U);
  EXPECT_EQ(ReuseModel::age_step(15), 0U);
  EXPECT_EQ(ReuseModel::age_step(16), 1U);
  EXPECT_EQ(ReuseModel::age_step(22), 1U);
  EXPECT_EQ(ReuseModel::age_step(23), 2U);
  EXPECT_EQ(ReuseModel::age_step(32), 3U);
  EXPECT_EQ(ReuseModel::age_step(~std::uint64_t{0}), ReuseModel::kAges - 1);
}

TEST(ReuseModel, OrdersLikeLruBeforeItHasSeenAnything) {
  const ReuseModel model;
  for (std::size_t each = 0; each < ReuseModel::kClasses; ++each) {
    for (std::size_t step = 1; step < ReuseModel::kAges; ++step) {
      EXPECT_LT(model.worth(each, step), model.worth(each, step - 1));
    }
  }
}

TEST(ReuseModel, CountsUsesIntoClasses) {
  ReuseModel model;
  model.set_stored(100);
  for (std::size_t use = 0; use < 6; ++use) EXPECT_EQ(model.use(5), std::min<std::size_t>(use, 3));
  EXPECT_EQ(model.use(6), 0U);
  EXPECT_EQ(model.now(), 7U);
}

// Everything comes back after 700 uses: who is half-way is worth more than who is new, and who is overdue least.
TEST(ReuseModel, LearnsAPause) {
  ReuseModel model;
  model.set_stored(300);
  for (std::uint64_t use = 0; use < 20'000; ++use) model.use(use % 700);
  const auto worth = [&model](std::uint64_t age) { return model.worth(3, ReuseModel::age_step(age)); };
  EXPECT_LT(worth(0), worth(300));
  EXPECT_LT(worth(300), worth(500));
  EXPECT_LT(worth(3000), worth(0));
}

// What is used once is never used again, what is used twice is used often.
TEST(ReuseModel, LearnsThatUsedOnesAreUsedAgain) {
  ReuseModel model;
  model.set_stored(300);
  std::mt19937_64 random(3);
  for (std::uint64_t use = 0; use < 20'000; ++use) model.use(use % 2 == 0 ? random() % 100 : 1000 + use);
  EXPECT_GT(model.worth(3, 0), 20 * model.worth(0, 0));
}

// Against counting over the whole history, and the definition of the index.
RC_GTEST_PROP(ReuseModel, AgreesWithANaiveOne, (std::uint16_t seed)) {
  constexpr std::uint64_t kUses = 1024;  // within the shortest horizon, at a moment of estimation
  ReuseModel model;
  std::mt19937_64 random(seed);
  const std::uint64_t names = 20 + random() % 600;
  struct Use {
    std::uint64_t name;
    std::size_t chunk_class;
  };
  std::vector<Use> uses;
  // Estimates are renewed every 256 uses, of what came until then.
  for (std::uint64_t i = 0; i < kUses; ++i) {
    const std::uint64_t name = random() % 3 == 0 ? i % 97 : random() % names;
    uses.push_back({name, model.use(name)});
  }
  std::array<std::uint64_t, ReuseModel::kAges + 1> begins{};
  for (std::uint64_t age = 0, step = 0; step <= 12; ++age) {
    if (ReuseModel::age_step(age) == step) begins[step++] = age;
  }
  std::array<std::array<double, ReuseModel::kAges>, ReuseModel::kClasses> reached{};
  std::array<std::array<double, ReuseModel::kAges>, ReuseModel::kClasses> used{};
  const std::uint64_t last = model.now() - model.now() % 256;
  for (std::uint64_t i = 0; i < last; ++i) {
    std::uint64_t next = i + 1;
    while (next < last && uses[next].name != uses[i].name) ++next;
    const bool comes_back = next < last;
    const std::uint64_t age = (comes_back ? next : last - 1) - i;
    for (std::size_t step = 0; step <= ReuseModel::age_step(age); ++step) reached[uses[i].chunk_class][step] += 1;
    if (comes_back) used[uses[i].chunk_class][ReuseModel::age_step(age)] += 1;
  }
  // The likeliest class of those that were used often: its worth from the definition, with the same priors.
  for (std::size_t each = 0; each < ReuseModel::kClasses; ++each) {
    double left = 1, found = 0, time = 0, best = 0;
    for (std::size_t step = 0; step < 12; ++step) {
      double all_reached = 20, all_used = step == 0 ? 2 : 0.4;
      for (std::size_t other = 0; other < ReuseModel::kClasses; ++other) {
        all_reached += reached[other][step];
        all_used += used[other][step];
      }
      const double hazard = (used[each][step] + 20 * all_used / all_reached) / (reached[each][step] + 20);
      const double length = static_cast<double>(begins[step + 1] - begins[step]) * (step == 0 ? 0.75 : 1);
      found += left * std::min(hazard, 0.999);
      time += left * length * (1 - std::min(hazard, 0.999) / 2);
      left *= 1 - std::min(hazard, 0.999);
      best = std::max(best, found / time);
    }
    RC_ASSERT(model.worth(each, 0) >= best * 0.999);
    RC_ASSERT(model.worth(each, 0) <= best * 1.001 + 1e-4);
  }
}

}  // namespace
}  // namespace kvern
