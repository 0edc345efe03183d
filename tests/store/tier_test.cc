#include "store/tier.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/store/memory_tier.h"
#include "tests/store/stored_chunks.h"

namespace kvern {
namespace {

using std::chrono::milliseconds;
using testing::ChunkSpec;
using testing::MemoryTier;
using testing::PageAlignedBytes;

constexpr std::int64_t kMs = 1'000'000;

TEST(CircuitBreaker, OpensAfterFailuresInARowAndClosesAfterAGoodProbe) {
  CircuitBreaker breaker({.failures = 3, .stall_ns = 1000 * kMs, .open_ns = 100 * kMs, .open_max_ns = 300 * kMs});
  std::int64_t now = 1;
  breaker.failed(now);
  breaker.failed(now);
  breaker.succeeded();
  breaker.failed(now);
  breaker.failed(now);
  EXPECT_TRUE(breaker.allow(now, now)) << "not in a row";
  breaker.failed(now);
  EXPECT_EQ(breaker.state(), BreakerState::kOpen);
  EXPECT_FALSE(breaker.allow(now + 99 * kMs, now + 99 * kMs));
  now += 100 * kMs;
  EXPECT_TRUE(breaker.allow(now, now)) << "the probe";
  EXPECT_EQ(breaker.state(), BreakerState::kHalfOpen);
  EXPECT_FALSE(breaker.allow(now + 1, now)) << "one probe at a time";
  breaker.failed(now);
  EXPECT_FALSE(breaker.allow(now + 199 * kMs, now + 199 * kMs)) << "twice as long";
  now += 200 * kMs;
  EXPECT_TRUE(breaker.allow(now, now));
  breaker.failed(now);
  now += 300 * kMs;
  EXPECT_TRUE(breaker.allow(now, now)) << "no longer than the maximum";
  breaker.succeeded();
  EXPECT_EQ(breaker.state(), BreakerState::kClosed);
}

TEST(CircuitBreaker, LateGoodNewsDoNotCloseIt) {
  CircuitBreaker breaker({.failures = 1});
  breaker.failed(1);
  breaker.succeeded();
  EXPECT_EQ(breaker.state(), BreakerState::kOpen);
}

TEST(CircuitBreaker, AStallOpensItWhileItLasts) {
  CircuitBreaker breaker({.failures = 5, .stall_ns = 10 * kMs, .open_ns = 1 * kMs});
  EXPECT_TRUE(breaker.allow(9 * kMs, 0));
  EXPECT_FALSE(breaker.allow(10 * kMs, 0));
  EXPECT_EQ(breaker.state(), BreakerState::kOpen);
  EXPECT_FALSE(breaker.allow(50 * kMs, 0)) << "it still hangs";
  EXPECT_TRUE(breaker.allow(50 * kMs, 50 * kMs));
}

TEST(CircuitBreaker, LetsOneProbeThroughWhateverItIs) {
  CircuitBreaker breaker({.failures = 1, .stall_ns = 10 * kMs, .open_ns = 1 * kMs, .open_max_ns = 4 * kMs});
  breaker.failed(0);
  std::int64_t now = 1 * kMs;
  EXPECT_TRUE(breaker.allow(now, now));
  EXPECT_FALSE(breaker.allow(now, now)) << "a probe that nobody waits for is one, too";
  breaker.undecided();
  EXPECT_TRUE(breaker.allow(now, now)) << "the one before said nothing";
  now += 10 * kMs;
  EXPECT_FALSE(breaker.allow(now, now)) << "it took too long";
  EXPECT_EQ(breaker.state(), BreakerState::kOpen);
  EXPECT_FALSE(breaker.allow(now + 1 * kMs, now + 1 * kMs)) << "twice as long";
  now += 2 * kMs;
  EXPECT_TRUE(breaker.allow(now, now));
  breaker.succeeded();
  EXPECT_EQ(breaker.state(), BreakerState::kClosed);
  EXPECT_TRUE(breaker.allow(now, now));
  EXPECT_TRUE(breaker.allow(now, now));
}

TEST(CircuitBreaker, RefusesConfigurationsThatMakeNoSense) {
  EXPECT_THROW(CircuitBreaker({.failures = 0}), std::invalid_argument);
  EXPECT_THROW(CircuitBreaker({.open_ns = 2, .open_max_ns = 1}), std::invalid_argument);
}

struct Seen final : TierObserver {
  void finished(std::string_view tier, TierOperation operation, const Status& status, std::uint64_t bytes,
                double) override {
    events.push_back(std::string(tier) + " " + std::string(operation_name(operation)) + " " + code_name(status.code()) +
                     " " + std::to_string(bytes));
  }
  std::vector<std::string> events;
};

struct TierFixture {
  ManualClock clock;
  Seen seen;
  PageAlignedBytes page{8192};
  Status last{Code::kInternal, "nothing ended"};
  Tier::Done keep = [this](const Status& status) { last = status; };
  ChunkSpec spec{.prompt = 1};
  MemoryTier tier{clock, &seen, {.failures = 2, .stall_ns = 100 * kMs, .open_ns = 50 * kMs}};

  TierObject object() {
    return {.key = spec.info().key, .blocks = spec.info().block_hashes, .pieces = {page.span()}, .hold = nullptr};
  }
};

TEST(Tier, TellsItsObserverOfEveryOperation) {
  TierFixture f;
  f.tier.write(f.object(), f.keep);
  EXPECT_TRUE(f.last);
  f.tier.read({f.spec.info().key, 8192, 4}, 4096, f.page.span().first(4096), {}, f.keep);
  EXPECT_TRUE(f.last);
  f.tier.find({{f.spec.info().key.namespace_id, 0, f.spec.info().block_hashes}}, {}, [](const auto& hits) {
    ASSERT_TRUE(hits.has_value());
    EXPECT_EQ(hits->front().blocks, 4U);
    EXPECT_EQ(hits->front().bytes, 8192U);
  });
  f.tier.erase({f.spec.info().key}, f.keep);
  f.tier.read({f.spec.info().key, 8192, 4}, 0, f.page.span(), {}, f.keep);
  EXPECT_EQ(f.last.code(), Code::kNotFound);
  EXPECT_EQ(f.seen.events, (std::vector<std::string>{"memory write ok 8192", "memory read ok 4096", "memory find ok 0",
                                                     "memory erase ok 0", "memory read not found 0"}));
}

TEST(Tier, RefusesWhatIsNotAlignedOrOutside) {
  TierFixture f;
  const TierHit hit{f.spec.info().key, 8192, 4};
  f.tier.read(hit, 100, f.page.span(), {}, f.keep);
  EXPECT_EQ(f.last.code(), Code::kInvalid);
  f.tier.read(hit, 4096, f.page.span(), {}, f.keep);
  EXPECT_EQ(f.last.code(), Code::kInvalid);
  auto object = f.object();
  object.pieces = {f.page.span().subspan(8, 4096)};
  f.tier.write(object, f.keep);
  EXPECT_EQ(f.last.code(), Code::kInvalid);
  object = f.object();
  object.blocks.pop_back();
  f.tier.write(object, f.keep);
  EXPECT_EQ(f.last.code(), Code::kInvalid);
  EXPECT_EQ(f.tier.reads + f.tier.writes, 0U);
}

TEST(Tier, IsCutOffWhileItIsBroken) {
  TierFixture f;
  f.tier.broken = Status(Code::kUnavailable, "no route");
  f.tier.write(f.object(), f.keep);
  f.tier.write(f.object(), f.keep);
  EXPECT_EQ(f.tier.stats().breaker, BreakerState::kOpen);
  f.tier.write(f.object(), f.keep);
  EXPECT_EQ(f.last.code(), Code::kUnavailable);
  EXPECT_EQ(f.tier.writes, 2U) << "it is not asked any more";
  f.tier.broken = Status::ok();
  f.clock.advance(milliseconds(50));
  f.tier.write(f.object(), f.keep);
  EXPECT_TRUE(f.last);
  EXPECT_EQ(f.tier.stats().breaker, BreakerState::kClosed);
}

TEST(Tier, AMissOrAFullQueueIsNoFailure) {
  TierFixture f;
  for (const Code code : {Code::kNotFound, Code::kBusy, Code::kRefused, Code::kExpired}) {
    f.tier.broken = Status(code, "fine");
    for (int i = 0; i < 10; ++i) f.tier.write(f.object(), f.keep);
  }
  EXPECT_EQ(f.tier.stats().breaker, BreakerState::kClosed);
}

TEST(Tier, AHangingReadCutsItOffAndAQueuedWriteDoesNot) {
  TierFixture f;
  f.tier.immediate = false;
  f.tier.write(f.object(), f.keep);
  f.clock.advance(milliseconds(200));
  f.tier.read({f.spec.info().key, 8192, 4}, 0, f.page.span(), {}, f.keep);
  EXPECT_EQ(f.tier.reads, 1U);
  f.clock.advance(milliseconds(200));
  f.tier.read({f.spec.info().key, 8192, 4}, 0, f.page.span(), {}, f.keep);
  EXPECT_EQ(f.tier.reads, 1U);
  EXPECT_EQ(f.tier.stats().outstanding, 2U);
  EXPECT_EQ(f.tier.stats().breaker, BreakerState::kOpen);
}

TEST(Tier, HalfOpenOneWriteGoesThroughAndOnlyItCloses) {
  TierFixture f;
  f.tier.immediate = false;
  for (int i = 0; i < 3; ++i) f.tier.write(f.object(), f.keep);
  f.tier.broken = Status(Code::kUnavailable, "no route");
  f.tier.run();
  f.tier.run();
  ASSERT_EQ(f.tier.stats().breaker, BreakerState::kOpen);
  f.tier.broken = Status::ok();
  f.clock.advance(milliseconds(50));
  for (int i = 0; i < 3; ++i) f.tier.write(f.object(), f.keep);
  EXPECT_EQ(f.tier.stats().breaker, BreakerState::kHalfOpen);
  EXPECT_EQ(f.tier.stats().outstanding, 2U) << "an old one and the probe";
  f.tier.run();
  EXPECT_EQ(f.tier.stats().breaker, BreakerState::kHalfOpen) << "the old one says nothing of now";
  f.tier.run();
  EXPECT_EQ(f.tier.stats().breaker, BreakerState::kClosed);
}

}  // namespace
}  // namespace kvern
