#include <algorithm>
#include <cstring>
#include <iomanip>
#include <ostream>
#include <vector>

#include "base/clock.h"
#include "connector/probe_engine.h"
#include "kvernctl/commands.h"

namespace kvern {
namespace {

constexpr std::uint32_t kTimeoutMs = 30'000;

/// Seconds that one thread needs to copy so many bytes in pieces, from and to memory that is not in a cache.
double memcpy_seconds(std::uint64_t bytes, std::uint64_t piece_bytes) {
  std::vector<std::byte> from(bytes, std::byte{1});
  std::vector<std::byte> to(bytes, std::byte{2});
  const std::int64_t start_ns = Clock::system().now_ns();
  for (std::uint64_t at = 0; at < bytes; at += piece_bytes) {
    std::memcpy(to.data() + at, from.data() + at, std::min(piece_bytes, bytes - at));
  }
  return static_cast<double>(Clock::system().now_ns() - start_ns) * 1e-9;
}

}  // namespace

int run_bench(const DaemonAddress& address, const BenchOptions& options, std::ostream& out) {
  ProbeShape shape = ProbeShape::of_chunk_bytes(options.chunk_bytes, PagePacking::kRows);
  const auto chunks = static_cast<std::uint32_t>(std::max<std::uint64_t>(1, options.total_bytes / shape.chunk_bytes()));
  shape.chunks = chunks;
  auto engine = ProbeEngine::start(address.client_config("kvernctl bench"), shape, address.timeout_ms);
  if (!engine) {
    out << engine.error().to_string() << "\n";
    return 2;
  }
  auto& probe = **engine;
  constexpr std::uint64_t kSeed = 1;
  constexpr std::uint64_t kPrompt = 1;
  probe.fill_pages(kSeed);
  double gathered = 0;
  double stored = 0;
  double loaded = 0;
  const std::uint32_t batch = std::max(1U, options.batch);
  for (std::uint32_t first = 0; first < chunks; first += batch) {
    const std::uint32_t count = std::min(batch, chunks - first);
    const auto times = probe.store(kPrompt, first, count, options.codec, kTimeoutMs);
    if (times.stored_chunks != count) {
      out << "stored " << times.stored_chunks << " of " << count << " chunks: " << times.reason << "\n";
      return 1;
    }
    gathered += times.gathered_seconds;
    stored += times.stored_seconds;
  }
  probe.clear_pages();
  const auto answer = probe.match(kPrompt, chunks);
  for (std::uint32_t first = 0; first < chunks; first += batch) {
    const auto times = probe.load(kPrompt, first, std::min(batch, chunks - first), kTimeoutMs);
    if (!times.loaded) {
      out << "a load failed: " << times.reason << "\n";
      return 1;
    }
    loaded += times.seconds;
  }
  const std::uint64_t bytes = std::uint64_t{chunks} * shape.chunk_bytes();
  const double copy = memcpy_seconds(bytes, shape.chunk_bytes());
  const auto line = [&](const char* name, double seconds) {
    out << std::left << std::setw(34) << name << std::right << std::fixed << std::setprecision(2) << std::setw(8)
        << static_cast<double>(bytes) / seconds * 1e-9 << " GB/s" << std::setw(8) << copy / seconds << " x memcpy\n";
  };
  out << chunks << " chunks of " << shape.chunk_bytes() << " raw bytes, batch " << batch << ", codec " << options.codec
      << ", data plane " << probe.worker_client().session()->data_plane->name() << ", " << answer.tokens
      << " tokens found\n";
  line("memcpy, one thread", copy);
  line("store until pages are free", gathered);
  line("store until others can read", stored);
  line("load, verified, into pages", loaded);
  return 0;
}

}  // namespace kvern
