#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <atomic>
#include <cerrno>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "tests/store/nvme_fixture.h"
#include "tests/store/nvme_oracle.h"

namespace kvern {
namespace {

using testing::kPatienceNs;
using testing::NvmeObject;
using testing::NvmeOracle;
using testing::open_tier;
using testing::TempFolder;

/// A disk in memory with a cache that loses power: what was neither flushed nor written through is then there or not,
/// sector by sector.
class Disk {
 public:
  explicit Disk(std::size_t bytes) : cached_(bytes), stable_(bytes) {}

  std::int64_t read(std::uint64_t offset, std::span<std::byte> into) {
    std::lock_guard lock(mutex_);
    if (off_) return -EIO;
    std::copy_n(cached_.begin() + static_cast<std::ptrdiff_t>(offset), into.size(), into.begin());
    return static_cast<std::int64_t>(into.size());
  }
  std::int64_t write(std::uint64_t offset, std::span<const std::byte> from, bool through) {
    std::lock_guard lock(mutex_);
    if (!step()) return -EIO;
    std::ranges::copy(from, cached_.begin() + static_cast<std::ptrdiff_t>(offset));
    if (through) {
      std::ranges::copy(from, stable_.begin() + static_cast<std::ptrdiff_t>(offset));
    } else {
      unstable_.push_back({offset, {from.begin(), from.end()}});
    }
    return static_cast<std::int64_t>(from.size());
  }
  std::int64_t sync() {
    std::lock_guard lock(mutex_);
    if (!step()) return -EIO;
    for (const auto& write : unstable_) apply(write, 0, write.bytes.size());
    unstable_.clear();
    return 0;
  }
  /// Power goes after so many writes and flushes.
  void lose_power_after(std::size_t steps) {
    std::lock_guard lock(mutex_);
    steps_left_ = steps;
  }
  void power_on(std::mt19937_64& random) {
    std::lock_guard lock(mutex_);
    for (const auto& write : unstable_) {
      for (std::size_t sector = 0; sector < write.bytes.size(); sector += kSector) {
        if (random() % 2 == 0) apply(write, sector, kSector);
      }
    }
    unstable_.clear();
    cached_ = stable_;
    steps_left_ = ~std::size_t{0};
    off_ = false;
  }
  std::vector<std::byte>& bytes() { return cached_; }

 private:
  static constexpr std::size_t kSector = 512;
  struct Write {
    std::uint64_t offset;
    std::vector<std::byte> bytes;
  };

  bool step() {
    off_ = off_ || steps_left_ == 0;
    if (!off_) --steps_left_;
    return !off_;
  }
  void apply(const Write& write, std::size_t from, std::size_t count) {
    std::copy_n(write.bytes.begin() + static_cast<std::ptrdiff_t>(from), count,
                stable_.begin() + static_cast<std::ptrdiff_t>(write.offset + from));
  }

  std::mutex mutex_;
  std::vector<std::byte> cached_;
  std::vector<std::byte> stable_;
  std::vector<Write> unstable_;
  std::size_t steps_left_ = ~std::size_t{0};
  bool off_ = false;
};

class DiskIo final : public BlockIo {
 public:
  explicit DiskIo(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {}
  void read(std::uint32_t, std::uint64_t offset, std::span<std::byte> into, std::stop_token, BlockDone done) override {
    done(disk_->read(offset, into));
  }
  void write(std::uint32_t, std::uint64_t offset, std::span<const std::byte> from, bool through,
             BlockDone done) override {
    done(disk_->write(offset, from, through));
  }
  void sync(std::uint32_t, BlockDone done) override { done(disk_->sync()); }
  std::string_view kind() const override { return "memory"; }

 private:
  const std::shared_ptr<Disk> disk_;
};

constexpr std::uint32_t kMostPages = 5;

NvmeConfig model_log(const TempFolder& folder) {
  NvmeConfig config = testing::small_log(folder.file("log"));
  config.region_bytes = std::uint64_t{128} << 10;
  config.files[0].bytes = 8 * config.region_bytes;
  config.rewrite_share = 0.25;
  return config;
}

NvmeTier::OpenIo on(std::shared_ptr<Disk> disk) {
  return [disk](const std::vector<int>&, const BlockIoConfig&) {
    return OpenedBlockIo{std::make_unique<DiskIo>(disk), ""};
  };
}

void require(const ::testing::AssertionResult& result) {
  if (!result) RC_FAIL(result.message());
}

/// Random operations on a tier, told to an oracle.
class Driver {
 public:
  Driver(NvmeOracle& oracle, std::uint64_t seed) : oracle_(oracle), random_(seed) {}

  void run(NvmeTier& tier, std::size_t operations) {
    for (std::size_t i = 0; i < operations; ++i) one(tier);
  }
  std::mt19937_64& random() { return random_; }

 private:
  std::function<void(Status)> told(std::uint64_t operation) {
    // What ends on the caller's thread was known before, and is kept no longer for it.
    return [&oracle = oracle_, operation, caller = std::this_thread::get_id()](const Status& status) {
      if (status && std::this_thread::get_id() != caller) oracle.ended_well(operation);
    };
  }

  void one(NvmeTier& tier) {
    const auto pages = static_cast<std::uint32_t>(1 + random_() % kMostPages);
    const NvmeObject object{.prompt = random_() % 40,
                            .blocks = 3,
                            .pages = pages,
                            .namespace_number = static_cast<std::uint8_t>(1 + random_() % 2),
                            .version = pages};
    const auto kind = random_() % 100;
    if (kind < 60) {
      const auto operation = oracle_.begin_write(object);
      tier.write(object.object(), told(operation));
    } else if (kind < 75) {
      const auto operation = oracle_.begin_erase(object);
      tier.erase({object.key()}, told(operation));
    } else if (kind < 76) {
      const auto operation = oracle_.begin_erase_namespace(object.namespace_number);
      tier.erase_all(object.namespace_id(), told(operation));
    } else if (kind < 90) {
      const TierHit hit = testing::find(tier, object.query());
      if (hit.bytes > 0) (void)testing::read(tier, hit);
    } else if (kind < 95) {
      (void)tier.drain(kPatienceNs);
    }
  }

  NvmeOracle& oracle_;
  std::mt19937_64 random_;
};

RC_GTEST_PROP(NvmeModel, HoldsWhatItAcknowledgedThroughRestarts, ()) {
  const TempFolder folder;
  const NvmeConfig config = model_log(folder);
  const auto disk = std::make_shared<Disk>(config.files[0].bytes);
  NvmeOracle oracle(NvmeOracle::kept_bytes(config, kMostPages * kTierAlignment));
  Driver driver(oracle, *rc::gen::arbitrary<std::uint64_t>());
  const auto lives = *rc::gen::inRange<std::size_t>(1, 5);
  for (std::size_t life = 0; life < lives; ++life) {
    auto tier = open_tier(config, on(disk));
    driver.run(*tier, *rc::gen::inRange<std::size_t>(0, 150));
    RC_ASSERT(tier->drain(kPatienceNs).is_ok());
    require(oracle.agrees_with(*tier));
    if (driver.random()() % 2 == 0) driver.run(*tier, 10);  // and away in the middle of it
  }
  require(oracle.agrees_with(*open_tier(config, on(disk))));
}

RC_GTEST_PROP(NvmeModel, LossOfPowerLosesNothingThatWasAcknowledged, ()) {
  const TempFolder folder;
  const NvmeConfig config = model_log(folder);
  const auto disk = std::make_shared<Disk>(config.files[0].bytes);
  NvmeOracle oracle(NvmeOracle::kept_bytes(config, kMostPages * kTierAlignment));
  Driver driver(oracle, *rc::gen::arbitrary<std::uint64_t>());
  const auto lives = *rc::gen::inRange<std::size_t>(1, 6);
  for (std::size_t life = 0; life < lives; ++life) {
    disk->lose_power_after(*rc::gen::inRange<std::size_t>(0, 200));
    open_tier(config, on(disk))->recovery(kPatienceNs);
    auto tier = std::make_unique<NvmeTier>(config, Clock::system(), nullptr, on(disk));
    driver.run(*tier, *rc::gen::inRange<std::size_t>(0, 150));
    tier = nullptr;
    disk->power_on(driver.random());
    require(oracle.agrees_with(*open_tier(config, on(disk))));
  }
}

// Bytes anywhere in the log change, or its end is gone: what is served is right but for the bytes that were hit.
RC_GTEST_PROP(NvmeModel, ServesNothingElseAfterDamage, ()) {
  const TempFolder folder;
  const NvmeConfig config = model_log(folder);
  const auto disk = std::make_shared<Disk>(config.files[0].bytes);
  NvmeOracle oracle(std::nullopt);
  std::vector<NvmeObject> objects;
  {
    auto tier = open_tier(config, on(disk));
    for (std::uint64_t prompt = 1; prompt <= *rc::gen::inRange<std::uint64_t>(1, 100); ++prompt) {
      objects.push_back({.prompt = prompt, .pages = static_cast<std::uint32_t>(1 + prompt % kMostPages)});
      RC_ASSERT(testing::write(*tier, objects.back().object()).is_ok());
    }
  }
  const std::vector<std::byte> before = disk->bytes();
  std::mt19937_64 random(*rc::gen::arbitrary<std::uint64_t>());
  const auto hits = *rc::gen::inRange<std::size_t>(1, 60);
  for (std::size_t i = 0; i < hits; ++i) {
    // Half of them where the tables are most likely.
    const std::size_t page = random() % (disk->bytes().size() / kTierAlignment);
    const std::size_t within = random() % (random() % 2 == 0 ? 128 : kTierAlignment);
    disk->bytes()[page * kTierAlignment + within] ^= std::byte{static_cast<std::uint8_t>(1U << (random() % 8))};
  }
  if (random() % 4 == 0) {
    const std::size_t end = random() % disk->bytes().size();
    std::fill(disk->bytes().begin() + static_cast<std::ptrdiff_t>(end), disk->bytes().end(), std::byte{0});
  }
  auto tier = open_tier(config, on(disk));
  for (const auto& object : objects) {
    const TierHit hit = testing::find(*tier, object.query());
    if (hit.bytes == 0) continue;
    RC_ASSERT(hit.key == object.key());
    RC_ASSERT(hit.bytes == object.bytes());
    const auto bytes = testing::read(*tier, hit);
    if (!bytes) continue;
    const auto content = object.content();
    for (std::size_t page = 0; page < object.pages; ++page) {
      const auto at = std::span(*bytes).subspan(page * kTierAlignment, kTierAlignment);
      if (std::ranges::equal(at, std::span(content).subspan(page * kTierAlignment, kTierAlignment))) continue;
      // Then this page was hit: its bytes, before the damage, were the right ones.
      const auto right = std::span(content).subspan(page * kTierAlignment, kTierAlignment);
      bool found = false;
      for (std::size_t i = 0; !found && i < before.size(); i += kTierAlignment) {
        const bool was = std::equal(right.begin(), right.end(), before.begin() + static_cast<std::ptrdiff_t>(i));
        found = was && std::equal(at.begin(), at.end(), disk->bytes().begin() + static_cast<std::ptrdiff_t>(i));
      }
      RC_ASSERT(found);
    }
  }
  // And it takes new objects.
  const NvmeObject fresh{.prompt = 1000};
  RC_ASSERT(testing::write(*tier, fresh.object()).is_ok());
  require(testing::holds(*tier, fresh));
}

}  // namespace
}  // namespace kvern
