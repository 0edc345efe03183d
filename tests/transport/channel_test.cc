#include "transport/channel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/executor.h"
#include "transport/ring.h"

namespace kvern {
namespace {

using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr std::chrono::milliseconds kPatience = 60s;

wire::HotRequest echo_request(const std::string& text) {
  wire::HotRequest request;
  request.mutable_match()->set_block_hashes(text);
  return request;
}

wire::HotReply echo_reply(const wire::HotRequest& request) {
  wire::HotReply reply;
  reply.mutable_matched()->set_present(request.match().block_hashes());
  return reply;
}

void echo(std::uint64_t /*session*/, wire::HotRequest request, HotReplyFunction reply) { reply(echo_reply(request)); }

class LambdaHandler final : public HotHandler {
 public:
  using Handle = std::function<void(std::uint64_t, wire::HotRequest, HotReplyFunction)>;
  explicit LambdaHandler(Handle handle) : handle_(std::move(handle)) {}
  void handle(std::uint64_t session_id, wire::HotRequest request, HotReplyFunction reply) override {
    handle_(session_id, std::move(request), std::move(reply));
  }
  void protocol_error(std::uint64_t session_id, const Status& why) override {
    if (on_error) on_error(session_id);
    const std::lock_guard lock(mutex_);
    errors_.emplace_back(session_id, why);
    changed_.notify_all();
  }
  bool wait_for_error() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [this] { return !errors_.empty(); });
  }
  std::vector<std::pair<std::uint64_t, Status>> errors() {
    const std::lock_guard lock(mutex_);
    return errors_;
  }
  std::function<void(std::uint64_t)> on_error;

 private:
  const Handle handle_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::pair<std::uint64_t, Status>> errors_;
};

Status push(RingProducer& producer, const std::string& frame) { return producer.push(std::as_bytes(std::span(frame))); }

/// The memory of one session, with both ends of it.
struct TestSession {
  explicit TestSession(std::uint64_t id_in, const SegmentLayout& layout = {})
      : id(id_in),
        memory(SharedMemory::create_anonymous("kvern-test", layout.total_bytes()).value()),
        view(SegmentView::create(memory.bytes(), layout, id, 1)),
        doorbell(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  std::unique_ptr<Channel> channel(const RingChannelConfig& config = {}) const {
    return make_ring_channel(view, UniqueFd(::dup(doorbell.get())), config);
  }
  // For clients that are no better than they need to be.
  RingProducer raw_producer() const {
    return {view.request_ring(), view.header().request_head, view.header().request_tail};
  }
  RingConsumer raw_consumer() const { return {view.reply_ring(), view.header().reply_head, view.header().reply_tail}; }
  void ring_doorbell() const { ::eventfd_write(doorbell.get(), 1); }
  Status push_raw(RingProducer& producer, const std::string& frame) const {
    Status status = push(producer, frame);
    ring_doorbell();
    return status;
  }
  std::optional<wire::HotReply> pop_raw(RingConsumer& consumer) const {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    std::string frame;
    while (std::chrono::steady_clock::now() < deadline) {
      if (consumer.empty()) {
        std::this_thread::yield();
        continue;
      }
      if (!consumer.pop(&frame).is_ok()) return std::nullopt;
      if (view.header().daemon_sleeping.exchange(0) != 0) ring_doorbell();
      wire::HotReply reply;
      return reply.ParseFromString(frame) ? std::optional(reply) : std::nullopt;
    }
    return std::nullopt;
  }

  const std::uint64_t id;
  SharedMemory memory;
  SegmentView view;
  UniqueFd doorbell;
};

Status call_echo(Channel& channel, const std::string& text, std::chrono::milliseconds timeout = kPatience) {
  auto request = echo_request(text);
  wire::HotReply reply;
  Status status = channel.call(request, &reply, timeout);
  if (!status) return status;
  if (Status said = to_status(reply.status()); !said) return said;
  EXPECT_EQ(reply.matched().present(), text);
  return status;
}

/// Replies that were kept back.
class Kept {
 public:
  void keep(HotReplyFunction reply) {
    const std::lock_guard lock(mutex_);
    replies_.push_back(std::move(reply));
    changed_.notify_all();
  }
  bool wait_for(std::size_t count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [this, count] { return replies_.size() >= count; });
  }
  std::vector<HotReplyFunction> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(replies_, {});
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<HotReplyFunction> replies_;
};

struct WaitCase {
  const char* name;
  std::uint32_t client_spin_us;
  std::uint32_t server_spin_us;
};
class RingChannelWaits : public ::testing::TestWithParam<WaitCase> {};
TEST_P(RingChannelWaits, NoCallIsLost) {
  LambdaHandler handler(echo);
  const TestSession session(1);
  RingServer server({.spin_us = GetParam().server_spin_us}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto channel = session.channel({.spin_us = GetParam().client_spin_us});
  for (int i = 0; i < 2000; ++i) {
    const Status status = call_echo(*channel, "message " + std::to_string(i));
    ASSERT_TRUE(status.is_ok()) << status.to_string();
  }
  EXPECT_TRUE(handler.errors().empty());
}
INSTANTIATE_TEST_SUITE_P(All, RingChannelWaits,
                         ::testing::Values(WaitCase{"BothSpin", 1000, 1000}, WaitCase{"BothSleep", 0, 0},
                                           WaitCase{"ServerSleeps", 50, 0}, WaitCase{"ClientSleeps", 0, 50}),
                         [](const auto& test) { return test.param.name; });

TEST(RingChannel, ManyThreadsGetTheirOwnAnswersInAnyOrder) {
  constexpr int kThreads = 8;
  constexpr int kCalls = 300;
  ThreadPool pool("answers", 3, 10000);
  LambdaHandler handler([&](std::uint64_t, wire::HotRequest request, HotReplyFunction reply) {
    auto answer = [request = std::move(request), reply = std::move(reply)] { reply(echo_reply(request)); };
    ASSERT_TRUE(pool.submit(std::move(answer)));
  });
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto channel = session.channel();
  std::vector<std::thread> threads;
  std::atomic<int> good = 0;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kCalls; ++i) {
        if (call_echo(*channel, std::to_string(t) + "/" + std::to_string(i)).is_ok()) ++good;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, kThreads * kCalls);
}

TEST(RingChannel, LargeMessagesPassBothWays) {
  LambdaHandler handler(echo);
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto channel = session.channel();
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(call_echo(*channel, std::string(kMaxMessageBytes - 100, static_cast<char>('a' + i))).is_ok());
  }
  auto request = echo_request(std::string(kMaxMessageBytes, 'x'));
  wire::HotReply reply;
  EXPECT_EQ(channel->call(request, &reply, kPatience).code(), Code::kInvalid);
  EXPECT_TRUE(call_echo(*channel, "still works").is_ok());
}

TEST(RingChannel, LateAnswerGoesToNobody) {
  Kept kept;
  LambdaHandler handler([&](std::uint64_t id, wire::HotRequest request, HotReplyFunction reply) {
    if (request.match().block_hashes() == "keep") return kept.keep(std::move(reply));
    echo(id, std::move(request), std::move(reply));
  });
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto channel = session.channel();
  auto request = echo_request("keep");
  wire::HotReply reply;
  const Status status = channel->call(request, &reply, 5ms);
  EXPECT_EQ(status.code(), Code::kUnavailable);
  EXPECT_THAT(status.message(), HasSubstr("5 ms"));
  ASSERT_TRUE(kept.wait_for(1));
  for (const auto& late : kept.take()) late(echo_reply(echo_request("late")));
  EXPECT_TRUE(call_echo(*channel, "next").is_ok());
  EXPECT_TRUE(channel->alive());
}

TEST(RingChannel, AGrantThatComesTooLateEndsWithTheSession) {
  Kept kept;
  LambdaHandler handler([&](std::uint64_t, wire::HotRequest, HotReplyFunction reply) { kept.keep(std::move(reply)); });
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  for (const bool reserve : {true, false}) {
    const auto channel = session.channel();
    wire::HotRequest request;
    if (reserve) {
      request.mutable_reserve();
    } else {
      request.mutable_fetch();
    }
    wire::HotReply reply;
    EXPECT_EQ(channel->call(request, &reply, 5ms).code(), Code::kUnavailable);
    EXPECT_FALSE(channel->alive());
  }
}

/// Runs calls that nobody answers on some threads, then does something, and returns what the calls came back with.
std::vector<Code> codes_of_waiting_calls(const std::function<void(const TestSession&, Channel&)>& then) {
  constexpr std::size_t kThreads = 5;
  Kept kept;
  LambdaHandler handler([&](std::uint64_t, wire::HotRequest, HotReplyFunction reply) { kept.keep(std::move(reply)); });
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto channel = session.channel();
  std::vector<Code> codes(kThreads, Code::kOk);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] { codes[t] = call_echo(*channel, "x", 1h).code(); });
  }
  EXPECT_TRUE(kept.wait_for(kThreads));
  then(session, *channel);
  for (auto& thread : threads) thread.join();
  EXPECT_FALSE(channel->alive());
  return codes;
}

TEST(RingChannel, CloseEndsAllWaits) {
  const auto codes = codes_of_waiting_calls([](const TestSession&, Channel& channel) { channel.close(); });
  EXPECT_THAT(codes, ::testing::Each(Code::kUnavailable));
}

TEST(RingChannel, ExpiredSessionEndsAllWaits) {
  const auto codes = codes_of_waiting_calls(
      [](const TestSession& session, Channel&) { session.view.set_state(SessionState::kExpired); });
  EXPECT_THAT(codes, ::testing::Each(Code::kExpired));
}

TEST(RingChannel, GarbageFromTheDaemonEndsTheChannel) {
  const auto codes = codes_of_waiting_calls([](const TestSession& session, Channel&) {
    session.view.header().reply_head += 4;
    session.view.set_state(SessionState::kStopping);
  });
  EXPECT_THAT(codes, ::testing::Each(Code::kUnavailable));
}

TEST(RingChannel, CallsAfterTheEndFailAtOnce) {
  const TestSession session(1);
  const auto channel = session.channel();
  session.view.set_state(SessionState::kExpired);
  EXPECT_EQ(call_echo(*channel, "x").code(), Code::kExpired);
  channel->close();
  EXPECT_EQ(call_echo(*channel, "x").code(), Code::kUnavailable);
}

TEST(RingChannel, FullRequestRingEndsInATimeOut) {
  const TestSession session(1, {.hazard_capacity = 16, .request_ring_bytes = 1024, .reply_ring_bytes = 1024});
  const auto channel = session.channel();  // and no server
  EXPECT_EQ(call_echo(*channel, std::string(700, 'x'), 1ms).code(), Code::kUnavailable);
  const Status status = call_echo(*channel, std::string(700, 'x'), 5ms);
  EXPECT_EQ(status.code(), Code::kUnavailable);
  EXPECT_THAT(status.message(), HasSubstr("full"));
}

// More calls at once than either ring has room for: the threads that cannot send must still let replies be taken.
TEST(RingChannel, TinyRingsStillPassEverything) {
  LambdaHandler handler(echo);
  const TestSession session(1, {.hazard_capacity = 16, .request_ring_bytes = 1024, .reply_ring_bytes = 1024});
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto channel = session.channel();
  std::vector<std::thread> threads;
  std::atomic<int> good = 0;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        if (call_echo(*channel, std::string(300, static_cast<char>('a' + t))).is_ok()) ++good;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, 6 * 200);
}

TEST(RingServer, GoesToSleepWhenThereIsNothingToDo) {
  LambdaHandler handler(echo);
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto channel = session.channel();
  ASSERT_TRUE(call_echo(*channel, "x").is_ok());
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (session.view.header().daemon_sleeping.load() == 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_EQ(session.view.header().daemon_sleeping.load(), kDaemonAwaitsRequest);
  EXPECT_TRUE(call_echo(*channel, "y").is_ok());
}

TEST(RingServer, RequestsThatWaitedBeforeAddAreServed) {
  LambdaHandler handler(echo);
  const TestSession session(1);
  auto producer = session.raw_producer();
  auto consumer = session.raw_consumer();
  auto request = echo_request("early");
  request.set_id(5);
  ASSERT_TRUE(push(producer, request.SerializeAsString()).is_ok());
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto reply = session.pop_raw(consumer);
  ASSERT_TRUE(reply);
  EXPECT_EQ(reply->id(), 5u);
  EXPECT_EQ(reply->matched().present(), "early");
}

TEST(RingServer, TooManyUnansweredRequestsAreBusy) {
  Kept kept;
  LambdaHandler handler([&](std::uint64_t, wire::HotRequest, HotReplyFunction reply) { kept.keep(std::move(reply)); });
  const TestSession session(1);
  RingServer server({.max_in_flight = 3}, handler);
  server.add(1, session.view, session.doorbell.get());
  auto producer = session.raw_producer();
  auto consumer = session.raw_consumer();
  for (std::uint64_t id = 1; id <= 4; ++id) {
    auto request = echo_request("x");
    request.set_id(id);
    ASSERT_TRUE(session.push_raw(producer, request.SerializeAsString()).is_ok());
  }
  const auto busy = session.pop_raw(consumer);
  ASSERT_TRUE(busy);
  EXPECT_EQ(busy->id(), 4u);
  EXPECT_EQ(to_status(busy->status()).code(), Code::kBusy);
  for (const auto& reply : kept.take()) reply({});
  for (std::uint64_t id = 1; id <= 3; ++id) EXPECT_EQ(session.pop_raw(consumer)->id(), id);
  auto request = echo_request("x");
  request.set_id(5);
  ASSERT_TRUE(session.push_raw(producer, request.SerializeAsString()).is_ok());
  ASSERT_TRUE(kept.wait_for(1));
  for (const auto& reply : kept.take()) reply({});
  EXPECT_EQ(session.pop_raw(consumer)->id(), 5u);
}

TEST(RingServer, DroppedRequestIsAnsweredAndSecondAnswersAreIgnored) {
  LambdaHandler handler([](std::uint64_t, wire::HotRequest request, HotReplyFunction reply) {
    if (request.match().block_hashes() == "drop") return;
    reply(echo_reply(request));
    reply(echo_reply(echo_request("again")));
  });
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  const auto channel = session.channel();
  EXPECT_EQ(call_echo(*channel, "drop").code(), Code::kInternal);
  EXPECT_TRUE(call_echo(*channel, "once").is_ok());
  EXPECT_TRUE(call_echo(*channel, "and then").is_ok());
}

TEST(RingServer, AnswerThatIsTooLargeBecomesAnError) {
  LambdaHandler handler([](std::uint64_t, wire::HotRequest, HotReplyFunction reply) {
    wire::HotReply answer;
    answer.mutable_matched()->set_present(std::string(kMaxMessageBytes, 'x'));
    reply(std::move(answer));
  });
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  EXPECT_EQ(call_echo(*session.channel(), "x").code(), Code::kInvalid);
}

TEST(RingServer, OversizedRequestIsAnsweredWithoutBeingParsed) {
  LambdaHandler handler(echo);
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  auto producer = session.raw_producer();
  auto consumer = session.raw_consumer();
  auto request = echo_request(std::string(kMaxMessageBytes, 'x'));
  request.set_id(9);
  ASSERT_TRUE(session.push_raw(producer, request.SerializeAsString()).is_ok());
  const auto reply = session.pop_raw(consumer);
  ASSERT_TRUE(reply);
  EXPECT_EQ(reply->id(), 9u);
  EXPECT_EQ(to_status(reply->status()).code(), Code::kInvalid);
  EXPECT_TRUE(handler.errors().empty());
}

struct HostileCase {
  const char* name;
  std::function<void(const TestSession&)> attack;
};
class RingServerHostile : public ::testing::TestWithParam<HostileCase> {};
TEST_P(RingServerHostile, IsReportedOnceAndOthersAreNotDisturbed) {
  LambdaHandler handler(echo);
  const TestSession bad(1);
  const TestSession good(2);
  RingServer server({}, handler);
  server.add(1, bad.view, bad.doorbell.get());
  server.add(2, good.view, good.doorbell.get());
  const auto channel = good.channel();
  ASSERT_TRUE(call_echo(*channel, "before").is_ok());
  GetParam().attack(bad);
  bad.ring_doorbell();
  ASSERT_TRUE(handler.wait_for_error());
  for (int i = 0; i < 100; ++i) {
    GetParam().attack(bad);
    bad.ring_doorbell();
    ASSERT_TRUE(call_echo(*channel, "after").is_ok());
  }
  const auto errors = handler.errors();
  ASSERT_EQ(errors.size(), 1u);
  EXPECT_EQ(errors[0].first, 1u);
  server.remove(1);
  EXPECT_TRUE(call_echo(*channel, "after removal").is_ok());
}
INSTANTIATE_TEST_SUITE_P(
    All, RingServerHostile,
    ::testing::Values(
        HostileCase{"HeadTooFar", [](const TestSession& s) { s.view.header().request_head = std::uint64_t{1} << 40; }},
        HostileCase{"HeadUnaligned", [](const TestSession& s) { s.view.header().request_head = 12345; }},
        HostileCase{"EmptyFrameWithWrongChecksum", [](const TestSession& s) { s.view.header().request_head += 8; }},
        HostileCase{"NoMessage",
                    [](const TestSession& s) {
                      auto producer = s.raw_producer();
                      (void)push(producer, "\xff\xff\xff\xff");
                    }},
        HostileCase{"OversizedAndNoMessage",
                    [](const TestSession& s) {
                      auto producer = s.raw_producer();
                      (void)push(producer, std::string(kMaxMessageBytes + 1, '\x7f'));
                    }},
        HostileCase{"ReplyTailImpossible",
                    [](const TestSession& s) {
                      s.view.header().reply_tail = 8;
                      auto producer = s.raw_producer();
                      (void)push(producer, echo_request("x").SerializeAsString());
                    }}),
    [](const auto& test) { return test.param.name; });

// The client sends and sends and takes nothing: the daemon neither blocks nor keeps more than a bound, and nothing is
// lost when the client comes to its senses.
TEST(RingServer, FullReplyRingDelaysOnlyItsOwnClient) {
  LambdaHandler handler(echo);
  const TestSession slow(1, {.hazard_capacity = 16, .request_ring_bytes = 1U << 16, .reply_ring_bytes = 1024});
  const TestSession other(2);
  RingServer server({}, handler);
  server.add(1, slow.view, slow.doorbell.get());
  server.add(2, other.view, other.doorbell.get());
  auto producer = slow.raw_producer();
  auto consumer = slow.raw_consumer();
  constexpr std::uint64_t kRequests = 200;
  for (std::uint64_t id = 1; id <= kRequests; ++id) {
    auto request = echo_request(std::string(100, 'x'));
    request.set_id(id);
    ASSERT_TRUE(slow.push_raw(producer, request.SerializeAsString()).is_ok());
  }
  const auto channel = other.channel();
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(call_echo(*channel, "x").is_ok());
  for (std::uint64_t id = 1; id <= kRequests; ++id) {
    const auto reply = slow.pop_raw(consumer);
    ASSERT_TRUE(reply) << id;
    EXPECT_EQ(reply->id(), id);
  }
  EXPECT_TRUE(handler.errors().empty());
}

TEST(RingServer, ClientThatTakesNoRepliesIsEndedAtTheBound) {
  Kept kept;
  LambdaHandler handler([&](std::uint64_t, wire::HotRequest, HotReplyFunction reply) { kept.keep(std::move(reply)); });
  const TestSession session(1);
  RingServer server({}, handler);
  server.add(1, session.view, session.doorbell.get());
  auto producer = session.raw_producer();
  constexpr std::size_t kRequests = 24;
  for (std::size_t i = 0; i < kRequests; ++i) {
    ASSERT_TRUE(session.push_raw(producer, echo_request("x").SerializeAsString()).is_ok());
  }
  ASSERT_TRUE(kept.wait_for(kRequests));
  for (const auto& reply : kept.take()) reply(echo_reply(echo_request(std::string(kMaxMessageBytes - 100, 'x'))));
  ASSERT_TRUE(handler.wait_for_error());
  EXPECT_THAT(handler.errors()[0].second.message(), HasSubstr("does not take its replies"));
}

TEST(RingServer, NothingIsTouchedAfterRemove) {
  Kept kept;
  std::atomic<int> handled = 0;
  LambdaHandler handler([&](std::uint64_t, wire::HotRequest, HotReplyFunction reply) {
    ++handled;
    kept.keep(std::move(reply));
  });
  RingServer server({}, handler);
  {
    TestSession session(1);
    server.add(1, session.view, session.doorbell.get());
    EXPECT_THROW(server.add(1, session.view, session.doorbell.get()), std::invalid_argument);
    auto producer = session.raw_producer();
    ASSERT_TRUE(session.push_raw(producer, echo_request("x").SerializeAsString()).is_ok());
    ASSERT_TRUE(kept.wait_for(1));
    server.remove(1);
    server.remove(1);
    ASSERT_TRUE(session.push_raw(producer, echo_request("x").SerializeAsString()).is_ok());
  }  // unmapped: whoever touches it now crashes
  for (const auto& late : kept.take()) late({});
  const TestSession next(1);
  server.add(1, next.view, next.doorbell.get());
  auto producer = next.raw_producer();
  ASSERT_TRUE(next.push_raw(producer, echo_request("x").SerializeAsString()).is_ok());
  ASSERT_TRUE(kept.wait_for(1));
  EXPECT_EQ(handled, 2);
  server.remove(1);
}

TEST(RingServer, RemoveUnderFireIsSafe) {
  ThreadPool pool("late", 2, 100000);
  LambdaHandler handler([&](std::uint64_t, wire::HotRequest request, HotReplyFunction reply) {
    auto answer = [request = std::move(request), reply = std::move(reply)] { reply(echo_reply(request)); };
    ASSERT_TRUE(pool.submit(std::move(answer)));
  });
  RingServer server({}, handler);
  for (int round = 0; round < 50; ++round) {
    TestSession session(7);
    server.add(7, session.view, session.doorbell.get());
    const auto channel = session.channel();
    std::atomic<int> answered = 0;
    std::thread client([&] {
      while (call_echo(*channel, "x").is_ok()) ++answered;
    });
    while (answered < 5) std::this_thread::yield();
    server.remove(7);
    channel->close();
    client.join();
  }
}

TEST(RingServer, HandlerMayRemoveTheSessionItIsCalledFor) {
  RingServer* server_pointer = nullptr;
  std::map<std::uint64_t, std::unique_ptr<TestSession>> sessions;
  const auto end = [&](std::uint64_t id) {
    server_pointer->remove(id);
    sessions.erase(id);  // unmapped while the server's thread is still in the call
  };
  LambdaHandler handler([&](std::uint64_t id, wire::HotRequest, HotReplyFunction) {
    end(id);
    handler.protocol_error(0, Status(Code::kInternal, "ended"));
  });
  handler.on_error = [&](std::uint64_t id) {
    if (id != 0) end(id);
  };
  for (const bool by_error : {false, true}) {
    RingServer server({}, handler);
    server_pointer = &server;
    const std::size_t errors_before = handler.errors().size();
    sessions[1] = std::make_unique<TestSession>(1);
    TestSession& session = *sessions[1];
    auto producer = session.raw_producer();
    // Before add(), since the memory may be gone at any moment after it.
    const std::string frame = by_error ? "\xff" : echo_request("x").SerializeAsString();
    ASSERT_TRUE(push(producer, frame).is_ok());
    server.add(1, session.view, session.doorbell.get());
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (handler.errors().size() == errors_before && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
    EXPECT_EQ(handler.errors().size(), errors_before + 1);
  }
  EXPECT_TRUE(sessions.empty());
}

TEST(RingServer, ManySessionsAreServedSideBySide) {
  constexpr std::uint64_t kSessions = 20;
  LambdaHandler handler(echo);
  std::vector<std::unique_ptr<TestSession>> sessions;
  RingServer server({}, handler);
  std::vector<std::thread> clients;
  std::atomic<int> good = 0;
  for (std::uint64_t id = 0; id < kSessions; ++id) {
    sessions.push_back(std::make_unique<TestSession>(id));
    server.add(id, sessions.back()->view, sessions.back()->doorbell.get());
    clients.emplace_back([&good, session = sessions.back().get(), id] {
      const auto channel = session->channel();
      for (int i = 0; i < 100; ++i) {
        if (call_echo(*channel, std::to_string(id) + ":" + std::to_string(i)).is_ok()) ++good;
      }
    });
  }
  for (auto& client : clients) client.join();
  EXPECT_EQ(good, static_cast<int>(kSessions) * 100);
}

}  // namespace
}  // namespace kvern
