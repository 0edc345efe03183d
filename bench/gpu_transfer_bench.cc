// Chunks between GPU pages and a kvernd beside raw pinned copies of the same run, in the shape of Llama-3.1-8B: 32
// layers, 8 KV heads of 128 bfloat16, blocks of 16 tokens, chunks of 256 (32 MiB raw). Rates count raw bytes; what
// crossed the bus is what the daemon says.

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
#include <fstream>
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
namespace {

namespace fs = std::filesystem;

constexpr std::uint32_t kLayers = 32;
constexpr std::uint32_t kHeads = 8;
constexpr std::uint32_t kDim = 128;
constexpr std::uint32_t kBlockTokens = 16;
constexpr std::uint32_t kChunkBlocks = 16;
constexpr std::size_t kPageBytes = std::size_t{kBlockTokens} * kHeads * kDim * 2;
constexpr std::size_t kChunkBytes = std::size_t{2} * kLayers * kChunkBlocks * kPageBytes;
constexpr std::uint32_t kPatienceMs = 60'000;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

struct Options {
  std::string kvernd;
  std::string json;
  std::uint32_t chunks = 48;
  int rounds = 5;
  std::vector<std::string> codecs = {"raw", "int8", "int4"};
  std::vector<std::string> daemon_flags;
};

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

/// Copies of so many bytes between the device and pinned memory, in pieces of a chunk; GB/s.
double pinned_copy(std::byte* device, std::size_t bytes, cudaMemcpyKind kind, int rounds) {
  void* host = nullptr;
  check(cudaMallocHost(&host, bytes), "cudaMallocHost");
  std::memset(host, 0x3e, bytes);
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> rates;
  for (int round = 0; round <= rounds; ++round) {
    check(cudaEventRecord(begin), "cudaEventRecord");
    for (std::size_t at = 0; at < bytes; at += kChunkBytes) {
      std::byte* there = static_cast<std::byte*>(host) + at;
      const bool out = kind == cudaMemcpyDeviceToHost;
      check(cudaMemcpyAsync(out ? there : device + at, out ? device + at : there, kChunkBytes, kind),
            "cudaMemcpyAsync");
    }
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (round > 0) rates.push_back(static_cast<double>(bytes) / milliseconds * 1e-6);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaFreeHost(host);
  return median(rates);
}

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
  /// Blocks of a prompt lie all over the cache.
  std::vector<std::uint32_t> block_ids(std::uint32_t chunk) const {
    std::vector<std::uint32_t> ids;
    const std::uint32_t usable = blocks_ - 1;
    for (std::uint32_t i = 0; i < kChunkBlocks; ++i) {
      const std::uint64_t at = std::uint64_t{chunk} * kChunkBlocks + i;
      ids.push_back(1 + static_cast<std::uint32_t>(at * kScatter % usable));
    }
    return ids;
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

void run(const Options& options) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  const std::size_t raw_bytes = options.chunks * kChunkBytes;
  // Two prompts in raw form, so that nothing is evicted before it is loaded.
  const Daemon daemon(options.kvernd, 2 * raw_bytes + (std::uint64_t{256} << 20), options.daemon_flags);
  for (int i = 0; !fs::exists(daemon.socket()) && i < 500; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  Engine engine("unix://" + daemon.socket(), options.chunks);
  nlohmann::json results = {{"device", properties.name}, {"chunk_bytes", kChunkBytes}, {"chunks", options.chunks}};

  const std::size_t copied = engine.layer_bytes() / kChunkBytes * kChunkBytes;
  const double to_host = pinned_copy(engine.memory(), copied, cudaMemcpyDeviceToHost, options.rounds);
  const double to_device = pinned_copy(engine.memory(), copied, cudaMemcpyHostToDevice, options.rounds);
  results["pinned_copy_to_host_gb_per_s"] = to_host;
  results["pinned_copy_to_device_gb_per_s"] = to_device;
  std::printf("%s, %u chunks of %.0f MiB raw\n", properties.name, options.chunks,
              static_cast<double>(kChunkBytes) / (1 << 20));
  std::printf("pinned copy: %.1f GB/s to the host, %.1f GB/s to the device\n", to_host, to_device);

  std::uint64_t prompt = 0;
  engine.store(++prompt, 1, "raw");  // registers the pages; pinning begins
  for (int i = 0; engine.status()["devices"][0]["pinned_bytes"] == 0 && i < 2000; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  std::printf("pinned slab: %.1f GiB\n",
              engine.status()["devices"][0]["pinned_bytes"].get<double>() / (std::uint64_t{1} << 30));
  std::printf("%-6s %12s %8s %12s %8s %14s %14s\n", "codec", "store GB/s", "x copy", "load GB/s", "x copy",
              "bus/raw store", "bus/raw load");
  for (const std::string& codec : options.codecs) {
    std::vector<double> stores;
    std::vector<double> loads;
    double bus_out = 0;
    double bus_in = 0;
    for (int round = 0; round <= options.rounds; ++round) {
      const auto before = engine.status()["devices"][0];
      const double store_seconds = engine.store(++prompt, options.chunks, codec);
      const auto between = engine.status()["devices"][0];
      const double load_seconds = engine.load(prompt, options.chunks);
      const auto after = engine.status()["devices"][0];
      const auto raw = static_cast<double>(raw_bytes);
      bus_out = (between["bytes_to_host"].get<double>() - before["bytes_to_host"].get<double>()) / raw;
      bus_in = (after["bytes_to_device"].get<double>() - between["bytes_to_device"].get<double>()) / raw;
      if (round == 0) continue;
      stores.push_back(raw / store_seconds * 1e-9);
      loads.push_back(raw / load_seconds * 1e-9);
    }
    const double store = median(stores);
    const double load = median(loads);
    std::printf("%-6s %12.1f %8.2f %12.1f %8.2f %14.4f %14.4f\n", codec.c_str(), store, store / to_host, load,
                load / to_device, bus_out, bus_in);
    std::fflush(stdout);
    results["codecs"][codec] = {{"store_raw_gb_per_s", store},
                                {"store_to_pinned_copy", store / to_host},
                                {"load_raw_gb_per_s", load},
                                {"load_to_pinned_copy", load / to_device},
                                {"bus_bytes_per_raw_byte_store", bus_out},
                                {"bus_bytes_per_raw_byte_load", bus_in},
                                {"stores_gb_per_s", stores},
                                {"loads_gb_per_s", loads}};
  }
  if (!options.json.empty()) std::ofstream(options.json) << results.dump(1) << "\n";
}

int main(int argc, char** argv) {
  Options options;
  options.kvernd = (fs::read_symlink("/proc/self/exe").parent_path() / "kvernd").string();
  CLI::App app("Chunks between GPU pages and kvernd beside pinned copies.");
  app.add_option("--kvernd", options.kvernd, "the daemon to start (beside this program)");
  app.add_option("--json", options.json, "file for the results");
  app.add_option("--chunks", options.chunks, "chunks of 32 MiB per store");
  app.add_option("--rounds", options.rounds, "rounds after the one that warms up");
  app.add_option("--codecs", options.codecs, "codecs to measure");
  app.add_option("--daemon-flag", options.daemon_flags, "flags for the daemon, as --pipeline.device_threads=8");
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_transfer_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace kvern::bench

int main(int argc, char** argv) { return kvern::bench::main(argc, argv); }
