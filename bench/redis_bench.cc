#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#include "store/redis_tier.h"

/// Writes objects to a Redis server through the tier and reads them again, many at a time; prints the rates as
/// "set_gb_per_s <value>" and "get_gb_per_s <value>". bench/redis_rates.py compares them to redis-benchmark.
namespace kvern::bench {
namespace {

struct Options {
  std::string node;
  std::size_t value_bytes = std::size_t{1} << 20;
  std::size_t objects = 64;
  std::size_t reads = 1000;
  std::size_t at_once = RedisTierConfig().concurrent_reads;
};

struct Free {
  void operator()(std::byte* data) const { ::operator delete (data, std::align_val_t{kTierAlignment}); }
};
using Memory = std::unique_ptr<std::byte, Free>;

Memory memory_of(std::size_t bytes) {
  Memory memory(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kTierAlignment})));
  std::memset(memory.get(), 0x5a, bytes);
  return memory;
}

ChunkKey key_of(std::size_t number) {
  std::vector<std::uint8_t> hash(32, 0x77);
  std::memcpy(hash.data(), &number, sizeof number);
  return {NamespaceId(), 0, BlockHash(hash)};
}

/// Keeps so many operations under way, and waits for all.
class Window {
 public:
  explicit Window(std::size_t size) : size_(size) {}
  void enter() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return running_ < size_; });
    ++running_;
  }
  void leave(const Status& status) {
    std::lock_guard lock(mutex_);
    if (!status) trouble_ = status;
    --running_;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return running_ == 0; });
    if (!trouble_) throw std::runtime_error(trouble_.to_string());
  }

 private:
  const std::size_t size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t running_ = 0;
  Status trouble_;
};

template <typename Run>
void print_rate(const char* name, std::size_t bytes, const Run& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%s %.4f\n", name, static_cast<double>(bytes) / seconds.count() / 1e9);
}

void measure(const Options& options) {
  if (options.objects == 0 || options.at_once == 0)
    throw std::invalid_argument("--objects and --at-once must be above 0");
  RedisTierConfig config;
  config.nodes = {options.node};
  config.prefix = "kvern-bench";
  config.concurrent_reads = static_cast<std::uint32_t>(options.at_once);
  config.breaker.stall_ns = 60'000'000'000;
  RedisTier tier(config, Clock::system(), nullptr);
  const Memory source = memory_of(options.value_bytes);
  std::vector<Memory> targets;
  for (std::size_t i = 0; i < options.at_once; ++i) targets.push_back(memory_of(options.value_bytes));

  print_rate("set_gb_per_s", options.objects * options.value_bytes, [&] {
    Window window(std::size_t{2} * config.concurrent_writes);
    for (std::size_t i = 0; i < options.objects; ++i) {
      const ChunkKey key = key_of(i);
      window.enter();
      tier.write(
          {.key = key, .blocks = {key.last_block}, .pieces = {{source.get(), options.value_bytes}}, .hold = nullptr},
          [&](const Status& status) { window.leave(status); });
    }
    window.wait();
  });
  const auto read_all = [&](std::size_t reads) {
    // Each target is used by one read at a time, as a slab's extents are.
    std::vector<std::unique_ptr<Window>> slots;
    for (std::size_t i = 0; i < options.at_once; ++i) slots.push_back(std::make_unique<Window>(1));
    for (std::size_t i = 0; i < reads; ++i) {
      Window& slot = *slots[i % options.at_once];
      slot.enter();
      tier.read({.key = key_of(i % options.objects), .bytes = options.value_bytes, .blocks = 1}, 0,
                {targets[i % options.at_once].get(), options.value_bytes}, {},
                [&slot](const Status& status) { slot.leave(status); });
    }
    for (const auto& slot : slots) slot->wait();
  };
  read_all(options.objects);
  print_rate("get_gb_per_s", options.reads * options.value_bytes, [&] { read_all(options.reads); });
}

}  // namespace
}  // namespace kvern::bench

int main(int argc, char** argv) {
  CLI::App app{"Rates of the redis tier against one server."};
  kvern::bench::Options options;
  app.add_option("--node", options.node, "host:port of the server")->required();
  app.add_option("--value-bytes", options.value_bytes, "bytes of an object, a multiple of 4096");
  app.add_option("--objects", options.objects, "objects to write");
  app.add_option("--reads", options.reads, "reads to measure");
  app.add_option("--at-once", options.at_once, "reads under way at a time");
  CLI11_PARSE(app, argc, argv);
  try {
    kvern::bench::measure(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "redis_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
