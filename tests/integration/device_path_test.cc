#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

#include "connector/client.h"
#include "connector/transfer_worker.h"
#include "tests/connector/page_model.h"
#include "tests/integration/daemon_process.h"
#include "tests/integration/device_player.h"

namespace kvern {
namespace {

namespace fs = std::filesystem;
using test::PageModel;
using namespace testing;

constexpr std::uint32_t kPatienceMs = 30'000;
constexpr std::uint32_t kChunkBlocks = 8;
constexpr const char* kAddressVariable = "KVERN_TEST_ADDRESS";
constexpr const char* kKindVariable = "KVERN_TEST_KIND";

class Daemon : public DaemonProcess {
 public:
  Daemon() : DaemonProcess(device_daemon_path(), {"--store.dram_bytes=" + std::to_string(128U << 20)}) {}
};

/// Pages as vLLM's GPU backends lay them out: heads inside tokens, keys before values.
PageModel::Options layout() {
  PageModel::Options options;
  options.page_tokens = 16;
  options.blocks = 40;
  options.heads_inside_tokens = true;
  options.split_values = true;
  options.key_dim = options.value_dim = 64;
  return options;
}

/// An engine whose pages are on the player's device, or in host memory without a player.
class Engine {
 public:
  Engine(const std::string& address, DevicePlayer* player, std::uint64_t seed)
      : player_(player), model_(layout()), pages_(model_.pages()) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (auto& layer : model_.memory()) {
      for (std::size_t i = 0; i + 2 <= layer.size(); i += 2) {
        const float value = normal(random);
        std::memcpy(layer.data() + i, reinterpret_cast<const std::byte*>(&value) + 2, 2);
      }
    }
    if (player != nullptr) {
      for (std::size_t i = 0; i < pages_.layers.size(); ++i) {
        auto& host = model_.memory()[i];
        pages_.layers[i].base = player->allocate(host.size());
        player->write(pages_.layers[i].base, host.data(), host.size());
      }
      pages_.device = player->engine_device();
    }
    ClientConfig config;
    config.address = address;
    config.client_name = "device test";
    config.staging_bytes = 16U << 20;
    config.backoff_min_ms = 10;
    config.backoff_max_ms = 200;
    client_ = std::make_shared<Client>(config);
    NamespaceSpec spec;
    spec.fields = {{"model", "device-test"},
                   {"weights", "00"},
                   {"dtype", "bfloat16"},
                   {"kv_dtype", "bfloat16"},
                   {"block_tokens", "16"},
                   {"chunk_tokens", "128"},
                   {"hash_algorithm", "random"},
                   {"hash_seed", "00"},
                   {"layers", "2"},
                   {"kv_heads", "2"},
                   {"key_dim", "64"},
                   {"value_dim", "64"},
                   {"groups", "full:2"},
                   {"rope", "none"}};
    handle_ = client_->add_namespace(spec);
    wait_ready();
    worker_ = std::make_unique<TransferWorker>(client_, WorkerConfig{});
    EXPECT_EQ(worker_->register_group(pages_).message(), "");
  }
  void wait_ready() { EXPECT_TRUE(client_->wait_ready(kPatienceMs)) << client_->problem(); }
  std::uint64_t sessions() const { return client_->session_count(); }

  JobResult store(const std::vector<BlockHash>& hashes, const std::vector<std::uint32_t>& blocks,
                  const std::string& codec = "") {
    StoreJob job;
    job.id = ++last_job_;
    job.namespace_handle = handle_;
    job.codec_spec = codec;
    for (std::size_t i = 0; i < hashes.size(); i += kChunkBlocks) {
      const auto begin = static_cast<std::ptrdiff_t>(i);
      const auto end = static_cast<std::ptrdiff_t>(std::min<std::size_t>(hashes.size(), i + kChunkBlocks));
      job.chunks.push_back({{hashes.begin() + begin, hashes.begin() + end},
                            {blocks.begin() + begin, blocks.begin() + end},
                            i * pages_.block_tokens});
    }
    worker_->submit_store(std::move(job));
    return last_event();
  }
  JobResult load(const std::vector<BlockHash>& hashes, const std::vector<std::uint32_t>& blocks) {
    LoadJob job;
    job.id = ++last_job_;
    job.namespace_handle = handle_;
    for (std::size_t i = 0; i < hashes.size(); i += kChunkBlocks) {
      const auto begin = static_cast<std::ptrdiff_t>(i);
      const auto end = static_cast<std::ptrdiff_t>(std::min<std::size_t>(hashes.size(), i + kChunkBlocks));
      LoadPiece piece;
      piece.hashes = {hashes.begin() + begin, hashes.begin() + end};
      piece.block_ids = {blocks.begin() + begin, blocks.begin() + end};
      job.pieces.push_back(std::move(piece));
    }
    worker_->submit_load(std::move(job));
    return last_event();
  }
  std::vector<std::byte> canonical(const std::vector<std::uint32_t>& blocks) {
    if (player_ != nullptr) {
      for (std::size_t i = 0; i < pages_.layers.size(); ++i) {
        auto& host = model_.memory()[i];
        player_->read(host.data(), pages_.layers[i].base, host.size());
      }
    }
    return model_.canonical(blocks);
  }
  bool all_zero(const std::vector<std::uint32_t>& blocks) {
    return std::ranges::all_of(canonical(blocks), [](std::byte byte) { return byte == std::byte{0}; });
  }

 private:
  JobResult last_event() {
    EXPECT_TRUE(worker_->drain(kPatienceMs));
    auto events = worker_->poll();
    EXPECT_FALSE(events.empty());
    return events.empty() ? JobResult{} : events.back();
  }

  DevicePlayer* player_;
  PageModel model_;
  GroupPages pages_;
  std::shared_ptr<Client> client_;
  std::unique_ptr<TransferWorker> worker_;
  int handle_ = 0;
  std::uint64_t last_job_ = 0;
};

class DevicePath : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    player_ = make_device_player(GetParam());
    if (!player_) GTEST_SKIP() << "no device";
  }
  bool shared() const { return GetParam() != "private"; }
  std::unique_ptr<DevicePlayer> player_;
};

TEST_P(DevicePath, MakesTheContainersThatTheCpuMakes) {
  for (const char* codec : {"raw", "int8", "int4", "fp8", "int8 | zstd"}) {
    std::array<std::vector<char>, 2> slabs;
    const auto hashes = prompt(1, kChunkBlocks);
    for (const bool on_device : {false, true}) {
      Daemon daemon;
      Engine engine(daemon.address(), on_device ? player_.get() : nullptr, 7);
      const auto result = engine.store(hashes, ids(3, kChunkBlocks), codec);
      ASSERT_EQ(result.stored_chunks.size(), 1U) << codec << ": " << result.reason;
      if (on_device && shared()) {
        EXPECT_TRUE(daemon.says("pages on a device session="));
      }
      std::ifstream slab(daemon.slab(), std::ios::binary);
      slabs[on_device].resize(1U << 20);
      slab.read(slabs[on_device].data(), static_cast<std::streamsize>(slabs[on_device].size()));
    }
    EXPECT_TRUE(slabs[0] == slabs[1]) << codec;
    EXPECT_NE(slabs[0], std::vector<char>(slabs[0].size())) << codec;
  }
}

TEST_P(DevicePath, BlocksComeBackToOtherPagesOfDeviceAndHost) {
  for (const char* codec : {"raw", "int4", "int8 | zstd"}) {
    Daemon daemon;
    Engine device(daemon.address(), player_.get(), 7);
    Engine host(daemon.address(), nullptr, 8);
    const auto hashes = prompt(1, 20);  // two whole chunks and a short one
    ASSERT_EQ(device.store(hashes, ids(3, 20), codec).stored_chunks.size(), 3U);
    const auto stored = device.canonical(ids(3, 20));
    const auto on_host = host.load(hashes, ids(11, 20));
    ASSERT_EQ(on_host.event, JobEvent::kLoaded) << on_host.reason;
    auto targets = ids(15, 20);
    targets[2] = 0;
    const auto null_block = device.canonical({0, 17});
    const auto result = device.load(hashes, targets);
    ASSERT_EQ(result.event, JobEvent::kLoaded) << codec << ": " << result.reason;
    EXPECT_EQ(device.canonical({0, 17}), null_block);
    EXPECT_EQ(device.canonical(ids(18, 17)), host.canonical(ids(14, 17))) << codec;
    if (std::string(codec) == "raw") {
      EXPECT_EQ(host.canonical(ids(11, 20)), stored);
    }
    // A part of a chunk, stored by the host.
    const auto others = prompt(2, 8);
    ASSERT_EQ(host.store(others, ids(1, 8), codec).stored_chunks.size(), 1U);
    ASSERT_EQ(host.load({others.begin(), others.begin() + 5}, ids(30, 5)).event, JobEvent::kLoaded);
    ASSERT_EQ(device.load({others.begin(), others.begin() + 5}, ids(5, 5)).event, JobEvent::kLoaded);
    EXPECT_EQ(device.canonical(ids(5, 5)), host.canonical(ids(30, 5))) << codec;
  }
}

TEST_P(DevicePath, WhatIsStoredAlreadyCountsAndWhatIsNotThereFails) {
  Daemon daemon;
  Engine engine(daemon.address(), player_.get(), 7);
  const auto hashes = prompt(1, 16);
  EXPECT_EQ(engine.store(hashes, ids(1, 16)).stored_chunks.size(), 2U);
  EXPECT_EQ(engine.store(hashes, ids(17, 16)).stored_chunks.size(), 2U);
  const auto unknown = prompt(9, 8);
  const auto result = engine.load(unknown, ids(20, 8));
  EXPECT_EQ(result.event, JobEvent::kLoadFailed);
  EXPECT_NE(result.reason, "");
}

TEST_P(DevicePath, BytesThatWereFlippedAreNeverLoadedAndPagesAreZeroed) {
  for (const char* codec : {"raw", "int4"}) {
    Daemon daemon;
    Engine engine(daemon.address(), player_.get(), 7);
    const auto hashes = prompt(1, 8);
    ASSERT_EQ(engine.store(hashes, ids(1, 8), codec).stored_chunks.size(), 1U);
    {
      std::fstream slab(daemon.slab(), std::ios::in | std::ios::out | std::ios::binary);
      std::vector<char> bytes(1U << 20);
      slab.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
      for (std::size_t at = 8192; at < bytes.size(); at += 4096) bytes[at] = static_cast<char>(bytes[at] ^ 1);
      slab.seekp(0);
      slab.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    }
    const auto result = engine.load(hashes, ids(20, 8));
    EXPECT_EQ(result.event, JobEvent::kLoadFailed) << codec;
    EXPECT_TRUE(engine.all_zero(ids(20, 8))) << codec;
    EXPECT_FALSE(engine.all_zero({1}));
    EXPECT_TRUE(daemon.says("is corrupt and was quarantined"));
    EXPECT_EQ(engine.load(hashes, ids(20, 8)).event, JobEvent::kLoadFailed);
  }
}

TEST_P(DevicePath, TheDaemonsDeathLeavesThePagesAloneAndItsReturnServesThem) {
  Daemon daemon;
  Engine engine(daemon.address(), player_.get(), 7);
  const auto hashes = prompt(1, 16);
  ASSERT_EQ(engine.store(hashes, ids(1, 16)).stored_chunks.size(), 2U);
  const auto before = engine.canonical(ids(0, 40));
  daemon.kill();
  EXPECT_EQ(engine.canonical(ids(0, 40)), before);
  daemon.start();
  ASSERT_TRUE(eventually([&] { return engine.sessions() == 2; }));
  engine.wait_ready();
  const auto others = prompt(2, 8);
  EXPECT_EQ(engine.store(others, ids(1, 8)).stored_chunks.size(), 1U);
  ASSERT_EQ(engine.load(others, ids(20, 8)).event, JobEvent::kLoaded);
  EXPECT_EQ(engine.canonical(ids(20, 8)), engine.canonical(ids(1, 8)));
}

/// Runs in another process, which the next test kills.
TEST_P(DevicePath, DISABLED_EngineThatIsKilled) {
  if (GetParam() != std::getenv(kKindVariable)) return;
  const char* const address = std::getenv(kAddressVariable);
  ASSERT_NE(address, nullptr);
  Engine engine(address, player_.get(), 7);
  if (engine.store(prompt(1, 8), ids(1, 8)).stored_chunks.size() == 1) std::fputs("stored\n", stderr);
  ::pause();
}

TEST_P(DevicePath, TheEnginesDeathReleasesItsPagesAndWhatItStoredStays) {
  Daemon daemon;
  ::setenv(kAddressVariable, daemon.address().c_str(), 1);
  ::setenv(kKindVariable, GetParam().c_str(), 1);
  ChildProcess dying({"/proc/self/exe", "--gtest_also_run_disabled_tests",
                      "--gtest_filter=*DISABLED_EngineThatIsKilled/" + GetParam()});
  ASSERT_TRUE(dying.says("stored\n")) << dying.text() << daemon.text();
  dying.kill();
  ASSERT_TRUE(daemon.says("why=disconnected")) << daemon.text();
  Engine engine(daemon.address(), player_.get(), 8);
  ASSERT_EQ(engine.load(prompt(1, 8), ids(20, 8)).event, JobEvent::kLoaded);
  EXPECT_EQ(engine.store(prompt(2, 8), ids(20, 8)).stored_chunks.size(), 1U);
}

INSTANTIATE_TEST_SUITE_P(Kinds, DevicePath, ::testing::ValuesIn(device_kinds()),
                         [](const auto& each) { return each.param; });

}  // namespace
}  // namespace kvern
