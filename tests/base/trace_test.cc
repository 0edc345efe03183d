#include "base/trace.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/base/collected_spans.h"

namespace kvern {
namespace {

constexpr const char* kParent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

struct TraceTest : ::testing::Test {
  testing::CollectedSpans collected;
  ManualClock clock;
  Tracer tracer{collected, clock, 0};
};

TEST(TraceContextTest, ATraceparentComesBackAsItWas) {
  const auto context = TraceContext::parse(kParent);
  ASSERT_TRUE(context);
  EXPECT_EQ(context->trace_id_hex(), "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(context->span_id_hex(), "00f067aa0ba902b7");
  EXPECT_TRUE(context->sampled);
  EXPECT_EQ(context->traceparent(), kParent);
  EXPECT_FALSE(TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02")->sampled);
  EXPECT_TRUE(TraceContext::parse("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes")->sampled);
  EXPECT_EQ(trace_id_of(kParent), "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(trace_id_of("x"), "none");
}

TEST(TraceContextTest, WhatIsNoTraceparentIsNone) {
  const std::string good = kParent;
  for (std::size_t length = 0; length < good.size(); ++length) {
    EXPECT_FALSE(TraceContext::parse(good.substr(0, length))) << length;
  }
  for (std::size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = 'G';
    EXPECT_FALSE(TraceContext::parse(bad)) << at;
  }
  EXPECT_FALSE(TraceContext::parse(good + "-more"));  // version 00 has no more
  EXPECT_FALSE(TraceContext::parse("cc" + good.substr(2) + "more"));
  EXPECT_FALSE(TraceContext::parse("ff" + good.substr(2)));
  EXPECT_FALSE(TraceContext::parse("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"));
  EXPECT_FALSE(TraceContext::parse("00-00000000000000000000000000000000-00f067aa0ba902b7-01"));
  EXPECT_FALSE(TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"));
}

TEST_F(TraceTest, ASpanIsAChildOfWhoAsks) {
  const SpanPtr span = tracer.start("work", SpanKind::kServer, kParent);
  ASSERT_TRUE(span);
  clock.advance(std::chrono::nanoseconds(5));
  const SpanPtr part = span->child("part");
  part->set("kvern.tokens", 256U);
  part->set("kvern.tier", "nvme");
  clock.advance(std::chrono::nanoseconds(7));
  part->end(Status(Code::kNotFound, "gone"));
  span->end(Status::ok());
  span->end(Status(Code::kInternal, "a second end"));
  ASSERT_EQ(collected.spans.size(), 2U);
  const FinishedSpan &inner = collected.spans[0], &outer = collected.spans[1];
  EXPECT_EQ(outer.context.trace_id_hex(), "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(outer.parent_id, TraceContext::parse(kParent)->span_id);
  EXPECT_EQ(inner.context.trace_id, outer.context.trace_id);
  EXPECT_EQ(inner.parent_id, outer.context.span_id);
  EXPECT_NE(inner.context.span_id, outer.context.span_id);
  EXPECT_EQ(inner.end_ns - inner.start_ns, 7);
  EXPECT_EQ(outer.end_ns - outer.start_ns, 12);
  EXPECT_EQ(inner.status.code(), Code::kNotFound);
  EXPECT_TRUE(outer.status.is_ok());
  EXPECT_EQ(inner.attributes.at(0).number, 256U);
  EXPECT_EQ(inner.attributes.at(1).text, "nvme");
}

TEST_F(TraceTest, WhatTheEngineDoesNotRecordIsNotRecorded) {
  EXPECT_FALSE(tracer.start("work", SpanKind::kServer, "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"));
  EXPECT_FALSE(tracer.start("work", SpanKind::kServer, ""));
  EXPECT_FALSE(tracer.start("work", SpanKind::kServer, "no traceparent"));
  EXPECT_FALSE(child_of(nullptr, "part"));
}

TEST_F(TraceTest, OneInSoManyOfTheRestIsTheRootOfItsOwnTrace) {
  const Tracer all(collected, clock, 1);
  all.start("work", SpanKind::kServer, "")->end(Status::ok());
  ASSERT_EQ(collected.spans.size(), 1U);
  EXPECT_FALSE(collected.spans[0].parent_id);
  EXPECT_TRUE(TraceContext::parse(collected.spans[0].context.traceparent())) << "ids are not zero";
  const Tracer some(collected, clock, 10);
  int recorded = 0;
  for (int i = 0; i < 10'000; ++i) {
    if (const SpanPtr span = some.start("work", SpanKind::kServer, "")) {
      ++recorded;
      span->discard();
    }
  }
  EXPECT_GT(recorded, 700);  // ten standard deviations below 1000
  EXPECT_LT(recorded, 1300);
  EXPECT_EQ(collected.spans.size(), 1U) << "discarded ones are not told";
}

TEST_F(TraceTest, IdsDifferAcrossThreads) {
  constexpr int kThreads = 4, kEach = 1000;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([this] {
      for (int n = 0; n < kEach; ++n) tracer.start("work", SpanKind::kServer, kParent)->end(Status::ok());
    });
  }
  for (auto& thread : threads) thread.join();
  std::set<std::string> ids;
  for (const FinishedSpan& span : collected.spans) ids.insert(span.context.span_id_hex());
  EXPECT_EQ(ids.size(), std::size_t{kThreads * kEach});
}

TEST_F(TraceTest, ASpanThatNobodyHoldsAnyMoreHasEnded) {
  tracer.start("work", SpanKind::kServer, kParent).reset();
  EXPECT_EQ(collected.spans.size(), 1U);
}

}  // namespace
}  // namespace kvern
