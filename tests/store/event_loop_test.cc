#include "store/event_loop.h"

#include <gtest/gtest.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <memory>
#include <string>
#include <vector>

namespace kvern {
namespace {

TEST(EventLoop, RunsPostedTasksInOrderAndTheLastOneAtTheEnd) {
  std::vector<int> ran;
  EventLoop loop("test", Clock::system());
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(loop.post([&ran, i] { ran.push_back(i); }));
  loop.stop([&] { ran.push_back(100); });
  ASSERT_EQ(ran.size(), 101U);
  for (int i = 0; i <= 100; ++i) EXPECT_EQ(ran[static_cast<std::size_t>(i)], i);
  EXPECT_FALSE(loop.post([] {}));
}

TEST(EventLoop, RunsWhatIsLeftForLaterEvenWhenItStops) {
  bool ran = false;
  EventLoop loop("test", Clock::system());
  loop.stop([&] { loop.later([&] { loop.later([&] { ran = true; }); }); });
  EXPECT_TRUE(ran);
}

TEST(EventLoop, TimersFireInTheirOrderUnlessCancelled) {
  std::promise<std::string> all;
  std::string fired;
  EventLoop loop("test", Clock::system());
  ASSERT_TRUE(loop.post([&] {
    const std::int64_t now = loop.now_ns();
    loop.at(now + 3'000'000, [&] { all.set_value(fired + "c"); });
    const auto never = loop.at(now + 2'000'000, [&] { fired += "x"; });
    loop.at(now + 2'000'000, [&] { fired += "b"; });
    loop.at(now + 1'000'000, [&, never] {
      fired += "a";
      loop.cancel(never);
    });
  }));
  EXPECT_EQ(all.get_future().get(), "abc");
}

TEST(EventLoop, AWatchMayBeEndedByAnotherOneOfTheSameMoment) {
  int first[2];
  int second[2];
  ASSERT_EQ(::pipe(first), 0);
  ASSERT_EQ(::pipe(second), 0);
  std::atomic<int> calls = 0;
  EventLoop loop("test", Clock::system());
  std::promise<void> done;
  ASSERT_TRUE(loop.post([&] {
    auto ids = std::make_shared<std::pair<std::uint64_t, std::uint64_t>>();
    const auto watcher = [&, ids](std::uint32_t) {
      ++calls;
      loop.unwatch(ids->first);
      loop.unwatch(ids->second);
      loop.at(loop.now_ns() + 1'000'000, [&] { done.set_value(); });
    };
    ids->first = loop.watch(first[0], EPOLLIN, watcher);
    ids->second = loop.watch(second[0], EPOLLIN, watcher);
    ASSERT_EQ(::write(first[1], "a", 1), 1);
    ASSERT_EQ(::write(second[1], "a", 1), 1);
  }));
  done.get_future().wait();
  EXPECT_EQ(calls, 1);
  loop.stop([] {});
  for (const int fd : {first[0], first[1], second[0], second[1]}) ::close(fd);
}

}  // namespace
}  // namespace kvern
