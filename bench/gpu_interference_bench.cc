// What storing and loading chunks costs a decode that runs on the same GPU. The decode is Kvern's attention of eight
// sequences over 16384 tokens of an 8-head cache, layer after layer, which waits for memory as an engine's steps do. It
// runs first alone, then beside coders of the same process on a share of the multiprocessors, then beside a kvernd in
// another process that takes chunks from the decode's process as fast as it can or at a given rate.

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdio>
#include <fstream>

#include "bench/gpu_engine.h"
#include "kernels/codec_registry.h"
#include "kernels/cuda/attend.h"
#include "kernels/cuda/page_coder.h"

namespace kvern::bench {
namespace {

using Clock = std::chrono::steady_clock;

struct Options : DaemonOptions {
  std::string codec = "int4";
  double seconds = 0.5;
  std::uint32_t chunks = 16;
  std::vector<std::uint32_t> limits = {0, 64, 32, 16, 8, 4, 2};
  std::vector<double> gb_per_s = {2, 10, 0};
};

using bench::check;
void check(const Status& status) {
  if (!status) throw std::runtime_error(status.to_string());
}
double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

/// Decode steps of a model whose time is that of reading caches.
class Decode {
 public:
  Decode() {
    constexpr std::uint32_t kBatch = 8;
    constexpr std::uint32_t kTokens = 16384;
    constexpr std::uint32_t kQueryHeads = 32;
    constexpr std::size_t kHeadBytes = std::size_t{kTokens} * kDim * 2;
    constexpr std::uint32_t kAllHeads = kBatch * kHeads;
    layer_bytes_ = std::size_t{2} * kAllHeads * kHeadBytes;
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    const std::size_t query_bytes = std::size_t{kBatch} * kQueryHeads * kDim * 2;
    queries_ = memory(query_bytes);
    output_ = reinterpret_cast<float*>(memory(query_bytes * 2));
    lse_ = reinterpret_cast<float*>(memory(std::size_t{kBatch} * kQueryHeads * sizeof(float)));
    for (Layer& layer : layers_) {
      std::byte* keys = memory(layer_bytes_);
      std::byte* values = keys + layer_bytes_ / 2;
      for (std::uint32_t head = 0; head < kAllHeads; ++head) {
        AttendSegment& segment = layer.segments.emplace_back();
        segment.entries = kTokens;
        segment.keys.data = keys + head * kHeadBytes;
        segment.values.data = values + head * kHeadBytes;
        segment.keys.stride_bytes = segment.values.stride_bytes = std::size_t{kDim} * 2;
        segment.keys.dtype = segment.values.dtype = DType::kBFloat16;
      }
      std::vector<std::span<const AttendSegment>> heads;
      for (const AttendSegment& segment : layer.segments) heads.emplace_back(&segment, 1);
      const AttendProblem problem{HeadRows::contiguous(queries_, DType::kBFloat16, kBatch * kQueryHeads, 1, kDim), kDim,
                                  0, nullptr, heads};
      auto plan = CudaAttendPlan::make(problem);
      check(status_of(plan));
      layer.plan = std::make_unique<CudaAttendPlan>(std::move(*plan));
      check(layer.plan->put(memory(layer.plan->device_bytes()), stream_));
    }
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
  ~Decode() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    for (void* each : memory_) cudaFree(each);
  }
  Decode(const Decode&) = delete;
  Decode& operator=(const Decode&) = delete;

  struct Steps {
    double mean_ms = 0;
    double slowest_ms = 0;
  };
  /// Steps one after the other for so long.
  Steps run(double seconds) {
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    Steps result;
    int steps = 0;
    for (const auto started = Clock::now(); seconds_since(started) < seconds; ++steps) {
      check(cudaEventRecord(begin, stream_), "cudaEventRecord");
      for (std::uint32_t i = 0; i < kLayers; ++i) {
        const Layer& layer = layers_[i % std::size(layers_)];
        check(layer.plan->attend(queries_, nullptr, output_, lse_, stream_));
      }
      check(cudaEventRecord(end, stream_), "cudaEventRecord");
      check(cudaEventSynchronize(end), "cudaEventSynchronize");
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
      result.mean_ms += static_cast<double>(milliseconds);
      result.slowest_ms = std::max(result.slowest_ms, static_cast<double>(milliseconds));
    }
    result.mean_ms /= steps;
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return result;
  }
  double step_bytes() const { return static_cast<double>(layer_bytes_) * kLayers; }

 private:
  struct Layer {
    std::vector<AttendSegment> segments;
    std::unique_ptr<CudaAttendPlan> plan;
  };
  std::byte* memory(std::size_t bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), "cudaMalloc");
    memory_.push_back(data);
    // Small numbers of either sign.
    check(cudaMemset(data, 0x3c, bytes), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // our stream does not wait for the default one
    return static_cast<std::byte*>(data);
  }
  std::vector<void*> memory_;
  cudaStream_t stream_ = nullptr;
  std::size_t layer_bytes_ = 0;
  std::byte* queries_ = nullptr;
  float* output_ = nullptr;
  float* lse_ = nullptr;
  Layer layers_[4];  ///< their caches are far beyond what the L2 cache holds
};

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options) {
    decode_.run(0.2);
    alone_ = decode_.run(options.seconds);
    std::printf("decode alone: %.3f ms a step, %.0f GB/s\n", alone_.mean_ms,
                decode_.step_bytes() / alone_.mean_ms * 1e-6);
    std::printf("%-44s %10s %12s %12s %12s\n", "beside", "raw GB/s", "ms a step", "slower by", "slowest ms");
    results["alone_ms"] = alone_.mean_ms;
    results["decode_gb_per_s"] = decode_.step_bytes() / alone_.mean_ms * 1e-6;
  }

  void beside_coders(const Engine& engine);
  void beside_daemon(Engine& engine);
  nlohmann::json results;

 private:
  /// Runs work on threads beside the decode; each call gives the raw bytes that it moved.
  void measure(const std::string& name, std::size_t threads, double gb_per_s,
               const std::function<std::size_t(std::size_t thread)>& work);

  const Options& options_;
  Decode decode_;
  Decode::Steps alone_;
};

void Bench::measure(const std::string& name, std::size_t threads, double gb_per_s,
                    const std::function<std::size_t(std::size_t thread)>& work) {
  std::atomic<bool> stopping{false};
  std::atomic<std::size_t> moved{0};
  std::atomic<std::size_t> failed{0};
  std::vector<std::jthread> running;
  for (std::size_t thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      const auto begin = Clock::now();
      double own = 0;
      try {
        while (!stopping) {
          const std::size_t bytes = work(thread);
          moved += bytes;
          own += static_cast<double>(bytes);
          if (gb_per_s == 0) continue;
          const double due = own / (gb_per_s * 1e9);
          std::this_thread::sleep_until(
              begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(due)));
        }
      } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", name.c_str(), error.what());
        ++failed;
      }
    });
  }
  decode_.run(options_.seconds / 5);
  const std::size_t before = moved;
  const auto begin = Clock::now();
  const Decode::Steps steps = decode_.run(options_.seconds);
  const double rate = static_cast<double>(moved - before) / seconds_since(begin) * 1e-9;
  stopping = true;
  running.clear();
  if (failed != 0) throw std::runtime_error("the work beside the decode failed");
  const double slower = steps.mean_ms / alone_.mean_ms - 1;
  std::printf("%-44s %10.1f %12.3f %11.1f%% %12.3f\n", name.c_str(), rate, steps.mean_ms, slower * 100,
              steps.slowest_ms);
  std::fflush(stdout);
  results["beside"].push_back({{"name", name},
                               {"raw_gb_per_s", rate},
                               {"mean_ms", steps.mean_ms},
                               {"slower", slower},
                               {"slowest_ms", steps.slowest_ms}});
}

void Bench::beside_coders(const Engine& engine) {
  constexpr std::size_t kCoders = 4;
  const auto codec = make_codec(options_.codec);
  check(status_of(codec));
  const PagedCache cache = engine.cache();
  std::size_t section_bytes = 0;
  for (const SectionPlan& section : (*codec)->plan(cache.shape(kChunkBlocks))) {
    section_bytes += (section.max_bytes + 63) / 64 * 64;
  }
  std::vector<std::span<std::byte>> outputs;
  for (std::size_t i = 0; i < kCoders; ++i) {
    void* host = nullptr;
    check(cudaMallocHost(&host, section_bytes), "cudaMallocHost");
    outputs.emplace_back(static_cast<std::byte*>(host), section_bytes);
  }
  for (const std::uint32_t limit : options_.limits) {
    auto partition = CudaPartition::make(0, limit);
    check(status_of(partition));
    std::vector<std::unique_ptr<PageCoder>> coders;
    for (std::size_t i = 0; i < kCoders; ++i) {
      auto coder = make_cuda_page_coder(*partition);
      check(status_of(coder));
      coders.push_back(std::move(*coder));
    }
    std::vector<std::size_t> next(kCoders);
    measure(options_.codec + ", this process, " + std::to_string((*partition)->multiprocessors()) + " multiprocessors",
            kCoders, 0, [&](std::size_t thread) {
              const std::size_t chunk = (next[thread]++ * kCoders + thread) % options_.chunks;
              const auto ids = engine.block_ids(static_cast<std::uint32_t>(chunk));
              check(coders[thread]->encode(cache, ids, **codec, outputs[thread]));
              return kChunkBytes;
            });
  }
  for (const auto& output : outputs) cudaFreeHost(output.data());
}

void Bench::beside_daemon(Engine& engine) {
  std::uint64_t prompt = 0;
  engine.start(++prompt);
  for (const double rate : options_.gb_per_s) {
    const std::string pace = rate == 0 ? "all it can" : std::to_string(static_cast<int>(rate)) + " GB/s";
    // A paced store is of one chunk, as a prefill commits them.
    const std::uint32_t chunks = rate == 0 ? options_.chunks : 1;
    measure(options_.codec + ", store to kvernd, " + pace, 1, rate, [&](std::size_t) {
      engine.store(++prompt, chunks, options_.codec);
      return chunks * kChunkBytes;
    });
    measure(options_.codec + ", load from kvernd, " + pace, 1, rate, [&](std::size_t) {
      engine.load(prompt, chunks);
      return chunks * kChunkBytes;
    });
  }
}

int main(int argc, char** argv) {
  Options options;
  CLI::App app("What coding chunks costs a decode on the same GPU.");
  options.add_to(app);
  app.add_option("--codec", options.codec, "codec of the chunks");
  app.add_option("--seconds", options.seconds, "length of each measurement");
  app.add_option("--limits", options.limits, "multiprocessors for coders of this process, 0: all");
  app.add_option("--rates", options.gb_per_s, "raw GB/s to and from the daemon, 0: all it can");
  CLI11_PARSE(app, argc, argv);
  return exit_status("gpu_interference_bench", [&] {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    std::printf("%s\n", properties.name);
    const Daemon daemon(options.kvernd, std::uint64_t{2} << 30, options.daemon_flags);
    Engine engine("unix://" + daemon.socket(), options.chunks);
    Bench bench(options);
    bench.results["device"] = properties.name;
    bench.beside_coders(engine);
    bench.beside_daemon(engine);
    if (!options.json.empty()) std::ofstream(options.json) << bench.results.dump(1) << "\n";
  });
}

}  // namespace
}  // namespace kvern::bench

int main(int argc, char** argv) { return kvern::bench::main(argc, argv); }
