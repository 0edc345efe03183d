// Chunks between GPU pages and a kvernd beside raw pinned copies of the same run. Rates count raw bytes; what crossed
// the bus is what the daemon says.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>

#include "bench/gpu_engine.h"

namespace kvern::bench {
namespace {

struct Options : DaemonOptions {
  std::uint32_t chunks = 48;
  int rounds = 5;
  std::vector<std::string> codecs = {"raw", "int8", "int4"};
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

void run(const Options& options) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  const std::size_t raw_bytes = options.chunks * kChunkBytes;
  // Two prompts in raw form, so that nothing is evicted before it is loaded.
  const Daemon daemon(options.kvernd, 2 * raw_bytes + (std::uint64_t{256} << 20), options.daemon_flags);
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
  engine.start(++prompt);
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
  CLI::App app("Chunks between GPU pages and kvernd beside pinned copies.");
  options.add_to(app);
  app.add_option("--chunks", options.chunks, "chunks of 32 MiB per store");
  app.add_option("--rounds", options.rounds, "rounds after the one that warms up");
  app.add_option("--codecs", options.codecs, "codecs to measure");
  CLI11_PARSE(app, argc, argv);
  return exit_status("gpu_transfer_bench", [&] { run(options); });
}

}  // namespace
}  // namespace kvern::bench

int main(int argc, char** argv) { return kvern::bench::main(argc, argv); }
