#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "store/redis_object.h"
#include "store/redis_slots.h"
#include "store/redis_tier.h"
#include "store/remote_key.h"
#include "tests/store/fake_server.h"
#include "tests/store/tier_samples.h"

namespace kvern::testing {
namespace {

constexpr std::int64_t kMs = 1'000'000;
constexpr std::size_t kHalfMiB = std::size_t{512} << 10;

/// A tier whose breaker stays out of the way, so that each operation meets the fault.
RedisTierConfig patient(std::vector<std::string> nodes) {
  RedisTierConfig config;
  config.nodes = std::move(nodes);
  config.breaker.failures = 1000;
  config.breaker.stall_ns = 100'000 * kMs;
  return config;
}

RedisManifest manifest_of(const SampleObject& sample) {
  const auto bytes = sample.bytes();
  RedisManifest manifest{.bytes = bytes.size(), .checksums = {}};
  for (std::size_t at = 0; at < bytes.size(); at += kRedisPieceBytes) {
    manifest.checksums.push_back(checksum64(bytes.data() + at, std::min(kRedisPieceBytes, bytes.size() - at)));
  }
  return manifest;
}

/// Answers like a server that has this object, of one piece.
std::string answer_with(const SampleObject& sample, const FakeRedis::Command& command) {
  if (command.front() != "GET") return "";
  const auto bytes = sample.bytes();
  const bool piece = command[1].ends_with(":0");
  return FakeRedis::bulk(piece ? std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size())
                               : manifest_of(sample).encode());
}

std::string redirect(const char* kind, const SampleObject& sample, const FakeRedis& to) {
  const auto slot = redis_slot(remote_object_name("kvern", sample.key));
  return std::string("-") + kind + " " + std::to_string(slot) + " " + to.address() + "\r\n";
}

TEST(RedisTierFaults, FollowsMovedAndRemembersIt) {
  const SampleObject sample(1, 4, {8192});
  FakeRedis there([&](const FakeRedis::Command& command) { return answer_with(sample, command); });
  FakeRedis old([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    if (command.front() == "GET") return redirect("MOVED", sample, there);
    // The new map, which is asked for after MOVED, says the same.
    if (command.front() == "CLUSTER") {
      return "*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n" + FakeRedis::bulk("127.0.0.1") + ":" +
             std::to_string(there.count("PING") == 0 ? old.port() : there.port()) + "\r\n";
    }
    return "";
  });
  RedisTier tier(patient({old.address()}), Clock::system(), nullptr);
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
  const auto asked = old.count("GET");
  EXPECT_EQ(asked, 3U);
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
  EXPECT_EQ(old.count("GET"), asked);
}

TEST(RedisTierFaults, HonoursAskWithoutRememberingIt) {
  const SampleObject sample(1, 4, {8192});
  std::atomic<bool> allowed = false;  // one connection asks at a time here
  FakeRedis importing([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    if (command.front() == "ASKING") {
      allowed = true;
      return "+OK\r\n";
    }
    if (command.front() == "GET" && !allowed.exchange(false)) return "-ERR no ASKING came before\r\n";
    return answer_with(sample, command);
  });
  FakeRedis migrating([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    // The piece has moved, the manifest has not.
    if (command.front() == "GET" && command[1].ends_with(":0")) return redirect("ASK", sample, importing);
    return answer_with(sample, command);
  });
  RedisTier tier(patient({migrating.address()}), Clock::system(), nullptr);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
  EXPECT_EQ(migrating.count("GET"), 6U);
  EXPECT_EQ(importing.count("GET"), 2U);
}

TEST(RedisTierFaults, WritesPieceByPieceWhereASlotOnItsWayTakesNoTransaction) {
  const SampleObject sample(1, 4, {8192});
  std::atomic<bool> in_transaction = false;
  FakeRedis importing([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    if (command.front() == "MULTI") in_transaction = true;
    if (command.front() == "EXEC") {
      in_transaction = false;
      return "-TRYAGAIN Multiple keys request during rehashing of slot\r\n";
    }
    if (command.front() == "SET") return in_transaction ? "+QUEUED\r\n" : "+OK\r\n";
    if (command.front() == "EXISTS") return ":0\r\n";
    return command.front() == "GET" ? "$-1\r\n" : command.front() == "PING" ? "" : "+OK\r\n";
  });
  FakeRedis migrating([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    if (command.front() == "PING" || command.front() == "CLUSTER") return "";
    if (command.front() == "MULTI") return "+OK\r\n";
    if (command.front() == "EXEC") return "-EXECABORT Transaction discarded\r\n";
    return redirect("ASK", sample, importing);
  });
  RedisTier tier(patient({migrating.address()}), Clock::system(), nullptr);
  const auto written = write(tier, sample);
  EXPECT_TRUE(written) << written.to_string();
  EXPECT_EQ(importing.count("SET"), 4U);  // in vain, and once more
  EXPECT_EQ(importing.seen().back().at(1), redis_manifest_key(remote_object_name("kvern", sample.key)));
}

TEST(RedisTierFaults, NodesThatSendUsRoundInCirclesAreAnError) {
  const SampleObject sample(1, 4, {8192});
  FakeRedis* second = nullptr;
  FakeRedis first([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    return command.front() == "GET" ? redirect("MOVED", sample, *second) : "";
  });
  FakeRedis other([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    return command.front() == "GET" ? redirect("MOVED", sample, first) : "";
  });
  second = &other;
  RedisTier tier(patient({first.address()}), Clock::system(), nullptr);
  EXPECT_EQ(find(tier, {sample.query()}).error().code(), Code::kUnavailable);
}

TEST(RedisTierFaults, StrangersAndBrokenAnswersEndOperations) {
  const SampleObject sample(1, 4, {8192});
  for (const std::string answer :
       {"HTTP/1.1 400 Bad Request\r\n\r\n", "$-7\r\n", "*1\r\n", "$99999999999999\r\n", "\r\n", "-ERR what is this\r\n",
        ":1\r\n", "-LOADING the dataset\r\n", "-CLUSTERDOWN\r\n"}) {
    FakeRedis server([&](const FakeRedis::Command& command) -> std::optional<std::string> {
      return command.front() == "GET" ? answer : "";
    });
    auto config = patient({server.address()});
    config.find_timeout_ns = config.operation_timeout_ns = 300 * kMs;
    RedisTier tier(config, Clock::system(), nullptr);
    EXPECT_FALSE(has(tier, sample)) << answer;
    EXPECT_FALSE(read(tier, sample.hit())) << answer;
    EXPECT_FALSE(write(tier, sample)) << answer;
  }
}

RC_GTEST_PROP(RedisTierFaults, AnyBytesEndOperations, ()) {
  const auto noise = *rc::gen::container<std::string>(
      rc::gen::oneOf(rc::gen::elementOf(std::string("+-:$*\r\n0123456789")), rc::gen::arbitrary<char>()));
  FakeServer server([&](FakeConnection& connection) { connection.send(noise); });
  auto config = patient({server.address()});
  config.connect_timeout_ns = 200 * kMs;
  RedisTier tier(config, Clock::system(), nullptr);
  RC_ASSERT(!read(tier, SampleObject(1, 4, {4096}).hit()));
}

TEST(RedisTierFaults, AConnectionThatIsCutWithinAPieceIsAnErrorAndTheNextOneServes) {
  const SampleObject sample(1, 4, {8192});
  std::atomic<int> cuts = 1;
  FakeRedis server([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    const std::string answer = answer_with(sample, command);
    if (command.front() == "GET" && command[1].ends_with(":0") && cuts-- > 0) return std::nullopt;
    return answer;
  });
  RedisTier tier(patient({server.address()}), Clock::system(), nullptr);
  EXPECT_EQ(read(tier, sample.hit()).error().code(), Code::kUnavailable);
  // The connection comes back by itself; until then reads end at once.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  auto bytes = read(tier, sample.hit());
  while (!bytes && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
    bytes = read(tier, sample.hit());
  }
  EXPECT_EQ(bytes.value(), sample.bytes());
}

TEST(RedisTierFaults, AnObjectThatIsReplacedWhileItIsReadIsAMissAndStays) {
  const SampleObject old(1, 4, {8192}, 1);
  const SampleObject replacing(1, 4, {8192}, 2);
  std::atomic<int> looks = 0;
  FakeRedis server([&](const FakeRedis::Command& command) {
    const bool look = command.front() == "GET" && !command[1].ends_with(":0");
    return answer_with(look && ++looks > 1 ? replacing : old, command);
  });
  RedisTier tier(patient({server.address()}), Clock::system(), nullptr);
  EXPECT_EQ(read(tier, old.hit()).error().code(), Code::kNotFound);
  EXPECT_EQ(server.count("UNLINK"), 0U);
}

TEST(RedisTierFaults, ASilentServerCostsOneTimeoutAndNothingMore) {
  const SampleObject sample(1, 4, {8192});
  FakeRedis server([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    return command.front() == "GET" ? std::string(FakeRedis::kStall) : "";
  });
  auto config = patient({server.address()});
  config.find_timeout_ns = config.operation_timeout_ns = 100 * kMs;
  RedisTier tier(config, Clock::system(), nullptr);
  EXPECT_EQ(find(tier, {sample.query()}).error().code(), Code::kUnavailable);
  EXPECT_EQ(read(tier, sample.hit()).error().code(), Code::kUnavailable);
  EXPECT_EQ(write(tier, sample).code(), Code::kUnavailable);
}

TEST(RedisTierFaults, NobodyThereIsAnErrorAtOnce) {
  std::string address;
  {
    address = FakeServer([](FakeConnection&) {}).address();
  }
  RedisTier tier(patient({address}), Clock::system(), nullptr);
  EXPECT_EQ(find(tier, {SampleObject(1, 4, {4096}).query()}).error().code(), Code::kUnavailable);
}

TEST(RedisTierFaults, ANodeThatIsDownCostsItsOwnObjectsOnly) {
  const SampleObject sample(1, 4, {8192});
  const auto slot = redis_slot(remote_object_name("kvern", sample.key));
  std::string nowhere;
  {
    nowhere = std::to_string(FakeServer([](FakeConnection&) {}).port());
  }
  FakeRedis server([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    if (command.front() != "CLUSTER") return answer_with(sample, command);
    const auto range = [&](int first, int last, const std::string& port) {
      return "*3\r\n:" + std::to_string(first) + "\r\n:" + std::to_string(last) + "\r\n*2\r\n" +
             FakeRedis::bulk("127.0.0.1") + ":" + port + "\r\n";
    };
    return "*3\r\n" + range(0, slot - 1, nowhere) + range(slot, slot, std::to_string(server.port())) +
           range(slot + 1, 16383, nowhere);
  });
  RedisTier tier(patient({server.address()}), Clock::system(), nullptr);
  const auto hits = find(tier, {sample.query(), SampleObject(2, 4, {4096}).query()});
  ASSERT_TRUE(hits) << hits.error().to_string();
  EXPECT_EQ(hits->at(0).blocks, 4U);
  EXPECT_EQ(hits->at(1).bytes, 0U);
}

TEST(RedisTierFaults, ACancelledReadEndsAtOnceAndItsMemoryIsLeftAlone) {
  const SampleObject sample(1, 4, {kHalfMiB});
  std::promise<void> asked;
  std::promise<void> go_on;
  FakeRedis server([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    if (command.front() == "GET" && command[1].ends_with(":0")) {
      asked.set_value();
      go_on.get_future().wait();
    }
    return answer_with(sample, command);
  });
  RedisTier tier(patient({server.address()}), Clock::system(), nullptr);
  const AlignedBytes memory(kHalfMiB);
  std::stop_source cancel;
  std::promise<Status> ended;
  tier.read(sample.hit(), 0, memory.span(), cancel.get_token(),
            [&](Status status) { ended.set_value(std::move(status)); });
  asked.get_future().wait();
  cancel.request_stop();
  EXPECT_EQ(wait_for(ended.get_future()).code(), Code::kExpired);
  go_on.set_value();
  EXPECT_EQ(find(tier, {sample.query()}).value().front().blocks, 4U);
  EXPECT_TRUE(std::ranges::all_of(memory.span(), [](std::byte each) { return each == std::byte{0}; }));
}

TEST(RedisTierFaults, WhatIsCancelledBeforeItBeginsIsNotAskedFor) {
  FakeRedis server([&](const FakeRedis::Command&) { return ""; });
  RedisTier tier(patient({server.address()}), Clock::system(), nullptr);
  std::stop_source cancel;
  cancel.request_stop();
  EXPECT_EQ(find(tier, {SampleObject(1, 4, {4096}).query()}, cancel.get_token()).error().code(), Code::kExpired);
  EXPECT_EQ(server.count("GET"), 0U);
}

TEST(RedisTierFaults, EveryOperationEndsOnceWhenTheTierGoes) {
  const SampleObject sample(1, 4, {1 << 20});
  FakeRedis server([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    return command.front() == "PING" || command.front() == "CLUSTER" ? "" : std::string(FakeRedis::kStall);
  });
  auto config = patient({server.address()});
  config.concurrent_reads = config.concurrent_writes = 2;
  const AlignedBytes memory(1 << 20);
  std::vector<std::atomic<int>> ends(500);
  std::atomic<int> good = 0;
  {
    RedisTier tier(config, Clock::system(), nullptr);
    for (std::size_t i = 0; i < 500; i += 5) {
      const auto done = [&ends, &good, i](std::size_t which) {
        return [&ends, &good, i, which](const auto& result) {
          ++ends[i + which];
          good += static_cast<bool>(result) ? 1 : 0;
        };
      };
      tier.find({sample.query()}, {}, done(0));
      tier.read(sample.hit(), 0, memory.span(), {}, done(1));
      tier.write(sample.object(), done(2));
      tier.erase({sample.key, sample.key}, done(3));
      tier.erase_all(NamespaceSet::all(), done(4));
    }
  }
  for (const auto& each : ends) EXPECT_EQ(each, 1);
  EXPECT_EQ(good, 0);
}

TEST(RedisTierFaults, AFullWriteQueueIsBusy) {
  const SampleObject sample(1, 4, {1 << 20});
  FakeRedis server([&](const FakeRedis::Command& command) -> std::optional<std::string> {
    return command.front() == "PING" || command.front() == "CLUSTER" ? "" : std::string(FakeRedis::kStall);
  });
  auto config = patient({server.address()});
  config.write_queue_bytes = 3 << 20;
  config.write_queue_age_ns = 50 * kMs;
  config.concurrent_writes = 1;
  config.operation_timeout_ns = 60'000 * kMs;
  RedisTier tier(config, Clock::system(), nullptr);
  std::promise<Status> waited_too_long;
  tier.write(sample.object(), [](const Status&) {});
  tier.write(sample.object(), [&](Status status) { waited_too_long.set_value(std::move(status)); });
  tier.write(sample.object(), [](const Status&) {});
  EXPECT_EQ(write(tier, sample).code(), Code::kBusy);
  EXPECT_EQ(wait_for(waited_too_long.get_future()).code(), Code::kBusy);
}

TEST(RedisTierConfig, SaysWhatIsWrong) {
  const auto message = [](auto change) {
    auto config = patient({"127.0.0.1:1"});
    change(config);
    return config.validate().message();
  };
  EXPECT_EQ(message([](RedisTierConfig&) {}), "");
  EXPECT_NE(message([](RedisTierConfig& c) { c.nodes.clear(); }), "");
  EXPECT_NE(message([](RedisTierConfig& c) { c.nodes = {"host"}; }).find("host:port"), std::string::npos);
  EXPECT_NE(message([](RedisTierConfig& c) { c.prefix = "a*"; }).find("prefix"), std::string::npos);
  EXPECT_NE(message([](RedisTierConfig& c) { c.user = "u"; }).find("password"), std::string::npos);
  EXPECT_NE(message([](RedisTierConfig& c) { c.tls_ca_file = "x"; }).find("tls"), std::string::npos);
  EXPECT_THROW(RedisTier(RedisTierConfig(), Clock::system(), nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace kvern::testing
