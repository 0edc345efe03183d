// The NVMe tier beside fio on the same file system, in turns; reads while it writes; the time that recovery takes; the
// index.
//
// fio writes and reads one file in requests of 1 MiB as deep as the tier's, and flushes at the end; with its buffers
// registered with the kernel and without, of which the faster counts. The tier writes chunk objects of a common size
// and reads them back in the order of a prompt; what it does beyond moving bytes (records, flushes before them,
// checksums) is in its time.

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/steps.h"
#include "store/nvme_tier.h"
#include "transport/shared_memory.h"

namespace kvern::bench {
namespace {

constexpr std::int64_t kPatienceNs = 600'000'000'000;
constexpr std::uint64_t kWritesAtOnce = 24;    ///< objects: the tier's queue is never empty
constexpr std::chrono::seconds kPatience{10};  ///< for huge pages, of which the daemon's slab takes as many
constexpr std::uint64_t kReadsAtOnce = 4;      ///< as a long prompt has them

struct Options {
  std::string folder = "/var/tmp";
  std::uint64_t bytes = std::uint64_t{2} << 30;
  std::uint64_t object_bytes = std::uint64_t{8} << 20;
  int rounds = 3;
  std::uint64_t recovery_objects = 200'000;
  std::string memory = "daemon";
};

/// What the tier's objects lie in.
class ObjectMemory {
 public:
  ObjectMemory(const std::string& kind, std::size_t bytes) : registered_(kind == "registered") {
    if (kind != "daemon") {
      ordinary_.emplace(bytes);
      return;
    }
    UniqueFd file(::memfd_create("nvme-bench", MFD_CLOEXEC));
    if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0 || ::fchmod(file.get(), 0600) != 0) {
      throw std::runtime_error("no file in memory");
    }
    auto shared = SharedMemory::map(std::move(file), bytes, true);
    if (!shared) throw std::runtime_error(shared.error().to_string());
    shared_ = std::move(*shared);
    const double begin = now(kWallTime);
    if (shared_.reserve(0, bytes, kPatience) != 0) throw std::runtime_error("no room for the objects in memory");
    const double reserved = now(kWallTime);
    std::memset(span().data(), 1, bytes);
    const double gib = static_cast<double>(bytes) / (1U << 30);
    std::printf("# %zu of %zu MiB in huge pages: %.2f s per GiB to reserve, %.2f to write for the first time\n",
                shared_.huge_page_bytes() >> 20, bytes >> 20, (reserved - begin) / gib,
                (now(kWallTime) - reserved) / gib);
  }
  std::span<std::byte> span() const { return ordinary_ ? ordinary_->span() : shared_.bytes(); }
  std::vector<std::span<std::byte>> to_register() const {
    return registered_ ? std::vector{span()} : std::vector<std::span<std::byte>>();
  }

 private:
  const bool registered_;
  std::optional<AlignedBuffer> ordinary_;
  SharedMemory shared_;
};

/// What is missing to a tier's functions: waiting for several at once.
class Latch {
 public:
  std::function<void(Status)> one() {
    std::lock_guard lock(mutex_);
    ++left_;
    return [this](const Status& status) {
      std::lock_guard held(mutex_);
      if (!status) failed_ = status.to_string();
      --left_;
      changed_.notify_all();
    };
  }
  void wait_below(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return left_ < count; });
    if (!failed_.empty()) throw std::runtime_error(failed_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t left_ = 0;
  std::string failed_;
};

NvmeConfig config_of(const Options& options, const std::string& name) {
  NvmeConfig config;
  config.region_bytes = NvmeConfig::kRegionBytes;
  config.files = {{options.folder + "/" + name, (options.bytes / config.region_bytes + 2) * config.region_bytes}};
  config.rewrite_share = 0;
  return config;
}

std::vector<BlockHash> hashes_of(std::uint64_t number, std::size_t blocks) {
  std::vector<BlockHash> hashes;
  for (std::uint64_t block = 0; block < blocks; ++block) {
    std::array<std::uint8_t, 32> bytes{};
    std::memcpy(bytes.data(), &number, sizeof number);
    std::memcpy(bytes.data() + sizeof number, &block, sizeof block);
    hashes.emplace_back(bytes);
  }
  return hashes;
}

/// GB/s of fio's own count, flush at the end included. Behind the log in the log's file.
double fio(const Options& options, const NvmeFileConfig& log, const std::string& direction, bool registered) {
  const std::string out = log.path + ".json";
  const std::string command = "fio --name=kvern --filename=" + log.path + " --offset=" + std::to_string(log.bytes) +
                              " --size=" + std::to_string(options.bytes) + " --rw=" + direction +
                              " --bs=1M --direct=1 --ioengine=io_uring --iodepth=16 --end_fsync=1" +
                              (registered ? " --fixedbufs=1" : "") + " --output-format=json --output=" + out +
                              " >/dev/null 2>&1";
  if (std::system(command.c_str()) != 0) throw std::runtime_error("fio failed: is it installed? " + command);
  const auto report = nlohmann::json::parse(std::ifstream(out));
  std::filesystem::remove(out);
  return report["jobs"][0][direction]["bw_bytes"].get<double>() * 1e-9;
}

double faster_fio(const Options& options, const NvmeFileConfig& log, const std::string& direction) {
  return std::max(fio(options, log, direction, false), fio(options, log, direction, true));
}

struct Speeds {
  std::vector<double> read, write;
};

std::span<std::byte> slot(std::span<std::byte> slab, const Options& options, std::uint64_t number) {
  return slab.subspan((number % kWritesAtOnce) * options.object_bytes, options.object_bytes);
}

void start_write(NvmeTier& tier, std::uint64_t number, std::span<std::byte> from, Latch& latch) {
  TierObject object;
  object.blocks = hashes_of(number, 16);
  object.key.last_block = object.blocks.back();
  object.pieces = {from};
  tier.write(std::move(object), latch.one());
}

void start_read(NvmeTier& tier, std::uint64_t number, std::span<std::byte> into, Latch& latch) {
  TierHit hit;
  hit.key.last_block = hashes_of(number, 16).back();
  hit.bytes = into.size();
  tier.read(hit, 0, into, {}, latch.one());
}

void drive(NvmeTier& tier, const Options& options, std::uint64_t first, std::span<std::byte> slab, Speeds& speeds) {
  const std::uint64_t objects = options.bytes / options.object_bytes;
  const double begin = now(kWallTime);
  {
    Latch latch;
    for (std::uint64_t i = 0; i < objects; ++i) {
      latch.wait_below(kWritesAtOnce);
      start_write(tier, first + i, slot(slab, options, i), latch);
    }
    latch.wait_below(1);
  }
  const double written = now(kWallTime);
  {
    Latch latch;
    for (std::uint64_t i = 0; i < objects; ++i) {
      latch.wait_below(kReadsAtOnce);
      start_read(tier, first + i, slot(slab, options, i), latch);
    }
    latch.wait_below(1);
  }
  const double read = now(kWallTime);
  const auto bytes = static_cast<double>(objects * options.object_bytes) * 1e-9;
  speeds.write.push_back(bytes / (written - begin));
  speeds.read.push_back(bytes / (read - written));
}

/// One object after another, alone and in a burst of writes.
void latency(NvmeTier& tier, const Options& options, std::uint64_t first, std::span<std::byte> slab,
             std::vector<double>& alone, std::vector<double>& among_writes) {
  const AlignedBuffer into(options.object_bytes);
  const auto read_one = [&](std::uint64_t number) {
    Latch latch;
    const double begin = now(kWallTime);
    start_read(tier, number, into.span(), latch);
    latch.wait_below(1);
    return (now(kWallTime) - begin) * 1e3;
  };
  constexpr std::uint64_t kReads = 40;
  for (std::uint64_t i = 0; i < kReads; ++i) alone.push_back(read_one(first + i));
  Latch writes;
  for (std::uint64_t i = 0; i < kReads; ++i) {
    for (int more = 0; more < 2; ++more) {
      writes.wait_below(kWritesAtOnce);
      start_write(tier, (first << 8) + 2 * i + static_cast<std::uint64_t>(more), slot(slab, options, 2 * i), writes);
    }
    among_writes.push_back(read_one(first + i));
  }
  writes.wait_below(1);
}

void report(const char* key, double value) { std::printf("%s %.6g\n", key, value); }

void beside_fio(const Options& options) {
  const ObjectMemory memory(options.memory, kWritesAtOnce * options.object_bytes);
  const std::span<std::byte> slab = memory.span();
  std::mt19937_64 random(1);
  for (std::size_t i = 0; i < slab.size(); i += sizeof(std::uint64_t)) {
    const std::uint64_t word = random();
    std::memcpy(slab.data() + i, &word, sizeof word);
  }
  NvmeConfig config = config_of(options, "kvern-bench.log");
  config.io.memory = memory.to_register();
  Speeds ours, theirs;
  std::vector<double> alone, among_writes;
  {
    NvmeTier tier(config, Clock::system(), nullptr);
    if (!tier.recovery(kPatienceNs)) throw std::runtime_error("recovery did not end");
    std::printf("# %s\n", std::string(tier.io_kind()).c_str());
    // The first pass over each place changes its extent from unwritten to written, which is not what is measured.
    Speeds warm_up;
    for (const std::uint64_t pass : {1U, 2U}) drive(tier, options, pass << 62, slab, warm_up);
    fio(options, config.files[0], "write", false);
    for (int round = 1; round <= options.rounds; ++round) {
      theirs.write.push_back(faster_fio(options, config.files[0], "write"));
      theirs.read.push_back(faster_fio(options, config.files[0], "read"));
      drive(tier, options, static_cast<std::uint64_t>(round) << 32, slab, ours);
    }
    latency(tier, options, static_cast<std::uint64_t>(options.rounds) << 32, slab, alone, among_writes);
  }
  std::filesystem::remove(config.files[0].path);
  std::vector<double> read, write;
  for (std::size_t i = 0; i < ours.read.size(); ++i) {
    read.push_back(ours.read[i] / theirs.read[i]);
    write.push_back(ours.write[i] / theirs.write[i]);
  }
  report("store.nvme.read_gb_per_s", median(ours.read));
  report("store.nvme.write_gb_per_s", median(ours.write));
  report("store.nvme.read_ms", median(alone));
  report("store.nvme.read_among_writes_ms", median(among_writes));
  report("store.nvme.read_over_fio", median(read));
  report("store.nvme.write_over_fio", median(write));
}

/// Small objects, so that a disk of any size holds many: tables are all that recovery reads.
void recovery(const Options& options) {
  constexpr std::uint64_t kObjectBytes = kTierAlignment;
  constexpr std::size_t kBlocks = 8;
  NvmeConfig config;
  config.region_bytes = NvmeConfig::kRegionBytes;
  const std::uint64_t bytes = options.recovery_objects * kObjectBytes * 5 / 4 + 2 * config.region_bytes;
  config.files = {{options.folder + "/kvern-bench.log", bytes / kTierAlignment * kTierAlignment}};
  config.sync = false;
  config.rewrite_share = 0;
  const AlignedBuffer page(kObjectBytes);
  {
    NvmeTier tier(config, Clock::system(), nullptr);
    Latch latch;
    for (std::uint64_t i = 0; i < options.recovery_objects; ++i) {
      latch.wait_below(10'000);
      TierObject object;
      object.blocks = hashes_of(i, kBlocks);
      object.key.last_block = object.blocks.back();
      object.pieces = {page.span()};
      tier.write(std::move(object), latch.one());
    }
    latch.wait_below(1);
  }
  std::vector<double> seconds;
  for (int round = 0; round < options.rounds; ++round) {
    NvmeTier tier(config, Clock::system(), nullptr);
    const auto recovered = tier.recovery(kPatienceNs);
    if (!recovered || recovered->objects != options.recovery_objects) throw std::runtime_error("objects are missing");
    const double millions = static_cast<double>(recovered->objects) * 1e-6;
    seconds.push_back(recovered->seconds / millions);
    if (round > 0) continue;
    report("store.nvme.index_bytes_per_chunk", static_cast<double>(tier.nvme_stats().index_bytes) / millions * 1e-6);
    const int lookups = 200'000;
    const double begin = now(kThreadTime);
    for (int i = 0; i < lookups; ++i) {
      const auto number = static_cast<std::uint64_t>(i) * 7919 % options.recovery_objects;
      tier.find({{{}, 0, hashes_of(number, kBlocks)}}, {}, [](const auto&) {});
    }
    report("store.nvme.lookups_per_s", lookups / (now(kThreadTime) - begin));
  }
  std::filesystem::remove(config.files[0].path);
  report("store.recovery.s_per_million", median(seconds));
}

}  // namespace
}  // namespace kvern::bench

int main(int argc, char** argv) {
  kvern::bench::Options options;
  CLI::App app("The NVMe tier beside fio");
  app.add_option("--folder", options.folder, "where its files go: a disk with direct I/O")->capture_default_str();
  app.add_option("--bytes", options.bytes, "written and read in a round")->capture_default_str();
  app.add_option("--object-bytes", options.object_bytes, "of a chunk object")->capture_default_str();
  app.add_option("--rounds", options.rounds)->capture_default_str();
  app.add_option("--recovery-objects", options.recovery_objects)->capture_default_str();
  app.add_option("--memory", options.memory, "the daemon's, ordinary pages, or those registered with io_uring")
      ->check(CLI::IsMember({"daemon", "ordinary", "registered"}))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    kvern::bench::beside_fio(options);
    kvern::bench::recovery(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "nvme_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
