#include "transport/ring.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "base/keys.h"

namespace kvern {
namespace {

struct TestRing {
  explicit TestRing(std::size_t size, std::uint64_t start = 0) : bytes(size), head(start), tail(start) {}
  std::vector<std::byte> bytes;
  std::atomic<std::uint64_t> head;
  std::atomic<std::uint64_t> tail;
  RingProducer producer() { return {bytes, head, tail}; }
  RingConsumer consumer() { return {bytes, head, tail}; }
};

std::span<const std::byte> as_bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

Code pop_code(RingConsumer& consumer) {
  std::string payload;
  return consumer.pop(&payload).code();
}

void write_frame_header(TestRing& ring, std::size_t at, std::uint32_t length, std::uint32_t checksum) {
  std::memcpy(ring.bytes.data() + at, &length, 4);
  std::memcpy(ring.bytes.data() + at + 4, &checksum, 4);
}

std::uint32_t checksum_of(const std::string& payload) {
  return static_cast<std::uint32_t>(checksum64(payload.data(), payload.size()));
}

TEST(Ring, DeliversInOrderIncludingEmptyFrames) {
  TestRing ring(1024);
  auto producer = ring.producer();
  auto consumer = ring.consumer();
  EXPECT_TRUE(consumer.empty());
  EXPECT_EQ(pop_code(consumer), Code::kNotFound);
  ASSERT_TRUE(producer.push(as_bytes("one")).is_ok());
  ASSERT_TRUE(producer.push(as_bytes("")).is_ok());
  ASSERT_TRUE(producer.push(as_bytes("three")).is_ok());
  std::string payload;
  EXPECT_FALSE(consumer.empty());
  ASSERT_TRUE(consumer.pop(&payload).is_ok());
  EXPECT_EQ(payload, "one");
  ASSERT_TRUE(consumer.pop(&payload).is_ok());
  EXPECT_EQ(payload, "");
  ASSERT_TRUE(consumer.pop(&payload).is_ok());
  EXPECT_EQ(payload, "three");
  EXPECT_TRUE(consumer.empty());
}

TEST(Ring, TakesAFrameOfExactlyItsSizeAndNoLarger) {
  TestRing ring(1024);
  auto producer = ring.producer();
  auto consumer = ring.consumer();
  EXPECT_EQ(producer.push(as_bytes(std::string(1017, 'x'))).code(), Code::kInvalid);
  ASSERT_TRUE(producer.push(as_bytes(std::string(1016, 'x'))).is_ok());
  EXPECT_EQ(producer.push(as_bytes("")).code(), Code::kBusy);
  std::string payload;
  ASSERT_TRUE(consumer.pop(&payload).is_ok());
  EXPECT_EQ(payload, std::string(1016, 'x'));
  EXPECT_TRUE(producer.push(as_bytes("")).is_ok());
}

TEST(Ring, SizeMustBeAPowerOfTwo) {
  TestRing ring(1000);
  EXPECT_THROW(ring.producer(), std::invalid_argument);
  EXPECT_THROW(ring.consumer(), std::invalid_argument);
}

TEST(Ring, FrameThatWasNotFinishedIsNeverSeen) {
  TestRing ring(1024);
  auto consumer = ring.consumer();
  // All that push() does before it dies: bytes in the ring, and no new head.
  write_frame_header(ring, 0, 4, checksum_of("torn"));
  std::memcpy(ring.bytes.data() + 8, "torn", 4);
  EXPECT_TRUE(consumer.empty());
  EXPECT_EQ(pop_code(consumer), Code::kNotFound);
}

// A hostile writer of the head.
struct HeadCase {
  const char* name;
  std::uint64_t head;
};
class RingHostileHead : public ::testing::TestWithParam<HeadCase> {};
TEST_P(RingHostileHead, IsReportedOnceAndClosesTheRing) {
  TestRing ring(1024, 512);
  auto consumer = ring.consumer();
  ring.head = GetParam().head;
  EXPECT_EQ(pop_code(consumer), Code::kCorrupt);
  ring.head = 512;
  EXPECT_EQ(pop_code(consumer), Code::kUnavailable);
  EXPECT_TRUE(consumer.empty());
  EXPECT_EQ(ring.tail.load(), 512u);
}
INSTANTIATE_TEST_SUITE_P(All, RingHostileHead,
                         ::testing::Values(HeadCase{"Behind", 504}, HeadCase{"TooFar", 512 + 1032},
                                           HeadCase{"Unaligned", 513}, HeadCase{"Zero", 0},
                                           HeadCase{"Largest", ~std::uint64_t{0}}),
                         [](const auto& test) { return test.param.name; });

// A hostile reader of the replies.
class RingHostileTail : public ::testing::TestWithParam<HeadCase> {};
TEST_P(RingHostileTail, IsReportedOnceAndClosesTheRing) {
  TestRing ring(1024, 2048);
  auto producer = ring.producer();
  ring.tail = GetParam().head;
  EXPECT_EQ(producer.push(as_bytes("x")).code(), Code::kCorrupt);
  ring.tail = 2048;
  EXPECT_EQ(producer.push(as_bytes("x")).code(), Code::kUnavailable);
  EXPECT_EQ(ring.head.load(), 2048u);
}
INSTANTIATE_TEST_SUITE_P(All, RingHostileTail,
                         ::testing::Values(HeadCase{"Ahead", 2056}, HeadCase{"TooFarBehind", 2048 - 1032},
                                           HeadCase{"Unaligned", 2047}, HeadCase{"Zero", 0},
                                           HeadCase{"Largest", ~std::uint64_t{0}}),
                         [](const auto& test) { return test.param.name; });

TEST(Ring, LengthBeyondWhatWasWrittenIsCorrupt) {
  for (const std::uint32_t length : {9U, 1024U, 0x7fffffffU, 0xfffffff8U, 0xffffffffU}) {
    TestRing ring(1024);
    auto consumer = ring.consumer();
    write_frame_header(ring, 0, length, 0);
    ring.head = 16;
    EXPECT_EQ(pop_code(consumer), Code::kCorrupt) << length;
  }
}

TEST(Ring, WrongChecksumIsCorrupt) {
  TestRing ring(1024);
  auto producer = ring.producer();
  auto consumer = ring.consumer();
  ASSERT_TRUE(producer.push(as_bytes("payload")).is_ok());
  ring.bytes[9] ^= std::byte{1};
  EXPECT_EQ(pop_code(consumer), Code::kCorrupt);
}

TEST(Ring, PositionsMayPassTheEndOfTheirNumbers) {
  TestRing ring(1024, ~std::uint64_t{0} - 63 - 448);
  auto producer = ring.producer();
  auto consumer = ring.consumer();
  for (int i = 0; i < 100; ++i) {
    const std::string sent = "message " + std::to_string(i);
    ASSERT_TRUE(producer.push(as_bytes(sent)).is_ok());
    std::string received;
    ASSERT_TRUE(consumer.pop(&received).is_ok());
    ASSERT_EQ(received, sent);
  }
}

RC_GTEST_PROP(RingProperty, BehavesLikeAQueueOfBoundedBytes, ()) {
  const std::size_t size = std::size_t{1} << *rc::gen::inRange(4, 12);
  TestRing ring(size, *rc::gen::inRange<std::uint64_t>(0, 1000) * 8);
  auto producer = ring.producer();
  auto consumer = ring.consumer();
  std::deque<std::string> model;
  std::size_t model_bytes = 0;
  const auto cost = [](const std::string& text) { return 8 + (text.size() + 7) / 8 * 8; };
  const int steps = *rc::gen::inRange(1, 400);
  for (int step = 0; step < steps; ++step) {
    if (*rc::gen::arbitrary<bool>()) {
      const auto length = *rc::gen::inRange<std::size_t>(0, size / 2);
      const std::string text(length, static_cast<char>(*rc::gen::inRange(0, 256)));
      const Status status = producer.push(as_bytes(text));
      if (model_bytes + cost(text) <= size) {
        RC_ASSERT(status.is_ok());
        model.push_back(text);
        model_bytes += cost(text);
      } else {
        RC_ASSERT(status.code() == Code::kBusy || (cost(text) > size && status.code() == Code::kInvalid));
      }
    } else {
      std::string text;
      const Status status = consumer.pop(&text);
      RC_ASSERT(status.is_ok() == !model.empty());
      if (model.empty()) {
        RC_ASSERT(status.code() == Code::kNotFound);
      } else {
        RC_ASSERT(text == model.front());
        model_bytes -= cost(model.front());
        model.pop_front();
      }
    }
    RC_ASSERT(consumer.empty() == model.empty());
  }
}

// Whatever the peer writes anywhere, whatever comes out bears a right checksum, and the ring ends closed or drained.
RC_GTEST_PROP(RingProperty, HostileMutationsNeverDeliverUncheckedBytesNorRunForEver, ()) {
  const std::size_t size = std::size_t{1} << *rc::gen::inRange(4, 10);
  TestRing ring(size);
  auto producer = ring.producer();
  auto consumer = ring.consumer();
  const auto frames = *rc::gen::container<std::vector<std::string>>(rc::gen::string<std::string>());
  for (const auto& frame : frames) {
    if (!producer.push(as_bytes(frame))) break;
  }
  for (int i = *rc::gen::inRange(0, 8); i > 0; --i) {
    ring.bytes[*rc::gen::inRange<std::size_t>(0, size)] = static_cast<std::byte>(*rc::gen::inRange(0, 256));
  }
  if (*rc::gen::arbitrary<bool>()) ring.head = *rc::gen::inRange<std::uint64_t>(0, 3 * size);
  std::string payload;
  std::size_t taken = 0;
  Status status;
  while ((status = consumer.pop(&payload)).is_ok()) {
    const std::uint64_t end = ring.tail.load();
    RC_ASSERT(end <= size);
    taken += 8 + (payload.size() + 7) / 8 * 8;
    RC_ASSERT(taken == end);
    std::uint32_t checksum = 0;
    std::memcpy(&checksum, ring.bytes.data() + end - (8 + (payload.size() + 7) / 8 * 8) + 4, 4);
    RC_ASSERT(checksum == checksum_of(payload));
  }
  RC_ASSERT(status.code() == Code::kNotFound || status.code() == Code::kCorrupt);
  if (status.code() == Code::kCorrupt) {
    RC_ASSERT(consumer.pop(&payload).code() == Code::kUnavailable);
  }
}

TEST(Ring, TwoThreadsPassManyFramesUnharmed) {
  constexpr int kFrames = 20000;
  TestRing ring(4096);
  std::thread writer([&] {
    auto producer = ring.producer();
    for (int i = 0; i < kFrames; ++i) {
      const std::string text = std::to_string(i) + std::string(static_cast<std::size_t>(i * 37 % 900), 'p');
      while (producer.push(as_bytes(text)).code() == Code::kBusy) std::this_thread::yield();
    }
  });
  auto consumer = ring.consumer();
  std::string text;
  int received = 0;
  while (received < kFrames) {
    const Status status = consumer.pop(&text);
    if (status.code() == Code::kNotFound) {
      std::this_thread::yield();
      continue;
    }
    ASSERT_TRUE(status.is_ok()) << status.to_string();
    ASSERT_EQ(text, std::to_string(received) + std::string(static_cast<std::size_t>(received * 37 % 900), 'p'));
    ++received;
  }
  writer.join();
}

}  // namespace
}  // namespace kvern
