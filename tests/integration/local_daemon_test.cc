#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>
#include <tuple>

#include "tests/integration/child_process.h"
#include "tests/integration/daemon_process.h"
#include "tests/integration/daemon_test.h"
#include "tests/integration/local_client.h"

namespace kvern {
namespace {

namespace fs = std::filesystem;
using testing::ChildProcess;
using testing::eventually;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::kBlocksPerChunk;
using testing::kPatience;
using testing::LocalClient;

/// The body of a page, and its first line.
std::string http_get(std::uint16_t port, const std::string& path) {
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return "";
  const std::string request = "GET " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
  if (::send(fd.get(), request.data(), request.size(), 0) < 0) return "";
  std::string text;
  char buffer[4096];
  for (ssize_t bytes = 0; (bytes = ::recv(fd.get(), buffer, sizeof buffer, 0)) > 0;) {
    text.append(buffer, static_cast<std::size_t>(bytes));
  }
  return text;
}

std::uint16_t free_port() {
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  EXPECT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length);
  return ntohs(address.sin_port);
}

class LocalDaemonTest : public testing::DaemonTest {
 protected:
  std::vector<std::string> settings() const override { return {"--store.dram_bytes=64MiB"}; }

  /// What the daemon says of the session with that name; null when there is none.
  nlohmann::json session_of(LocalClient& client, const std::string& name) {
    const nlohmann::json report = status(client);
    for (const auto& session : report.at("sessions")) {
      if (session.at("client_name") == name) return session;
    }
    return nullptr;
  }
};

TEST_F(LocalDaemonTest, WhatOneClientStoresAnotherFindsAndLoads) {
  start();
  const auto writer = connect("writer");
  ASSERT_TRUE(writer->store(1, 8));
  ASSERT_TRUE(writer->store(2, 2, "int8"));
  const auto reader = connect("reader");
  for (std::uint64_t chunk = 0; chunk < 8; ++chunk) {
    const auto hit = reader->index().find(reader->fingerprint(1, chunk * kBlocksPerChunk + 3));
    ASSERT_TRUE(hit);
    EXPECT_EQ(hit->block_in_chunk, 3);
    const auto slot = reader->hazards().publish(hit->chunk);
    EXPECT_TRUE(reader->index().still_valid(*hit));
    const Status loaded = reader->load_and_compare(1, chunk);
    EXPECT_TRUE(loaded) << loaded.to_string();
    reader->hazards().clear(*slot);
  }
  EXPECT_TRUE(reader->load(2, 0)) << "the lossy one";
  EXPECT_EQ(reader->load_and_compare(2, 0).code(), Code::kCorrupt) << "int8 that loses nothing would be a surprise";
  EXPECT_FALSE(reader->index().find(reader->fingerprint(3, 0)));
  EXPECT_EQ(reader->load(3, 0).error().code(), Code::kNotFound);
}

TEST_F(LocalDaemonTest, WhatAClientWantsKeptOutlivesThePressureOfAnotherAndThenExpires) {
  start({"--store.dram_bytes=16MiB", "--store.retain_percent=25"});
  const auto careful = connect("careful");
  const auto busy = connect("busy");
  ASSERT_TRUE(careful->store(1, 4, "raw"));
  ASSERT_TRUE(careful->store(2, 4, "raw"));
  const auto kept = careful->retain(1, 4, 3600);
  ASSERT_TRUE(kept) << kept.error().to_string();
  EXPECT_EQ(kept->chunks(), 4U);
  const auto press = [&](std::uint64_t from) {
    for (std::uint64_t prompt = from; prompt < from + 30; ++prompt)
      ASSERT_TRUE(busy->store(prompt, 4, "raw")) << prompt;
  };
  press(100);
  for (std::uint64_t chunk = 0; chunk < 4; ++chunk) {
    EXPECT_TRUE(busy->load_and_compare(1, chunk)) << chunk;
    EXPECT_EQ(busy->load_and_compare(2, chunk).code(), Code::kNotFound) << chunk;
  }
  // A quarter of 16 MiB is 15 chunks of 256 KiB and a header, and a tenant has one share for all of its clients.
  ASSERT_TRUE(busy->store(3, 15, "raw"));
  const auto most = busy->retain(3, 15, 1);
  ASSERT_TRUE(most) << most.error().to_string();
  EXPECT_EQ(most->chunks(), 11U);
  EXPECT_EQ(most->refused(), 4U);
  EXPECT_LE(status(*busy).at("store").at("retained_bytes"), 4U << 20);
  EXPECT_TRUE(eventually([&] { return status(*busy).at("store").at("retained_chunks") == 4; })) << "one second is over";
  press(200);
  EXPECT_EQ(busy->load_and_compare(3, 0).code(), Code::kNotFound);
  EXPECT_TRUE(busy->load_and_compare(1, 0));
}

TEST_F(LocalDaemonTest, AClientThatIsKilledLeavesNothingBehind) {
  start();
  const auto client = connect();
  ASSERT_TRUE(client->store(1, 2));
  ChildProcess victim({VICTIM_PATH, socket()});
  ASSERT_TRUE(victim.says("ready")) << victim.text();
  auto held = session_of(*client, "victim");
  ASSERT_FALSE(held.is_null()) << daemon_->text();
  EXPECT_EQ(held.at("leases"), 1);
  EXPECT_EQ(held.at("reservations"), 4);
  EXPECT_EQ(client->reserve(77, 1)->items(0).outcome(), wire::IN_FLIGHT);
  victim.kill();
  // What it held is given back after it has left the list.
  EXPECT_TRUE(eventually([&] {
    const auto report = status(*client);
    return session_of(*client, "victim").is_null() && report.at("store").at("pinned_chunks") == 0 &&
           report.at("pipeline").at("in_flight") == 0;
  }));
  EXPECT_EQ(status(*client).at("lingering_sessions"), 0);
  EXPECT_TRUE(client->store(77, 1));
}

TEST_F(LocalDaemonTest, AClientThatIsStoppedAndContinuedHurtsNobody) {
  start({"--sessions.heartbeat_interval_ms=50", "--sessions.timeout_ms=400"});
  auto client = connect();
  ASSERT_TRUE(client->store(1, 2));
  ChildProcess victim({VICTIM_PATH, socket()});
  ASSERT_TRUE(victim.says("ready")) << victim.text();
  victim.signal(SIGSTOP);
  EXPECT_TRUE(eventually([&] {
    if (!client->heartbeat()) client = connect();  // a busy machine may be late with ours, too
    const auto report = status(*client);
    return report.at("lingering_sessions") == 1 && report.at("store").at("pinned_chunks") == 0 &&
           report.at("pipeline").at("in_flight") == 0;
  }));
  if (!client->heartbeat()) client = connect();
  ASSERT_TRUE(client->store(77, 4)) << "what the stopped one had reserved";
  victim.signal(SIGCONT);
  EXPECT_TRUE(victim.says("expired")) << victim.text();
  EXPECT_TRUE(victim.says("stored")) << victim.text();
  EXPECT_EQ(victim.wait(), 0);
  client = connect();
  for (std::uint64_t chunk = 0; chunk < 4; ++chunk) EXPECT_TRUE(client->load_and_compare(77, chunk));
  EXPECT_TRUE(client->load_and_compare(78, 0));
  EXPECT_TRUE(eventually([&] {
    if (!client->heartbeat()) client = connect();
    return status(*client).at("lingering_sessions") == 0;
  }));
}

TEST_F(LocalDaemonTest, AKilledDaemonFailsItsClientsAndStartsAgain) {
  start({"--store.warm_restart=false"});
  auto client = connect();
  ASSERT_TRUE(client->store(1, 1));
  const std::uint64_t epoch = client->welcome().epoch();
  const auto lease = client->fetch(1, 0);
  ASSERT_TRUE(lease);
  daemon_->kill();
  wire::HotRequest request;
  request.mutable_report();
  wire::HotReply reply;
  EXPECT_EQ(client->channel().call(request, &reply, std::chrono::milliseconds(200)).code(), Code::kUnavailable);
  EXPECT_TRUE(fs::exists(run_dir_ / "slab")) << "kill -9 cleans nothing up";

  start({"--store.warm_restart=false"});
  const auto again = connect();
  EXPECT_NE(again->welcome().epoch(), epoch);
  EXPECT_NE(again->index().generation(), client->index().generation());
  EXPECT_EQ(again->load(1, 0).error().code(), Code::kNotFound);
  EXPECT_TRUE(again->store(1, 1));
  EXPECT_TRUE(again->load_and_compare(1, 0));
  wire::ControlRequest stale;
  stale.mutable_heartbeat();
  wire::ControlReply answer;
  EXPECT_FALSE(client->control(stale, &answer)) << "a token of the dead daemon";
}

TEST_F(LocalDaemonTest, ItsDramTierOutlivesEveryEnd) {
  start();
  std::uint64_t stored = 0;
  const auto store_more = [&] {
    const auto client = connect();
    for (int i = 0; i < 5; ++i) {
      ASSERT_TRUE(client->store(++stored, 2));
    }
  };
  const auto all_there = [&] {
    const auto client = connect();
    for (std::uint64_t prompt = 1; prompt <= stored; ++prompt) {
      EXPECT_TRUE(client->load_and_compare(prompt, 0));
      EXPECT_TRUE(client->load_and_compare(prompt, 1));
    }
    EXPECT_EQ(status(*client).at("store").at("chunks"), 2 * stored);
  };
  store_more();
  daemon_->kill();
  start();
  EXPECT_TRUE(daemon_->says("took chunks over from the run before chunks=10 ")) << daemon_->text();
  all_there();
  store_more();
  daemon_->signal(SIGTERM);
  EXPECT_EQ(daemon_->wait(), 0) << daemon_->text();
  EXPECT_THAT(daemon_->text(), HasSubstr(" chunks=20 folder="));
  start();
  all_there();
  daemon_->kill();
  std::ofstream(run_dir_ / "slab.map") << "another layout";
  start();
  EXPECT_EQ(status(*connect()).at("store").at("chunks"), 0);
}

TEST_F(LocalDaemonTest, WhatAKilledDaemonLeftIsWholeOrNotThere) {
  // Killed in the middle of storing and evicting, again and again; every time all that is found is right.
  constexpr std::uint64_t kPrompts = 40;
  for (std::uint64_t life = 0; life < 8; ++life) {
    start({"--store.dram_bytes=4MiB"});
    const auto client = connect();
    std::size_t found = 0;
    for (std::uint64_t prompt = 0; prompt < kPrompts * 8; ++prompt) {
      if (!client->index().find(client->fingerprint(prompt, 0))) continue;
      EXPECT_TRUE(client->load_and_compare(prompt, 0)) << "life " << life << ", prompt " << prompt;
      ++found;
    }
    std::cout << "life " << life << ": " << found << " chunks were taken over\n";
    std::atomic<std::uint64_t> stored{0};
    std::thread killer([&] {
      for (std::uint64_t seen = 0; seen < 18 + 2 * life; seen = stored.load()) stored.wait(seen);
      daemon_->kill();
      client->channel().close();  // it would wait for the answer of the dead
    });
    for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) {
      const bool alive = client->store(kPrompts * life + prompt, 1).is_ok();
      ++stored;
      stored.notify_one();
      if (!alive && prompt > 18 + 2 * life) break;
    }
    killer.join();
    EXPECT_TRUE(life == 0 || found > 0);
  }
}

TEST_F(LocalDaemonTest, AFullTierEvictsAndGoesOn) {
  start({"--store.dram_bytes=4MiB"});
  const auto client = connect();
  constexpr std::uint64_t kPrompts = 40;  // some 5 MiB of chunks of 128 KiB
  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) {
    const Status stored = client->store(prompt, 1);
    ASSERT_TRUE(stored) << stored.to_string();
  }
  const auto store = status(*client).at("store");
  EXPECT_GT(store.at("evicted_chunks"), 0);
  EXPECT_LE(store.at("used_bytes"), store.at("capacity_bytes"));
  EXPECT_TRUE(client->load_and_compare(kPrompts - 1, 0));
  EXPECT_EQ(client->load(0, 0).error().code(), Code::kNotFound);
}

// 40 MiB of int8 in 24 MiB: half of it is left as int4, and everything that is left decodes.
TEST_F(LocalDaemonTest, UnderPressureChunksStepDownAndComeBackRight) {
  const std::vector<std::string> settings = {"--ladder.default=balanced", "--store.dram_bytes=24MiB",
                                             "--ladder.free_bytes=8MiB"};
  start(settings);
  const auto client = connect();
  std::uint64_t stored = 0;
  for (std::uint64_t prompt = 0; prompt < 300; ++prompt) stored += client->store(prompt, 1) ? 1U : 0U;
  EXPECT_EQ(stored, 300U);
  ASSERT_TRUE(eventually([&] { return status(*client).at("store").at("demoted_chunks") > 20; })) << daemon_->text();
  const auto check = [&](LocalClient& reader) {
    std::uint64_t found = 0;
    for (std::uint64_t prompt = 0; prompt < 300; ++prompt) {
      const auto loaded = reader.load(prompt, 0);
      if (!loaded) {
        EXPECT_EQ(loaded.error().code(), Code::kNotFound) << loaded.error().to_string();
        continue;
      }
      ++found;
      std::vector<std::byte> exact(loaded->size());
      testing::fill_chunk(exact, prompt, 0);
      // Values from 0.125 to 2: int4 in groups keeps the largest difference below a tenth of the range.
      for (std::size_t i = 0; i < exact.size(); i += 2) {
        const auto value = [&](const std::vector<std::byte>& bytes) {
          const auto bits = static_cast<std::uint32_t>(bytes[i]) << 16 | static_cast<std::uint32_t>(bytes[i + 1]) << 24;
          return std::bit_cast<float>(bits);
        };
        if (std::abs(value(*loaded) - value(exact)) <= 0.2F) continue;
        ADD_FAILURE() << "prompt " << prompt << ", byte " << i;
        break;
      }
    }
    return found;
  };
  EXPECT_GT(check(*client), 60U);
  const auto forms = status(*client).at("store").at("forms");
  EXPECT_THAT(forms.dump(), HasSubstr("int4"));
  // And after kill -9 in the middle of it.
  for (std::uint64_t prompt = 300; prompt < 340; ++prompt) std::ignore = client->store(prompt, 1);
  daemon_->kill();
  start(settings);
  const auto after = connect("after");
  EXPECT_GT(check(*after), 30U);
}

TEST_F(LocalDaemonTest, AClaimedChunkIsNotEvicted) {
  start({"--store.dram_bytes=4MiB"});
  const auto client = connect();
  ASSERT_TRUE(client->store(1000, 1));
  const auto hit = client->index().find(client->fingerprint(1000, 0));
  ASSERT_TRUE(hit);
  const auto slot = client->hazards().publish(hit->chunk);
  ASSERT_TRUE(client->index().still_valid(*hit));
  for (std::uint64_t prompt = 0; prompt < 100; ++prompt) ASSERT_TRUE(client->store(prompt, 1));
  EXPECT_TRUE(client->load_and_compare(1000, 0));
  client->hazards().clear(*slot);
  for (std::uint64_t prompt = 100; prompt < 200; ++prompt) ASSERT_TRUE(client->store(prompt, 1));
  EXPECT_EQ(client->load(1000, 0).error().code(), Code::kNotFound);
}

TEST_F(LocalDaemonTest, ASecondDaemonOnTheSameSocketIsRefused) {
  start();
  ChildProcess second(command());
  EXPECT_EQ(second.wait(), 1);
  EXPECT_THAT(second.text(), HasSubstr("another kvernd has the socket " + socket()));
  EXPECT_TRUE(connect()->store(1, 1));
}

TEST_F(LocalDaemonTest, AGracefulStopFinishesAndCleansUp) {
  start({"--store.warm_restart=false"});
  const auto client = connect();
  const auto reserved = client->reserve(1, 16);
  ASSERT_TRUE(reserved);
  wire::HotRequest commit;
  for (int i = 0; i < reserved->items_size(); ++i) {
    *commit.mutable_commit()->add_items() = client->write(reserved->items(i), 1, static_cast<std::uint64_t>(i));
  }
  std::optional<Status> committed;
  std::thread committing([&] {
    wire::HotReply reply;
    committed = client->hot(commit, &reply);
    for (const auto& item : reply.committed().items()) {
      if (committed->is_ok()) committed = to_status(item);
    }
  });
  // The daemon has taken the commit once the first of its chunks can be found.
  EXPECT_TRUE(eventually([&] { return client->index().find(client->fingerprint(1, 0)).has_value(); }));
  daemon_->signal(SIGTERM);
  EXPECT_EQ(daemon_->wait(), 0) << daemon_->text();
  committing.join();
  ASSERT_TRUE(committed);
  EXPECT_TRUE(*committed) << committed->to_string();
  EXPECT_NE(client->state(), SessionState::kLive);
  EXPECT_FALSE(fs::exists(run_dir_));
  EXPECT_TRUE(fs::is_empty(folder_)) << "sockets and locks are left";
}

TEST_F(LocalDaemonTest, MetricsAndHealthAreServed) {
  const std::uint16_t port = free_port();
  start({"--metrics.listen=127.0.0.1:" + std::to_string(port)});
  const auto client = connect();
  ASSERT_TRUE(client->store(1, 2));
  ASSERT_TRUE(client->load_and_compare(1, 0));
  EXPECT_THAT(http_get(port, "/healthz"), HasSubstr("200 OK"));
  EXPECT_THAT(http_get(port, "/readyz"), HasSubstr("200 OK"));
  EXPECT_THAT(http_get(port, "/etc/passwd"), HasSubstr("404"));
  const std::string metrics = http_get(port, "/metrics");
  for (const char* line :
       {"kvern_tier_chunks{tier=\"dram\"} 2", "kvern_stored_chunks_total{codec=\"raw\",tier=\"dram\"} 2",
        "kvern_requests_total{type=\"fetch\"} 1", "kvern_sessions{role=\"worker\",data_plane=\"shm\"} 1",
        "kvern_leases 0", "kvern_build_info{version=\"0.1.0\",protocol=\"1\"} 1", "kvern_fetch_seconds_count 1"}) {
    EXPECT_THAT(metrics, HasSubstr(line));
  }
}

TEST_F(LocalDaemonTest, ABrokenRingEndsTheSessionAndNobodyElses) {
  start();
  const auto good = connect("good");
  const auto bad = connect("bad");
  ASSERT_TRUE(bad->store(1, 1));
  auto& header = bad->segment().header();
  header.request_head.store(header.request_head.load() + (1ULL << 40));
  bad->ring_doorbell();
  EXPECT_TRUE(eventually([&] { return session_of(*good, "bad").is_null(); }));
  EXPECT_EQ(bad->state(), SessionState::kExpired);
  EXPECT_TRUE(daemon_->says("why=protocol_error")) << daemon_->text();
  EXPECT_TRUE(good->store(2, 1));
}

TEST_F(LocalDaemonTest, CheckConfigExplainsErrorsWithFileAndLine) {
  const std::string path = (folder_ / "k.toml").string();
  std::ofstream(path) << "[store]\ndram_bytes = \"1GiB\"\ncolour = 3\n";
  ChildProcess check({KVERND_PATH, "--check-config", path});
  EXPECT_EQ(check.wait(), 1);
  EXPECT_THAT(check.text(), HasSubstr(path + ":3: there is no key store.colour"));
  std::ofstream(path) << "[store]\ndram_bytes = \"1GiB\"\n";
  ChildProcess good({KVERND_PATH, "--check-config", path});
  EXPECT_EQ(good.wait(), 0) << good.text();
}

TEST_F(LocalDaemonTest, WhatCannotStartSaysWhy) {
  ChildProcess huge(command({"--store.dram_bytes=200TiB"}));
  EXPECT_EQ(huge.wait(), 1);
  EXPECT_THAT(huge.text(), HasSubstr("are needed"));
  EXPECT_FALSE(fs::exists(run_dir_)) << "a failed start leaves nothing";
  const std::uint16_t port = free_port();
  start({"--metrics.listen=127.0.0.1:" + std::to_string(port)});
  ChildProcess taken({KVERND_PATH, "--server.socket=" + (folder_ / "other.sock").string(), "--store.dram_bytes=1MiB",
                      "--metrics.listen=127.0.0.1:" + std::to_string(port)});
  EXPECT_EQ(taken.wait(), 1);
  EXPECT_THAT(taken.text(), HasSubstr("cannot listen on 127.0.0.1:" + std::to_string(port)));
}

}  // namespace
}  // namespace kvern
