// Stores, commits, loads and look-ups through a running kvernd, beside one-thread memcpy in the same rounds.
//
// Usage: transfer_bench --address unix:///… --plane local|tcp [--rounds 5] [--working-set-mib 1024]
// Prints progress on stderr and one flat JSON object on stdout; keys as in docs/benchmarks.md.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/clock.h"
#include "connector/probe_engine.h"

namespace kvern {
namespace {

constexpr std::uint32_t kTimeoutMs = 60'000;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

double seconds_of(const auto& work) {
  const std::int64_t start_ns = Clock::system().now_ns();
  work();
  return static_cast<double>(Clock::system().now_ns() - start_ns) * 1e-9;
}

/// Two buffers of the working set's size for the reference: one thread, one object at a time, never in a cache.
class MemcpyReference {
 public:
  explicit MemcpyReference(std::uint64_t bytes) : from_(bytes, std::byte{1}), to_(bytes, std::byte{2}) {}
  double seconds(std::uint64_t object_bytes) {
    return seconds_of([&] {
      for (std::uint64_t at = 0; at + object_bytes <= from_.size(); at += object_bytes) {
        std::memcpy(to_.data() + at, from_.data() + at, object_bytes);
      }
    });
  }

 private:
  std::vector<std::byte> from_;
  std::vector<std::byte> to_;
};

struct Case {
  std::string name;  ///< 256KiB …
  std::uint64_t chunk_bytes = 0;
  PagePacking packing = PagePacking::kRows;
  std::string packing_name;
  std::uint32_t batch = 8;
};

/// Runs one case: medians over the rounds of (time of memcpy) / (time of ours), each pair from one round.
void run_case(const ClientConfig& address, const std::string& plane, const Case& which, int rounds,
              std::uint64_t working_set, MemcpyReference& memcpy_reference, nlohmann::json& results) {
  ProbeShape shape = ProbeShape::of_chunk_bytes(which.chunk_bytes, which.packing);
  shape.chunks = static_cast<std::uint32_t>(working_set / shape.chunk_bytes());
  auto started = ProbeEngine::start(address, shape, 10'000);
  if (!started) throw std::runtime_error(started.error().to_string());
  auto& engine = **started;
  engine.fill_pages(1);
  static std::uint64_t prompt = 1000;

  std::map<std::string, std::vector<double>> ratios;
  const std::vector<std::string> codecs =
      plane == "local" && which.batch == 8 ? std::vector<std::string>{"raw", "int8"} : std::vector<std::string>{"raw"};
  for (int round = 0; round <= rounds; ++round) {  // the first warms up
    const double copy = memcpy_reference.seconds(shape.chunk_bytes());
    for (const auto& codec : codecs) {
      ++prompt;
      double gathered = 0;
      double stored = 0;
      double loaded = 0;
      for (std::uint32_t first = 0; first < shape.chunks; first += which.batch) {
        const std::uint32_t count = std::min(which.batch, shape.chunks - first);
        const auto times = engine.store(prompt, first, count, codec, kTimeoutMs);
        if (times.stored_chunks != count) throw std::runtime_error("a store failed: " + times.reason);
        gathered += times.gathered_seconds;
        stored += times.stored_seconds;
      }
      for (std::uint32_t first = 0; first < shape.chunks; first += which.batch) {
        const auto times = engine.load(prompt, first, std::min(which.batch, shape.chunks - first), kTimeoutMs);
        if (!times.loaded) throw std::runtime_error("a load failed: " + times.reason);
        loaded += times.seconds;
      }
      if (round == 0) continue;
      ratios["store_" + codec + "_over_memcpy"].push_back(copy / gathered);
      ratios["commit_" + codec + "_over_memcpy"].push_back(copy / stored);
      ratios["load_" + codec + "_over_memcpy"].push_back(copy / loaded);
    }
  }
  const std::string prefix = "transfer." + plane + "." + which.name + "." + (which.batch == 1 ? "b1." : "") +
                             (which.packing_name.empty() ? "" : which.packing_name + ".");
  for (const auto& [name, values] : ratios) {
    results[prefix + name] = median(values);
    std::cerr << prefix << name << " " << median(values) << "\n";
  }
}

void run_match(const ClientConfig& address, const std::string& plane, nlohmann::json& results) {
  ProbeShape shape = ProbeShape::of_chunk_bytes(64U << 10, PagePacking::kRows);
  shape.chunks = 1024 / shape.chunk_blocks;
  auto started = ProbeEngine::start(address, shape, 10'000);
  if (!started) throw std::runtime_error(started.error().to_string());
  auto& engine = **started;
  engine.fill_pages(1);
  const std::uint64_t prompt = 1;
  if (engine.store(prompt, 0, shape.chunks, "raw", kTimeoutMs).stored_chunks != shape.chunks) {
    throw std::runtime_error("the prompt for the look-ups could not be stored");
  }
  const int calls = plane == "local" ? 2000 : 300;
  const std::string prefix = plane == "local" ? "match." : "match.tcp.";
  for (const std::uint32_t blocks : {1U, 64U, 1024U}) {
    std::vector<double> microseconds;
    const std::string hashes = engine.hashes(prompt, shape.chunks).substr(0, std::size_t{blocks} * 32);
    for (int call = 0; call < calls; ++call) {
      std::uint32_t tokens = 0;
      microseconds.push_back(1e6 * seconds_of([&] { tokens = engine.match_hashes(prompt, hashes).tokens; }));
      engine.release(prompt);
      if (tokens != blocks * shape.block_tokens) throw std::runtime_error("a stored prompt was not found");
    }
    std::sort(microseconds.begin(), microseconds.end());
    const std::string name = prefix + std::to_string(blocks);
    results[name + ".p50_us"] = microseconds[microseconds.size() / 2];
    results[name + ".p99_us"] = microseconds[microseconds.size() * 99 / 100];
    std::cerr << name << ".p50_us " << microseconds[microseconds.size() / 2] << "\n";
  }
}

}  // namespace
}  // namespace kvern

int main(int argc, char** argv) {
  CLI::App app{"Transfers and look-ups through a running kvernd, beside memcpy."};
  kvern::ClientConfig address;
  address.client_name = "transfer_bench";
  address.staging_bytes = 128U << 20;
  std::string plane = "local";
  int rounds = 5;
  std::uint64_t working_set_mib = 1024;
  app.add_option("--address", address.address)->required();
  app.add_option("--plane", plane, "local or tcp: names the results; tcp asks for the UCX data plane")
      ->check(CLI::IsMember({"local", "tcp"}));
  app.add_option("--rounds", rounds);
  app.add_option("--working-set-mib", working_set_mib);
  app.add_flag("--insecure", address.insecure);
  CLI11_PARSE(app, argc, argv);
  if (plane == "tcp") address.data_plane = "ucx";

  nlohmann::json results = nlohmann::json::object();
  try {
    const std::uint64_t working_set = working_set_mib << 20;
    kvern::MemcpyReference memcpy_reference(working_set);
    const std::map<std::string, std::uint64_t> sizes{{"256KiB", 256U << 10}, {"2MiB", 2U << 20}, {"8MiB", 8U << 20}};
    for (const auto& [name, bytes] : sizes) {
      std::vector<kvern::Case> cases{{name, bytes, kvern::PagePacking::kRows, "", 8}};
      if (plane == "local") {
        cases.push_back({name, bytes, kvern::PagePacking::kRows, "", 1});
        cases.push_back({name, bytes, kvern::PagePacking::kCpuVec, "cpu_vec", 8});
        cases.push_back({name, bytes, kvern::PagePacking::kCpuAmx, "cpu_amx", 8});
      }
      for (const auto& which : cases) {
        kvern::run_case(address, plane, which, rounds, working_set, memcpy_reference, results);
      }
    }
    kvern::run_match(address, plane, results);
  } catch (const std::exception& error) {
    std::cerr << "transfer_bench: " << error.what() << "\n";
    return 1;
  }
  std::cout << results.dump(1) << "\n";
  return 0;
}
