// A daemon with a DRAM tier, an NVMe tier and a ladder that is killed, or whose disk fails, under mixed load.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/base/crash_rounds.h"
#include "tests/integration/daemon_process.h"
#include "tests/integration/daemon_test.h"
#include "tests/integration/local_client.h"

namespace kvern {
namespace {

namespace fs = std::filesystem;
using testing::crash_rounds;
using testing::eventually;
using testing::kBlocksPerChunk;
using testing::kHashBytes;
using testing::kPatience;
using testing::LocalClient;

constexpr int kRounds = 12;
// Of one chunk as it is stored: 256 KiB of keys and values, and the header.
constexpr std::uint64_t kChunkBytes = (256U << 10U) + 4096;
// The log has 16 regions of seven chunks. Two may be empty or half full at a time.
constexpr std::uint64_t kNvmeChunks = 14 * 7;
// LRU takes none of the chunks that were used last, as long as they are far fewer than the tier holds (31).
constexpr std::uint64_t kUsesThatSpare = 12;

class DaemonWithDisk : public testing::DaemonTest {
 protected:
  std::string log() const { return (folder_ / "log").string(); }
  std::vector<std::string> settings() const override {
    return {"--store.dram_bytes=8MiB", "--store.eviction=lru", "--codec.default=raw",
            "--nvme.files=" + log(),   "--nvme.bytes=32MiB",   "--nvme.sync=false"};
  }

  static nlohmann::json nvme(LocalClient& client) { return status(client).at("lower_tiers").at(0); }
  static std::uint64_t ended_writes(LocalClient& client) {
    const nlohmann::json tier = nvme(client);
    return tier.at("saved_chunks").get<std::uint64_t>() + tier.at("unsaved_chunks").get<std::uint64_t>();
  }
  static bool is_written(LocalClient& client, std::uint64_t chunks) {
    const nlohmann::json tier = nvme(client);
    return tier.at("queued_bytes") == 0 && tier.at("saved_chunks") >= chunks;
  }

  /// Brings the first chunk of the prompt up from where it is, and says whether it is there.
  static bool find(LocalClient& client, std::uint64_t prompt) {
    wire::HotRequest request;
    auto* match = request.mutable_match();
    match->set_namespace_id(client.namespace_id().bytes.data(), client.namespace_id().bytes.size());
    match->set_hash_bytes(kHashBytes);
    for (std::uint64_t block = 0; block < kBlocksPerChunk; ++block) {
      match->mutable_block_hashes()->append(testing::block_hash(prompt, block));
    }
    match->set_lease_id(1);
    match->set_prefetch(true);
    wire::HotReply reply;
    const bool answered = eventually([&] { return !client.hot(request, &reply) || !reply.matched().pending(); });
    const bool found = answered && reply.matched().present() == "\xff";
    wire::HotRequest release;
    release.mutable_release_match()->set_lease_id(1);
    wire::HotReply released;
    std::ignore = client.hot(release, &released);
    return found;
  }
  /// OK or kNotFound; anything else is a failure of the daemon.
  static Status look_at(LocalClient& client, std::uint64_t prompt) {
    return find(client, prompt) ? client.load_and_compare(prompt, 0) : Status(Code::kNotFound, "no tier has it");
  }
};

/// What clients were told, with the number of operations that had ended by then.
class Acknowledged {
 public:
  void stored(std::uint64_t prompt) {
    const std::lock_guard lock(mutex_);
    at_[prompt] = ++operations_;
  }
  void used() {
    const std::lock_guard lock(mutex_);
    ++operations_;
  }
  std::uint64_t operations() const {
    const std::lock_guard lock(mutex_);
    return operations_;
  }
  /// Those after which there was too little to drive them out of DRAM.
  std::vector<std::uint64_t> last() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::uint64_t> prompts;
    for (const auto& [prompt, at] : at_) {
      if (operations_ - at < kUsesThatSpare) prompts.push_back(prompt);
    }
    return prompts;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::uint64_t, std::uint64_t> at_;
  std::uint64_t operations_ = 0;
};

class DaemonCrash : public DaemonWithDisk {
 protected:
  // Chunks step down to forms that lose nothing once less than half of the tier is free.
  void start_with_ladder() { start({"--ladder.default=exact", "--ladder.free_bytes=4MiB"}); }

  /// Stores new prompts, loads old ones and brings others up until the daemon is gone. No more than so many are stored.
  void work(std::uint64_t seed, std::atomic<std::uint64_t>& next_prompt, std::uint64_t end, Acknowledged& told) {
    auto connected = LocalClient::connect(socket(), "worker");
    if (!connected) return;  // killed already
    LocalClient& client = **connected;
    {
      const std::lock_guard lock(clients_mutex_);
      clients_.push_back(&client);
    }
    std::mt19937_64 random(seed);
    while (!killed_) {
      const std::uint64_t known = next_prompt.load();
      const std::uint64_t oldest = known > kNvmeChunks ? known - kNvmeChunks : 0;
      const std::uint64_t old = oldest + random() % (known - oldest);
      if (const auto what = random() % 4; what < 2 && known < end) {
        const std::uint64_t prompt = next_prompt++;
        if (client.store(prompt, 1)) told.stored(prompt);
      } else if (what == 2) {
        const Status loaded = client.load_and_compare(old, 0);
        EXPECT_NE(loaded.code(), Code::kCorrupt) << "prompt " << old << ": " << loaded.message();
        told.used();
      } else {
        const Status found = look_at(client, old);
        EXPECT_NE(found.code(), Code::kCorrupt) << "prompt " << old << ": " << found.message();
        told.used();
      }
    }
    const std::lock_guard lock(clients_mutex_);
    std::erase(clients_, &client);
  }
  void kill_daemon() {
    killed_ = true;
    daemon_->kill();
    const std::lock_guard lock(clients_mutex_);
    for (LocalClient* const client : clients_) client->channel().close();  // they would wait for the dead
  }

  std::atomic<bool> killed_{false};
  std::mutex clients_mutex_;
  std::vector<LocalClient*> clients_;
};

TEST_F(DaemonCrash, WhatWasAcknowledgedOutlivesKillAtAnyMomentAndNothingLeaks) {
  const std::uint64_t seed = std::random_device()();
  std::mt19937_64 random(seed);
  std::atomic<std::uint64_t> next_prompt{0};
  std::vector<std::uint64_t> must_be_there;
  std::uint64_t demoted = 0;
  std::uint64_t came_up = 0;
  for (int round = 0; round <= crash_rounds(kRounds); ++round) {
    const std::string context = "seed " + std::to_string(seed) + ", round " + std::to_string(round);
    start_with_ladder();
    const auto client = connect("checker");
    ASSERT_TRUE(client) << context;
    for (const std::uint64_t prompt : must_be_there) {
      const Status found = look_at(*client, prompt);
      ASSERT_TRUE(found) << context << ", prompt " << prompt << ": " << found.to_string() << "\n" << daemon_->text();
    }
    const std::uint64_t known = next_prompt.load();
    for (std::uint64_t prompt = known > 2 * kNvmeChunks ? known - 2 * kNvmeChunks : 0; prompt < known; ++prompt) {
      const Status found = look_at(*client, prompt);
      ASSERT_TRUE(found || found.code() == Code::kNotFound) << context << ", prompt " << prompt << found.to_string();
    }
    // Every byte of the slab is that of a chunk.
    EXPECT_TRUE(eventually([&] {
      wire::ControlRequest request;
      request.mutable_snapshot()->set_limit(1000);
      request.mutable_snapshot()->set_namespace_id(client->namespace_id().bytes.data(), 16);
      wire::ControlReply reply;
      if (!client->control(request, &reply)) return false;
      std::uint64_t bytes = 0;
      for (const auto& chunk : reply.snapshot().chunks()) bytes += (chunk.encoded_bytes() + 4095) / 4096 * 4096;
      return status(*client).at("store").at("used_bytes") == bytes;
    })) << context
        << status(*client).dump();
    came_up += nvme(*client).at("promoted_chunks").get<std::uint64_t>();
    if (round == crash_rounds(kRounds)) break;

    // These are acknowledged as durable: they are on the disk.
    must_be_there.clear();
    const std::uint64_t saved = nvme(*client).at("saved_chunks");
    for (std::uint64_t i = 1; i <= 4; ++i) {
      must_be_there.push_back(next_prompt++);
      ASSERT_TRUE(client->store(must_be_there.back(), 1)) << context;
      ASSERT_TRUE(eventually([&] { return is_written(*client, saved + i); })) << context << nvme(*client).dump();
    }
    Acknowledged told;
    killed_ = false;
    // Half of the log at most, so that the durable ones are not reclaimed.
    const std::uint64_t end = next_prompt + kNvmeChunks / 2;
    std::vector<std::thread> workers;
    for (int i = 0; i < 2; ++i) {
      workers.emplace_back([&, worker_seed = random()] { work(worker_seed, next_prompt, end, told); });
    }
    const std::uint64_t operations = random() % 60;
    while (told.operations() < operations) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
    demoted += status(*client).at("store").at("demoted_chunks").get<std::uint64_t>();
    kill_daemon();
    for (auto& worker : workers) worker.join();
    if (round % 2 == 0) {
      // DRAM is taken back, but not the order of use: these are looked at before others are brought up in their place.
      const std::vector<std::uint64_t> in_dram = told.last();
      must_be_there.insert(must_be_there.begin(), in_dram.begin(), in_dram.end());
    } else {
      fs::remove_all(run_dir_);  // as after a reboot: the disk alone is left
    }
  }
  EXPECT_GT(demoted, 0U);
  EXPECT_GT(came_up, 0U);

  // No region leaks: an empty log takes as much as it ever did.
  const auto client = connect("last");
  wire::ControlRequest flush;
  flush.mutable_flush();
  wire::ControlReply flushed;
  ASSERT_TRUE(client->control(flush, &flushed));
  EXPECT_TRUE(eventually([&] {
    const auto report = status(*client);
    return report.at("store").at("used_bytes") == 0 && report.at("lower_tiers").at(0).at("chunks") == 0;
  })) << status(*client).dump();
  const std::uint64_t first = next_prompt;
  const std::uint64_t saved = nvme(*client).at("saved_chunks");
  for (std::uint64_t i = 0; i < kNvmeChunks; ++i) {
    ASSERT_TRUE(client->store(first + i, 1));
    ASSERT_TRUE(eventually([&] { return is_written(*client, saved + i + 1); })) << i << nvme(*client).dump();
  }
  daemon_->kill();
  fs::remove_all(run_dir_);
  start_with_ladder();
  const auto again = connect("again");
  for (std::uint64_t i = 0; i < kNvmeChunks; ++i) EXPECT_TRUE(look_at(*again, first + i)) << i;
}

/// What faulty_disk.cc does to the log from now on.
class Disk {
 public:
  explicit Disk(fs::path path) : path_(std::move(path)) { set("good"); }
  void set(const std::string& mode) const {
    const fs::path fresh = path_.string() + ".new";
    std::ofstream(fresh) << mode;
    fs::rename(fresh, path_);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

class DaemonOnAFaultyDisk : public DaemonWithDisk {
 protected:
  void start_faulty() {
    disk_.emplace(folder_ / "disk");
    ::setenv("KVERN_FAULTY_DISK", disk_->path().c_str(), 1);
    ::setenv("KVERN_FAULTY_FILE", log().c_str(), 1);
    ::setenv("LD_PRELOAD", FAULTY_DISK_PATH, 1);
    ::setenv("ASAN_OPTIONS", "verify_asan_link_order=0", 0);
    start({"--nvme.io=threads"});
    ::unsetenv("LD_PRELOAD");
  }
  /// Stores more than DRAM holds, so that the first of them are on the disk alone; returns how many.
  std::uint64_t fill(LocalClient& client) {
    constexpr std::uint64_t kStored = 60;
    for (std::uint64_t prompt = 0; prompt < kStored; ++prompt) {
      EXPECT_TRUE(client.store(prompt, 1));
      EXPECT_TRUE(eventually([&] { return is_written(client, prompt + 1); })) << nvme(client).dump();
    }
    return kStored;
  }
  /// A chunk that is in DRAM is served and new ones are taken, whatever the disk does.
  static void expect_dram_serves(LocalClient& client, std::uint64_t prompt) {
    EXPECT_TRUE(client.load_and_compare(prompt, 0));
    EXPECT_TRUE(client.store(prompt + 1000, 1));
    EXPECT_TRUE(client.load_and_compare(prompt + 1000, 0));
  }

  std::optional<Disk> disk_;
};

class EveryReadFault : public DaemonOnAFaultyDisk, public ::testing::WithParamInterface<const char*> {};
INSTANTIATE_TEST_SUITE_P(Modes, EveryReadFault, ::testing::Values("read_eio", "read_short", "read_flipped"),
                         [](const auto& each) { return std::string(each.param); });

TEST_P(EveryReadFault, CostsTheDisksHitsAndNothingElse) {
  start_faulty();
  const auto client = connect("client");
  const std::uint64_t stored = fill(*client);
  ASSERT_TRUE(look_at(*client, 0)) << "it came from the disk";
  disk_->set(GetParam());
  for (std::uint64_t prompt = 1; prompt < 8; ++prompt) {
    const Status found = look_at(*client, prompt);
    EXPECT_EQ(found.code(), Code::kNotFound) << "prompt " << prompt << ": " << found.to_string();
    expect_dram_serves(*client, stored - prompt);
  }
  disk_->set("good");
  // The breaker lets it be tried again, and what was not read meanwhile is there.
  EXPECT_TRUE(eventually([&] { return look_at(*client, 20).is_ok(); })) << nvme(*client).dump();
}

class EveryWriteFault : public DaemonOnAFaultyDisk, public ::testing::WithParamInterface<const char*> {};
INSTANTIATE_TEST_SUITE_P(Modes, EveryWriteFault, ::testing::Values("write_eio", "write_enospc"),
                         [](const auto& each) { return std::string(each.param); });

TEST_P(EveryWriteFault, LosesWhatCouldNotBeWrittenAndNothingElse) {
  start_faulty();
  const auto client = connect("client");
  const std::uint64_t stored = fill(*client);
  disk_->set(GetParam());
  for (std::uint64_t prompt = 100; prompt < 108; ++prompt) {
    ASSERT_TRUE(client->store(prompt, 1)) << "the disk is behind DRAM";
    EXPECT_TRUE(client->load_and_compare(prompt, 0));
  }
  EXPECT_TRUE(eventually([&] { return nvme(*client).at("queued_bytes") == 0; })) << nvme(*client).dump();
  disk_->set("good");
  // A new one reaches the disk again, and all that is found is right, here and after a restart from the disk alone.
  const std::uint64_t saved = nvme(*client).at("saved_chunks");
  std::uint64_t fresh = 200;
  EXPECT_TRUE(eventually([&] {
    const std::uint64_t ended = ended_writes(*client);
    EXPECT_TRUE(client->store(++fresh, 1));
    // One at a time: many would take the places of the first.
    EXPECT_TRUE(eventually([&] { return ended_writes(*client) > ended; }));
    return nvme(*client).at("saved_chunks") > saved;
  })) << nvme(*client).dump();
  EXPECT_TRUE(eventually([&] { return nvme(*client).at("queued_bytes") == 0; }));
  daemon_->kill();
  fs::remove_all(run_dir_);
  start({"--nvme.io=threads"});
  const auto again = connect("again");
  std::uint64_t found = 0;
  for (std::uint64_t prompt = 0; prompt <= fresh; ++prompt) {
    const Status each = look_at(*again, prompt);
    EXPECT_TRUE(each || each.code() == Code::kNotFound) << "prompt " << prompt << ": " << each.to_string();
    found += each && prompt < stored ? 1U : 0U;
  }
  EXPECT_EQ(found, stored) << "what was written before is there still";
}

}  // namespace
}  // namespace kvern
