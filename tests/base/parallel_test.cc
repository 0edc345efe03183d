#include "base/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "base/executor.h"

namespace kvern {
namespace {

TEST(ParallelFor, RunsEveryIndexOnce) {
  ThreadPool pool("test", 3, 4);
  for (std::size_t count = 0; count < 200; ++count) {
    std::vector<std::atomic<int>> runs(count);
    parallel_for(&pool, count, [&](std::size_t i) { ++runs[i]; });
    for (const auto& times : runs) EXPECT_EQ(times, 1);
  }
}

TEST(ParallelFor, RunsAllByItselfWithoutAnExecutor) {
  std::size_t sum = 0;
  parallel_for(nullptr, 10, [&](std::size_t i) { sum += i; });
  EXPECT_EQ(sum, 45U);
}

TEST(ParallelFor, NeedsNothingOfAnExecutorThatRunsLate) {
  ManualExecutor executor;
  {
    std::vector<int> values(8);
    parallel_for(&executor, values.size(), [&](std::size_t i) { values[i] = 1; });
    EXPECT_EQ(values, std::vector<int>(8, 1));
  }
  executor.run_all();  // the helpers find nothing to do
}

TEST(ParallelFor, MayBeNestedOnOnePool) {
  ThreadPool pool("test", 2, 4);
  std::atomic<int> runs = 0;
  parallel_for(&pool, 6, [&](std::size_t) { parallel_for(&pool, 6, [&](std::size_t) { ++runs; }); });
  EXPECT_EQ(runs, 36);
}

}  // namespace
}  // namespace kvern
