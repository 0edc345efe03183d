#include "store/transfer_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <functional>
#include <future>
#include <random>
#include <string>
#include <vector>

namespace kvern {
namespace {

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kNever = std::int64_t{1} << 62;

/// A queue and the loop it belongs to. The test's own steps run on the loop's thread, behind the timers that are due.
class TransferQueueTest : public ::testing::Test {
 protected:
  void on_loop(const std::function<void()>& step) {
    std::promise<void> done;
    ASSERT_TRUE(loop.post([&] {
      step();
      done.set_value();
    }));
    done.get_future().wait();
  }

  /// Transfers that write their names down: r1 when it starts, "r1: why" when it is given up.
  std::uint64_t read(TransferQueue& queue, const std::string& name) {
    return queue.read([this, name] { told.push_back(name); },
                      [this, name](const Status& why) { told.push_back(name + ": " + why.message()); });
  }
  void write(TransferQueue& queue, const std::string& name) {
    queue.write([this, name] { told.push_back(name); },
                [this, name](const Status& why) { told.push_back(name + ": " + why.message()); });
  }

  using Names = std::vector<std::string>;
  Names told;
  ManualClock clock;
  EventLoop loop{"test", clock};
};

TEST_F(TransferQueueTest, StartsSoManyAtOnceInTheirOrder) {
  TransferQueue queue(loop, "S3", {.concurrent_reads = 2, .concurrent_writes = 1, .write_age_ns = kNever});
  on_loop([&] {
    for (const char* name : {"r1", "r2", "r3", "r4"}) read(queue, name);
    EXPECT_EQ(told, (Names{"r1", "r2"}));
    queue.read_ended();
    EXPECT_EQ(told, (Names{"r1", "r2", "r3"}));
    queue.read_ended();
    queue.read_ended();
    EXPECT_EQ(told, (Names{"r1", "r2", "r3", "r4"}));
  });
}

TEST_F(TransferQueueTest, WritesStartOnlyWhileNoReadWaits) {
  TransferQueue queue(loop, "S3", {.concurrent_reads = 1, .concurrent_writes = 1, .write_age_ns = kNever});
  on_loop([&] {
    read(queue, "r1");
    const auto waiting = read(queue, "r2");
    write(queue, "w1");
    write(queue, "w2");
    EXPECT_EQ(told, (Names{"r1"}));
    EXPECT_TRUE(queue.withdraw(waiting));
    EXPECT_EQ(told, (Names{"r1", "w1"})) << "nothing waits that a prompt waits for";
    read(queue, "r3");
    queue.write_ended();
    EXPECT_EQ(told, (Names{"r1", "w1"}));
    queue.read_ended();
    EXPECT_EQ(told, (Names{"r1", "w1", "r3", "w2"}));
  });
}

TEST_F(TransferQueueTest, WhatHasStartedCannotBeWithdrawn) {
  TransferQueue queue(loop, "S3", {.concurrent_reads = 1, .concurrent_writes = 1, .write_age_ns = kNever});
  on_loop([&] {
    const auto started = read(queue, "r1");
    EXPECT_FALSE(queue.withdraw(started));
    const auto waiting = read(queue, "r2");
    EXPECT_TRUE(queue.withdraw(waiting));
    EXPECT_FALSE(queue.withdraw(waiting));
    queue.read_ended();
    EXPECT_EQ(told, (Names{"r1"}));
  });
}

TEST_F(TransferQueueTest, GivesUpWritesThatWaitForTooLongAndNoOthers) {
  TransferQueue queue(loop, "Redis", {.concurrent_reads = 1, .concurrent_writes = 1, .write_age_ns = kSecond});
  on_loop([&] {
    write(queue, "started");
    write(queue, "old");
  });
  clock.advance(std::chrono::milliseconds(600));
  on_loop([&] { write(queue, "younger"); });
  clock.advance(std::chrono::milliseconds(500));
  const std::string why = ": Redis takes writes more slowly than they come; this one has waited too long";
  on_loop([&] { EXPECT_EQ(told, (Names{"started", "old" + why})); });
  clock.advance(std::chrono::milliseconds(500));
  on_loop([&] {
    EXPECT_EQ(told, (Names{"started", "old" + why, "younger" + why}));
    write(queue, "next");
    queue.write_ended();
    EXPECT_EQ(told.back(), "next") << "what has started is not given up";
  });
}

TEST_F(TransferQueueTest, ClosedItGivesUpWhatWaitsAndWhatComes) {
  TransferQueue queue(loop, "S3", {.concurrent_reads = 1, .concurrent_writes = 1, .write_age_ns = kNever});
  on_loop([&] {
    read(queue, "r1");
    read(queue, "r2");
    write(queue, "w1");
    queue.close({Code::kUnavailable, "closing"});
    queue.read_ended();
    read(queue, "r3");
    write(queue, "w2");
    EXPECT_EQ(told, (Names{"r1", "r2: closing", "w1: closing", "r3: closing", "w2: closing"}));
  });
}

TEST_F(TransferQueueTest, TransfersThatEndAtOnceDoNotNest) {
  TransferQueue queue(loop, "S3", {.concurrent_reads = 1, .concurrent_writes = 1, .write_age_ns = kNever});
  int depth = 0;
  int deepest = 0;
  int ran = 0;
  const auto fail = [](const Status&) { FAIL(); };
  on_loop([&] {
    const auto quick = [&](void (TransferQueue::*ended)()) {
      return [&, ended] {
        deepest = std::max(deepest, ++depth);
        ++ran;
        (queue.*ended)();
        --depth;
      };
    };
    queue.read([] {}, fail);
    for (int i = 0; i < 10'000; ++i) queue.read(quick(&TransferQueue::read_ended), fail);
    for (int i = 0; i < 10'000; ++i) queue.write(quick(&TransferQueue::write_ended), fail);
    EXPECT_EQ(ran, 0);
    queue.read_ended();
  });
  EXPECT_EQ(ran, 20'000);
  EXPECT_EQ(deepest, 1);
}

/// Whatever comes and goes: limits hold, each kind starts in its order, no write starts while a read waits, and what
/// could start has started.
TEST_F(TransferQueueTest, KeepsItsRulesUnderRandomTraffic) {
  std::mt19937 random(7);
  for (int round = 0; round < 30; ++round) {
    const TransferLimits limits{.concurrent_reads = 1 + static_cast<std::uint32_t>(random() % 4),
                                .concurrent_writes = 1 + static_cast<std::uint32_t>(random() % 4),
                                .write_age_ns = kNever};
    TransferQueue queue(loop, "S3", limits);
    std::deque<std::uint64_t> waiting_reads;
    std::deque<int> waiting_writes;
    std::size_t reads = 0;
    std::size_t writes = 0;
    int next = 0;
    const auto fail = [](const Status&) { FAIL(); };
    on_loop([&] {
      for (int step = 0; step < 400; ++step) {
        switch (random() % 5) {
          case 0: {
            const bool at_once = waiting_reads.empty() && reads < limits.concurrent_reads;
            if (!at_once) waiting_reads.push_back(0);
            const std::uint64_t id = queue.read(
                [&] {
                  if (!waiting_reads.empty()) waiting_reads.pop_front();
                  ++reads;
                },
                fail);
            if (!at_once) waiting_reads.back() = id;
            break;
          }
          case 1: {
            const int number = next++;
            waiting_writes.push_back(number);
            queue.write(
                [&, number] {
                  EXPECT_EQ(waiting_writes.front(), number);
                  EXPECT_TRUE(waiting_reads.empty());
                  waiting_writes.pop_front();
                  ++writes;
                },
                fail);
            break;
          }
          case 2:
            if (reads > 0) {
              --reads;
              queue.read_ended();
            }
            break;
          case 3:
            if (writes > 0) {
              --writes;
              queue.write_ended();
            }
            break;
          default:
            if (!waiting_reads.empty()) {
              const std::size_t which = random() % waiting_reads.size();
              const std::uint64_t id = waiting_reads[which];
              waiting_reads.erase(waiting_reads.begin() + static_cast<std::ptrdiff_t>(which));
              EXPECT_TRUE(queue.withdraw(id));
            }
        }
        EXPECT_LE(reads, limits.concurrent_reads);
        EXPECT_LE(writes, limits.concurrent_writes);
        EXPECT_TRUE(waiting_reads.empty() || reads == limits.concurrent_reads);
        EXPECT_TRUE(waiting_writes.empty() || writes == limits.concurrent_writes || !waiting_reads.empty());
      }
    });
  }
}

}  // namespace
}  // namespace kvern
