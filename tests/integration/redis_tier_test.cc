#include "store/redis_tier.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <thread>

#include "base/executor.h"
#include "store/redis_connection.h"
#include "store/redis_object.h"
#include "store/redis_slots.h"
#include "store/remote_key.h"
#include "tests/integration/certificate.h"
#include "tests/integration/network_namespace.h"
#include "tests/integration/redis_servers.h"
#include "tests/store/tier_samples.h"

namespace kvern::testing {
namespace {

constexpr std::size_t kMiB = 1U << 20;

RedisTierConfig config_of(const RedisServer& server) {
  RedisTierConfig config;
  config.nodes = {server.address()};
  return config;
}

std::string manifest_key(const SampleObject& sample) {
  return redis_manifest_key(remote_object_name("kvern", sample.key));
}
std::string piece_key(const SampleObject& sample, std::size_t piece) {
  return redis_piece_key(remote_object_name("kvern", sample.key), piece);
}

// Objects of less than a piece, of pieces that end elsewhere than the containers, and of exactly a piece.
std::vector<SampleObject> some_objects() {
  std::vector<SampleObject> samples;
  samples.emplace_back(1, 4, std::vector<std::size_t>{4096});
  samples.emplace_back(2, 4, std::vector<std::size_t>{4096, 8192, kMiB});
  samples.emplace_back(3, 4, std::vector<std::size_t>{kMiB});
  samples.emplace_back(4, 4, std::vector<std::size_t>{3 * kMiB + 4096, 2 * kMiB});
  for (std::uint64_t prompt = 5; prompt < 20; ++prompt) samples.emplace_back(prompt, 4, std::vector<std::size_t>{8192});
  return samples;
}

void expect_round_trips(Tier& tier) {
  for (const auto& sample : some_objects()) {
    EXPECT_FALSE(has(tier, sample));
    const auto written = write(tier, sample);
    ASSERT_TRUE(written) << written.to_string();
    const auto hits = find(tier, {sample.query()});
    ASSERT_TRUE(hits) << hits.error().to_string();
    EXPECT_EQ(hits->front().key, sample.key);
    EXPECT_EQ(hits->front().bytes, sample.bytes().size());
    const auto bytes = read(tier, hits->front());
    ASSERT_TRUE(bytes) << bytes.error().to_string();
    EXPECT_EQ(*bytes, sample.bytes());
  }
}

class RedisTierOnOneServer : public ::testing::Test {
 protected:
  RedisServer server;
  RedisTier tier{config_of(server), Clock::system(), nullptr};
};

TEST_F(RedisTierOnOneServer, GivesBackWhatWasWritten) { expect_round_trips(tier); }

TEST_F(RedisTierOnOneServer, FindsTheLongestPrefixOfACell) {
  const SampleObject two(1, 2, {4096});
  const SampleObject three(1, 3, {8192});
  const SampleObject six(1, 6, {4096});
  const SampleObject other(2, 6, {4096});
  ASSERT_TRUE(write(tier, two));
  ASSERT_TRUE(write(tier, three));
  const auto hits = find(tier, {six.query(), other.query(), two.query()});
  ASSERT_TRUE(hits);
  EXPECT_EQ((*hits)[0].blocks, 3U);
  EXPECT_EQ((*hits)[0].bytes, 8192U);
  EXPECT_EQ((*hits)[0].key, three.key);
  EXPECT_EQ((*hits)[1].bytes, 0U);
  EXPECT_EQ((*hits)[2].key, two.key);
}

TEST_F(RedisTierOnOneServer, ReadsAnyRange) {
  const SampleObject sample(1, 4, {2 * kMiB + 4096, kMiB});
  const auto whole = sample.bytes();
  ASSERT_TRUE(write(tier, sample));
  for (const auto& [offset, bytes] : std::vector<std::pair<std::size_t, std::size_t>>{
           {0, 4096}, {4096, kMiB}, {kMiB, kMiB}, {kMiB - 4096, 2 * kMiB}, {3 * kMiB, 4096}, {2 * kMiB, kMiB + 4096}}) {
    const auto part = read(tier, sample.hit(), offset, bytes);
    ASSERT_TRUE(part) << offset << ": " << part.error().to_string();
    EXPECT_TRUE(std::equal(part->begin(), part->end(), whole.begin() + static_cast<std::ptrdiff_t>(offset)));
  }
}

TEST_F(RedisTierOnOneServer, SharesItsObjectsWithOtherDaemonsAndAfterARestart) {
  const SampleObject sample(1, 4, {kMiB + 4096});
  ASSERT_TRUE(write(tier, sample));
  RedisTier other(config_of(server), Clock::system(), nullptr);
  EXPECT_EQ(read(other, sample.hit()).value(), sample.bytes());
  auto elsewhere = config_of(server);
  elsewhere.prefix = "another/fleet";
  RedisTier stranger(elsewhere, Clock::system(), nullptr);
  EXPECT_FALSE(has(stranger, sample));
}

TEST_F(RedisTierOnOneServer, AReplacedObjectIsSeenWholeOrNotAtAll) {
  const SampleObject old(1, 4, {3 * kMiB}, 1);
  const SampleObject smaller(1, 4, {kMiB + 4096}, 2);
  ASSERT_TRUE(write(tier, old));
  ASSERT_TRUE(write(tier, smaller));
  EXPECT_EQ(read(tier, old.hit()).error().code(), Code::kNotFound);
  EXPECT_EQ(read(tier, smaller.hit()).value(), smaller.bytes());
  EXPECT_EQ(server.cli({"DBSIZE"}), "3\n") << "pieces of the old object are left";
}

TEST_F(RedisTierOnOneServer, TwoWritersOfOneKeyLeaveOneOfTheTwoObjects) {
  RedisTier other(config_of(server), Clock::system(), nullptr);
  for (std::uint64_t round = 0; round < 20; ++round) {
    const SampleObject mine(round, 4, {2 * kMiB}, 1);
    const SampleObject theirs(round, 4, {2 * kMiB}, 2);
    std::promise<Status> first;
    std::promise<Status> second;
    tier.write(mine.object(), [&](Status status) { first.set_value(std::move(status)); });
    other.write(theirs.object(), [&](Status status) { second.set_value(std::move(status)); });
    EXPECT_TRUE(wait_for(first.get_future()));
    EXPECT_TRUE(wait_for(second.get_future()));
    const auto bytes = read(tier, mine.hit()).value();
    EXPECT_TRUE(bytes == mine.bytes() || bytes == theirs.bytes());
  }
}

TEST_F(RedisTierOnOneServer, WhatIsThereAlreadyIsNotSentAgain) {
  const SampleObject sample(1, 4, {4 * kMiB});
  const auto received = [&] {
    const std::string text = server.cli({"INFO", "stats"});
    return std::stoull(text.substr(text.find("total_net_input_bytes:") + 22));
  };
  ASSERT_TRUE(write(tier, sample));
  const auto before = received();
  ASSERT_TRUE(write(tier, sample));
  EXPECT_LT(received() - before, kMiB);
}

TEST_F(RedisTierOnOneServer, AnObjectThatLostAPieceIsAMissAndGoes) {
  const SampleObject sample(1, 4, {3 * kMiB});
  ASSERT_TRUE(write(tier, sample));
  server.cli({"DEL", piece_key(sample, 1)});
  EXPECT_EQ(read(tier, sample.hit()).error().code(), Code::kNotFound);
  EXPECT_FALSE(has(tier, sample));
  ASSERT_TRUE(write(tier, sample));
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
}

TEST_F(RedisTierOnOneServer, AnObjectThatLostAPieceIsWrittenAnew) {
  const SampleObject sample(1, 4, {3 * kMiB});
  ASSERT_TRUE(write(tier, sample));
  server.cli({"DEL", piece_key(sample, 2)});
  ASSERT_TRUE(write(tier, sample));
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
}

TEST_F(RedisTierOnOneServer, DamagedPiecesAndManifestsAreNeverServed) {
  const SampleObject sample(1, 4, {2 * kMiB});
  ASSERT_TRUE(write(tier, sample));
  server.cli({"SETRANGE", piece_key(sample, 1), "77", "damage"});
  EXPECT_EQ(read(tier, sample.hit()).error().code(), Code::kCorrupt);
  EXPECT_FALSE(has(tier, sample));
  ASSERT_TRUE(write(tier, sample));
  server.cli({"SETRANGE", manifest_key(sample), "9", "damage"});
  EXPECT_FALSE(has(tier, sample));
  EXPECT_EQ(read(tier, sample.hit()).error().code(), Code::kCorrupt);
  ASSERT_TRUE(write(tier, sample));
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
}

TEST_F(RedisTierOnOneServer, KeysOfAnotherTypeAreAnErrorAndNoCrash) {
  const SampleObject sample(1, 4, {4096});
  server.cli({"LPUSH", manifest_key(sample), "a"});
  EXPECT_FALSE(has(tier, sample));
  EXPECT_EQ(read(tier, sample.hit()).error().code(), Code::kUnavailable);
  EXPECT_TRUE(write(tier, sample));
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
}

TEST_F(RedisTierOnOneServer, ErasesKeysAndNamespaces) {
  const SampleObject first(1, 4, {2 * kMiB});
  const SampleObject second(2, 4, {4096});
  const SampleObject foreign(3, 4, {4096}, 0, 9);
  for (const auto* sample : {&first, &second, &foreign}) ASSERT_TRUE(write(tier, *sample));
  EXPECT_EQ(list(tier, sample_namespace(1)),
            (Sizes{{first.key.to_string(), 2 * kMiB}, {second.key.to_string(), 4096}}));
  EXPECT_TRUE(erase(tier, {first.key, SampleObject(77, 1, {4096}).key}));
  EXPECT_FALSE(has(tier, first));
  EXPECT_TRUE(has(tier, second));
  EXPECT_TRUE(erase_all(tier, sample_namespace(1)));
  EXPECT_FALSE(has(tier, second));
  EXPECT_TRUE(has(tier, foreign));
  server.cli({"SET", "not-ours", "1"});
  EXPECT_TRUE(erase_all(tier, NamespaceSet::all()));
  EXPECT_EQ(server.cli({"KEYS", "*"}), "not-ours\n");
}

TEST_F(RedisTierOnOneServer, AllKeysExpireTogetherAndAReadPutsThatOff) {
  auto config = config_of(server);
  config.ttl_seconds = 1000;
  RedisTier expiring(config, Clock::system(), nullptr);
  const SampleObject sample(1, 4, {2 * kMiB});
  ASSERT_TRUE(write(expiring, sample));
  for (const auto& key : {manifest_key(sample), piece_key(sample, 0), piece_key(sample, 1)}) {
    EXPECT_GT(std::stoi(server.cli({"TTL", key})), 900);
    server.cli({"EXPIRE", key, "50"});
  }
  ASSERT_TRUE(read(expiring, sample.hit()));
  ASSERT_TRUE(write(expiring, SampleObject(2, 4, {4096})));  // on the same connection as the refresh, and behind it
  for (const auto& key : {manifest_key(sample), piece_key(sample, 0), piece_key(sample, 1)}) {
    EXPECT_GT(std::stoi(server.cli({"TTL", key})), 900);
  }
}

TEST_F(RedisTierOnOneServer, AFullServerIsBusyAndKeepsWhatItHas) {
  const SampleObject sample(1, 4, {kMiB});
  ASSERT_TRUE(write(tier, sample));
  server.cli({"CONFIG", "SET", "maxmemory", "3mb"});
  EXPECT_EQ(write(tier, SampleObject(2, 4, {8 * kMiB})).code(), Code::kBusy);
  EXPECT_FALSE(has(tier, SampleObject(2, 4, {8 * kMiB})));
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
}

TEST_F(RedisTierOnOneServer, DrainWaitsForEveryWrite) {
  std::vector<SampleObject> samples;
  for (std::uint64_t prompt = 0; prompt < 16; ++prompt) samples.emplace_back(prompt, 2, std::vector<std::size_t>{kMiB});
  std::atomic<int> good = 0;
  for (const auto& sample : samples) tier.write(sample.object(), [&](const Status& status) { good += status.is_ok(); });
  EXPECT_TRUE(tier.drain(30'000'000'000));
  EXPECT_EQ(good, 16);
  EXPECT_EQ(tier.stats().queued_bytes, 0U);
}

TEST(RedisTierAuthentication, TakesUsersAndPasswordsAndSaysWhenTheyAreWrong) {
  RedisServer server({"--user", "kv", "on", ">secret", "~{kvern/*", "+@read", "+@write", "+@transaction", "+@keyspace",
                      "+@connection", "+cluster|slots", "-@dangerous", "--user", "default", "off"});
  ASSERT_TRUE(server.ready());
  auto config = config_of(server);
  config.user = "kv";
  config.password = "secret";
  RedisTier tier(config, Clock::system(), nullptr);
  const SampleObject sample(1, 4, {4096});
  EXPECT_TRUE(write(tier, sample));
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
  EXPECT_TRUE(erase_all(tier, NamespaceSet::all()));
  EXPECT_FALSE(has(tier, sample));
  config.password = "another";
  RedisTier stranger(config, Clock::system(), nullptr);
  const auto refused = write(stranger, sample);
  EXPECT_EQ(refused.code(), Code::kUnavailable);
  EXPECT_NE(refused.message().find("WRONGPASS"), std::string::npos) << refused.message();
  EXPECT_EQ(refused.message().find("another"), std::string::npos) << refused.message();
}

/// A server that speaks TLS only, with clients that show the same certificate.
struct TlsServer {
  Certificate certificate;
  std::uint16_t port = free_port();
  RedisServer server{
      {"--port", "0", "--tls-port", std::to_string(port), "--tls-cert-file", certificate.file(), "--tls-key-file",
       certificate.key_file(), "--tls-ca-cert-file", certificate.file(), "--tls-auth-clients", "yes"},
      port};
};

TEST(RedisTierOverTls, ChecksTheCertificate) {
  TlsServer tls;
  auto& [certificate, port, server] = tls;
  ASSERT_TRUE(certificate.ready()) << certificate.text();
  ASSERT_TRUE(server.ready()) << server.process().text();
  auto config = config_of(server);
  config.tls = true;
  config.tls_ca_file = certificate.file();
  config.tls_certificate_file = certificate.file();
  config.tls_key_file = certificate.key_file();
  RedisTier tier(config, Clock::system(), nullptr);
  expect_round_trips(tier);

  config.tls_ca_file.clear();  // the system's authorities do not know this one
  RedisTier stranger(config, Clock::system(), nullptr);
  const auto refused = write(stranger, SampleObject(1, 4, {4096}));
  EXPECT_EQ(refused.code(), Code::kUnavailable);
  EXPECT_NE(refused.message().find("certificate"), std::string::npos) << refused.message();
  config.tls_ca_file = "/nowhere/nothing.pem";
  EXPECT_THROW(RedisTier(config, Clock::system(), nullptr), std::invalid_argument);
}

// What a full socket takes of a request is a record of TLS that has to go out whole, also when nobody wants its answer.
TEST(RedisConnectionOverTls, WhatIsAbandonedHalfSentIsSentToItsEnd) {
  TlsServer tls;
  ASSERT_TRUE(tls.server.ready()) << tls.server.process().text();
  const RedisConnectionSettings settings{
      .user = "",
      .password = "",
      .tls = TlsContext::create(tls.certificate.file(), tls.certificate.file(), tls.certificate.key_file()).value(),
      .connect_timeout_ns = 10'000'000'000};
  ThreadPool resolver("resolver", 1, 1);
  std::unique_ptr<RedisConnection> connection;
  EventLoop loop("test", Clock::system());
  const auto on_loop = [&](const std::function<void()>& task) {
    std::promise<void> done;
    ASSERT_TRUE(loop.post([&] {
      task();
      done.set_value();
    }));
    done.get_future().wait();
  };
  std::promise<Result<std::vector<RespValue>>> first, last;
  const auto batch_of = [&](RedisRequest request, std::promise<Result<std::vector<RespValue>>>* told) {
    auto batch = std::make_shared<RedisBatch>();
    auto hold = std::make_shared<RedisRequest>(std::move(request));
    batch->requests = {hold.get()};
    batch->hold = hold;
    batch->deadline_ns = Clock::system().now_ns() + 60'000'000'000;
    if (told != nullptr) batch->done = [told](auto replies) { told->set_value(std::move(replies)); };
    return batch;
  };
  on_loop([&] {
    connection =
        std::make_unique<RedisConnection>(loop, resolver, settings, RedisEndpoint{"127.0.0.1", tls.port}, [] {});
    connection->submit(batch_of(redis_command({"ECHO", "first"}), &first));
  });
  ASSERT_EQ(first.get_future().get().value().front().text, "first");
  tls.server.process().signal(SIGSTOP);
  std::vector<std::shared_ptr<RedisBatch>> many;
  for (int i = 0; i < 8192; ++i) many.push_back(batch_of(redis_command({"GET", std::string(4096, 'k')}), nullptr));
  on_loop([&] {
    for (const auto& batch : many) connection->submit(batch);
  });
  // Behind what the loop does next, which is to send until the socket is full.
  on_loop([&] {
    for (const auto& batch : many) batch->abandoned = true;
    connection->submit(batch_of(redis_command({"ECHO", "last"}), &last));
  });
  tls.server.process().signal(SIGCONT);
  const auto replies = last.get_future().get();
  ASSERT_TRUE(replies) << replies.error().to_string();
  EXPECT_EQ(replies->front().text, "last");
  on_loop([&] { connection.reset(); });
}

TEST(RedisTierOnAnotherHost, EndsOperationsWhileTheNetworkIsCutAndServesAfterwards) {
  if (::geteuid() != 0) GTEST_SKIP() << "network namespaces need root";
  const NetworkNamespace host;
  ASSERT_TRUE(host.ready());
  const std::uint16_t port = 6379;
  ChildProcess server(host.inside({REDIS_SERVER_PATH, "--bind", host.address(), "--port", std::to_string(port),
                                   "--protected-mode", "no", "--save", "", "--appendonly", "no"}));
  ASSERT_TRUE(server.says("Ready to accept connections")) << server.text();
  RedisTierConfig config;
  config.nodes = {host.address() + ":" + std::to_string(port)};
  config.find_timeout_ns = config.operation_timeout_ns = config.connect_timeout_ns = 300'000'000;
  config.breaker.open_max_ns = config.breaker.open_ns;
  RedisTier tier(config, Clock::system(), nullptr);
  const SampleObject sample(1, 4, {kMiB});
  const auto eventually = [&](const auto& condition) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!condition() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    return condition();
  };
  // A new device needs a moment.
  ASSERT_TRUE(eventually([&] { return write(tier, sample).is_ok(); }));
  EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());

  ASSERT_TRUE(host.cut());
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(find(tier, {sample.query()}).error().code(), Code::kUnavailable);
    EXPECT_EQ(read(tier, sample.hit()).error().code(), Code::kUnavailable);
    EXPECT_EQ(write(tier, SampleObject(2, 4, {kMiB})).code(), Code::kUnavailable);
  }
  EXPECT_EQ(tier.stats().breaker, BreakerState::kOpen);

  ASSERT_TRUE(host.connect());
  EXPECT_TRUE(eventually([&] { return has(tier, sample); }));
  EXPECT_TRUE(eventually([&] { return read(tier, sample.hit()) == sample.bytes(); }));
}

TEST(RedisTierOnACluster, GivesBackWhatWasWrittenFromAllNodes) {
  RedisClusterServers servers(3);
  ASSERT_TRUE(servers.ready()) << servers.text();
  RedisTier tier(config_of(servers.server(0)), Clock::system(), nullptr);
  expect_round_trips(tier);
  for (std::size_t i = 0; i < servers.size(); ++i) EXPECT_NE(servers.server(i).cli({"DBSIZE"}), "0\n");
  EXPECT_TRUE(erase_all(tier, NamespaceSet::all()));
  for (std::size_t i = 0; i < servers.size(); ++i) EXPECT_EQ(servers.server(i).cli({"DBSIZE"}), "0\n");
}

TEST(RedisTierOnACluster, ServesAgainOnceAReplicaHasTakenOver) {
  RedisClusterServers servers(3, 1);
  ASSERT_TRUE(servers.ready()) << servers.text();
  auto config = config_of(servers.server(0));
  for (std::size_t i = 1; i < servers.size(); ++i) config.nodes.push_back(servers.server(i).address());
  config.breaker.open_max_ns = config.breaker.open_ns;
  RedisTier tier(config, Clock::system(), nullptr);
  std::vector<SampleObject> samples;
  for (std::uint64_t prompt = 0; prompt < 12; ++prompt)
    samples.emplace_back(prompt, 2, std::vector<std::size_t>{65536});
  for (const auto& sample : samples) ASSERT_TRUE(write(tier, sample));
  // Replicas have to have what masters acknowledged, or there is nothing to be found.
  for (std::size_t i = 0; i < servers.size(); ++i) servers.server(i).cli({"WAIT", "1", "10000"});

  const auto slot = redis_slot(remote_object_name("kvern", samples[0].key));
  const std::string nodes = servers.server(0).cli({"CLUSTER", "SLOTS"});
  RedisServer* master = nullptr;
  for (std::size_t i = 0; i < servers.size(); ++i) {
    if (servers.server(i).cli({"GET", manifest_key(samples[0])}).starts_with("kvernRM1")) master = &servers.server(i);
  }
  ASSERT_NE(master, nullptr) << "nobody serves slot " << slot << ": " << nodes;
  master->process().kill();

  // Until the replica serves, its objects are errors or misses, and never anything else.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  bool all = false;
  while (!all && std::chrono::steady_clock::now() < deadline) {
    all = true;
    for (const auto& sample : samples) {
      const auto bytes = read(tier, sample.hit());
      all = all && bytes;
      if (bytes) {
        EXPECT_EQ(*bytes, sample.bytes());
      }
    }
  }
  EXPECT_TRUE(all);
  EXPECT_TRUE(write(tier, SampleObject(100, 2, {65536})));
}

TEST(RedisTierOnACluster, FollowsSlotsWhileTheyMove) {
  RedisClusterServers servers(3);
  ASSERT_TRUE(servers.ready()) << servers.text();
  RedisTier tier(config_of(servers.server(0)), Clock::system(), nullptr);
  std::vector<SampleObject> samples;
  for (std::uint64_t prompt = 0; prompt < 150; ++prompt)
    samples.emplace_back(prompt, 2, std::vector<std::size_t>{65536, 8192});
  for (const auto& sample : samples) ASSERT_TRUE(write(tier, sample));

  std::string to = servers.server(1).cli({"CLUSTER", "MYID"});
  to.pop_back();
  ChildProcess reshard({REDIS_CLI_PATH, "--cluster", "reshard", servers.server(0).address(), "--cluster-from", "all",
                        "--cluster-to", to, "--cluster-slots", "1500", "--cluster-yes", "--cluster-pipeline", "1"});
  std::jthread watcher;
  std::atomic<bool> moving = true;
  std::optional<int> code;
  watcher = std::jthread([&] {
    code = reshard.wait();
    moving = false;
  });
  std::uint64_t next = 1000;
  std::vector<SampleObject> written_meanwhile;
  std::size_t reads = 0;
  while (moving) {
    for (const auto& sample : samples) {
      const auto bytes = read(tier, sample.hit());
      // A key is on its way for a moment in which neither node has all of the object.
      ++reads;
      if (bytes) {
        EXPECT_EQ(*bytes, sample.bytes());
      } else {
        EXPECT_NE(bytes.error().code(), Code::kCorrupt);
      }
      if (!moving) break;
    }
    SampleObject sample(next++, 2, {65536, 8192});
    if (write(tier, sample)) written_meanwhile.push_back(std::move(sample));
  }
  watcher.join();
  ASSERT_EQ(code, 0) << reshard.text();
  std::size_t lost = 0;
  for (const auto& sample : samples) lost += has(tier, sample) ? 0U : 1U;
  EXPECT_EQ(lost, 0U) << "of " << reads << " reads";
  for (const auto& sample : written_meanwhile) EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes());
  EXPECT_GT(written_meanwhile.size(), 0U);
}

}  // namespace
}  // namespace kvern::testing
