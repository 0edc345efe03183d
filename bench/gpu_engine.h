#pragma once

// An engine with pages on a GPU and a kvernd beside it, for benchmarks: the shape of Llama-3.1-8B with 32 layers, 8 KV
// heads of 128 bfloat16, blocks of 16 tokens, chunks of 256 (32 MiB raw).

#include <cuda_runtime_api.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "connector/client.h"
#include "connector/device_group.h"
#include "connector/transfer_worker.h"
#include "transport/control.h"
#include "transport/wire.h"

extern char** environ;

namespace kvern::bench {

namespace fs = std::filesystem;

constexpr std::uint32_t kLayers = 32;
constexpr std::uint32_t kHeads = 8;
constexpr std::uint32_t kDim = 128;
constexpr std::uint32_t kBlockTokens = 16;
constexpr std::uint32_t kChunkBlocks = 16;
constexpr std::size_t kPageBytes = std::size_t{kBlockTokens} * kHeads * kDim * 2;
constexpr std::size_t kChunkBytes = std::size_t{2} * kLayers * kChunkBlocks * kPageBytes;
constexpr std::uint32_t kPatienceMs = 60'000;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

/// What every benchmark with a daemon is told.
struct DaemonOptions {
  std::string kvernd = (fs::read_symlink("/proc/self/exe").parent_path() / "kvernd").string();
  std::string json;
  std::vector<std::string> daemon_flags;

  void add_to(CLI::App& app) {
    app.add_option("--kvernd", kvernd, "the daemon to start (beside this program)");
    app.add_option("--json", json, "file for the results");
    app.add_option("--daemon-flag", daemon_flags, "flags for the daemon, as --pipeline.device_threads=8");
  }
};

/// Runs the benchmark; what it throws is printed, and makes the exit status 1.
template <typename Run>
int exit_status(const char* program, Run run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return 1;
  }
}

/// A kvernd of its own, ended with this.
class Daemon {
 public:
  Daemon(const std::string& program, std::uint64_t dram_bytes, const std::vector<std::string>& flags)
      : folder_(fs::temp_directory_path() / ("kvern-gpu-bench-" + std::to_string(::getpid()))),
        run_("/dev/shm/" + folder_.filename().string()) {
    fs::create_directories(folder_);
    std::vector<std::string> words{program,
                                   "--server.socket=" + socket(),
                                   "--server.run_dir=" + run_.string(),
                                   "--metrics.listen=",
                                   "--store.eviction=lru",
                                   "--log.level=warn",
                                   "--store.dram_bytes=" + std::to_string(dram_bytes)};
    words.insert(words.end(), flags.begin(), flags.end());
    std::vector<char*> arguments;
    for (auto& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    if (::posix_spawn(&pid_, program.c_str(), nullptr, nullptr, arguments.data(), environ) != 0) {
      throw std::runtime_error("cannot start " + program);
    }
    for (int i = 0; !fs::exists(socket()) && i < 500; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  ~Daemon() {
    ::kill(pid_, SIGTERM);
    int status = 0;
    ::waitpid(pid_, &status, 0);
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
    fs::remove_all(run_, ignored);
  }
  std::string socket() const { return (folder_ / "kvernd.sock").string(); }

 private:
  const fs::path folder_;
  const fs::path run_;
  pid_t pid_ = -1;
};

/// Pages of the device as vLLM 0.29 and later has them by default: per layer [block][token][head][K dims | V dims].
class Engine {
 public:
  Engine(const std::string& address, std::uint32_t chunks) : blocks_(chunks * kChunkBlocks + 1) {
    pages_.block_tokens = kBlockTokens;
    pages_.heads = pages_.model_heads = kHeads;
    pages_.group_layers = kLayers;
    pages_.key_dim = pages_.value_dim = kDim;
    const std::size_t layer_bytes = 2 * blocks_ * kPageBytes;
    std::vector<std::uint16_t> numbers(layer_bytes / 2);
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    float value = 0;
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      // One in four is drawn, the others follow from it: drawing is slow.
      value = i % 4 == 0 ? normal(random) : value * 0.71F + 0.1F;
      std::uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof bits);
      numbers[i] = static_cast<std::uint16_t>(bits >> 16);
    }
    for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
      void* memory = nullptr;
      check(cudaMalloc(&memory, layer_bytes), "cudaMalloc");
      check(cudaMemcpy(memory, numbers.data(), layer_bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
      std::rotate(numbers.begin(), numbers.begin() + 4096, numbers.end());
      pages_.layers.push_back({.base = static_cast<std::byte*>(memory),
                               .reachable_bytes = layer_bytes,
                               .pages = blocks_,
                               .page_stride_bytes = 2 * kPageBytes,
                               .head_stride_bytes = 2 * kDim * 2,
                               .token_stride_bytes = kHeads * 2 * kDim * 2,
                               .value_offset_bytes = kDim * 2});
    }
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    auto device = cuda_engine_device(pages_.layers.front().base);
    if (!device) throw std::runtime_error(device.error().message());
    pages_.device = *device;
    ClientConfig config;
    config.address = address;
    config.client_name = "gpu_transfer_bench";
    config.staging_bytes = 64U << 20;
    client_ = std::make_shared<Client>(config);
    NamespaceSpec spec;
    spec.fields = {{"model", "bench"},
                   {"weights", "00"},
                   {"dtype", "bfloat16"},
                   {"kv_dtype", "bfloat16"},
                   {"block_tokens", std::to_string(kBlockTokens)},
                   {"chunk_tokens", std::to_string(kBlockTokens * kChunkBlocks)},
                   {"hash_algorithm", "random"},
                   {"hash_seed", "00"},
                   {"layers", std::to_string(kLayers)},
                   {"kv_heads", std::to_string(kHeads)},
                   {"key_dim", std::to_string(kDim)},
                   {"value_dim", std::to_string(kDim)},
                   {"groups", "full:" + std::to_string(kLayers)},
                   {"rope", "none"}};
    handle_ = client_->add_namespace(spec);
    if (!client_->wait_ready(kPatienceMs)) throw std::runtime_error(client_->problem());
    worker_ = std::make_unique<TransferWorker>(client_, WorkerConfig{.threads = 2});
    if (Status status = worker_->register_group(pages_); !status) throw std::runtime_error(status.message());
  }
  ~Engine() {
    worker_.reset();
    client_->close();
    for (const LayerPages& layer : pages_.layers) cudaFree(layer.base);
  }

  /// Stores a first chunk, which registers the pages, and waits until the daemon has pinned its slab.
  void start(std::uint64_t prompt) {
    store(prompt, 1, "raw");
    for (int i = 0; status()["devices"][0]["pinned_bytes"] == 0 && i < 2000; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }

  /// Seconds until others can read all chunks of the prompt.
  double store(std::uint64_t prompt, std::uint32_t chunks, const std::string& codec) {
    StoreJob job;
    job.id = ++last_job_;
    job.namespace_handle = handle_;
    job.codec_spec = codec;
    for (std::uint32_t chunk = 0; chunk < chunks; ++chunk) {
      job.chunks.push_back(
          {hashes(prompt, chunk), block_ids(chunk), std::uint64_t{chunk} * kChunkBlocks * kBlockTokens});
    }
    worker_->submit_store(std::move(job));
    const JobResult result = last_event();
    if (result.stored_chunks.size() != chunks) throw std::runtime_error("not all chunks were stored: " + result.reason);
    return result.seconds;
  }
  double load(std::uint64_t prompt, std::uint32_t chunks) {
    LoadJob job;
    job.id = ++last_job_;
    job.namespace_handle = handle_;
    for (std::uint32_t chunk = 0; chunk < chunks; ++chunk) {
      job.pieces.push_back({.hashes = hashes(prompt, chunk), .block_ids = block_ids(chunk)});
    }
    worker_->submit_load(std::move(job));
    const JobResult result = last_event();
    if (result.event != JobEvent::kLoaded) throw std::runtime_error("a load failed: " + result.reason);
    return result.seconds;
  }
  nlohmann::json status() const {
    const auto session = client_->session();
    wire::ControlRequest request;
    request.set_session_token(session->token);
    request.mutable_status();
    wire::ControlReply reply;
    if (Status status = session->control->call(request, &reply, std::chrono::seconds(10)); !status) {
      throw std::runtime_error(status.message());
    }
    return nlohmann::json::parse(reply.status_report().json());
  }
  /// Of a chunk of a prompt, which lie all over the cache.
  std::vector<std::uint32_t> block_ids(std::uint32_t chunk) const {
    std::vector<std::uint32_t> ids;
    const std::uint32_t usable = blocks_ - 1;
    for (std::uint32_t i = 0; i < kChunkBlocks; ++i) {
      const std::uint64_t at = std::uint64_t{chunk} * kChunkBlocks + i;
      ids.push_back(1 + static_cast<std::uint32_t>(at * kScatter % usable));
    }
    return ids;
  }
  /// The pages as device code sees them.
  PagedCache cache() const { return DeviceGroup(pages_).cache(); }
  std::byte* memory() const { return pages_.layers.front().base; }
  std::size_t layer_bytes() const { return pages_.layers.front().reachable_bytes; }

 private:
  static std::vector<BlockHash> hashes(std::uint64_t prompt, std::uint32_t chunk) {
    std::vector<BlockHash> result;
    for (std::uint32_t block = 0; block < kChunkBlocks; ++block) {
      std::array<std::uint8_t, 32> bytes{};
      const std::uint64_t words[] = {prompt, chunk, block};
      std::memcpy(bytes.data(), words, sizeof words);
      result.emplace_back(bytes);
    }
    return result;
  }
  JobResult last_event() {
    if (!worker_->drain(kPatienceMs)) throw std::runtime_error("a job does not end");
    auto events = worker_->poll();
    if (events.empty()) throw std::runtime_error("a job ended without an event");
    return std::move(events.back());
  }

  static constexpr std::uint64_t kScatter = 331;  ///< a prime, no factor of the number of blocks
  const std::uint32_t blocks_;
  GroupPages pages_;
  std::shared_ptr<Client> client_;
  std::unique_ptr<TransferWorker> worker_;
  int handle_ = 0;
  std::uint64_t last_job_ = 0;
};

}  // namespace kvern::bench
