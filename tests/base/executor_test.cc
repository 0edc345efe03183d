#include "base/executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>

namespace kvern {
namespace {

TEST(ThreadPool, RunsEverythingThatItAccepted) {
  std::atomic<int> ran{0};
  {
    ThreadPool pool("test", 2, 1000);
    for (int i = 0; i < 100; ++i) ASSERT_TRUE(pool.submit([&] { ++ran; }));
  }
  EXPECT_EQ(ran.load(), 100);
}

TEST(ThreadPool, RefusesWhenTheQueueIsFull) {
  std::latch started(1);
  std::latch release(1);
  ThreadPool pool("test", 1, 1);
  ASSERT_TRUE(pool.submit([&] {
    started.count_down();
    release.wait();
  }));
  started.wait();
  ASSERT_TRUE(pool.submit([] {}));
  EXPECT_FALSE(pool.submit([] {}));
  release.count_down();
  pool.drain();
  EXPECT_EQ(pool.queued(), 0U);
}

TEST(ManualExecutor, RunsOnlyWhenStepped) {
  ManualExecutor executor;
  int ran = 0;
  ASSERT_TRUE(executor.submit([&] { ++ran; }));
  EXPECT_EQ(ran, 0);
  EXPECT_TRUE(executor.step());
  EXPECT_EQ(ran, 1);
  EXPECT_FALSE(executor.step());
}

}  // namespace
}  // namespace kvern
