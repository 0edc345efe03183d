#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "store/nvme_tier.h"

namespace kvern::testing {

constexpr std::int64_t kPatienceNs = 60'000'000'000;  ///< for things that take milliseconds on an idle machine

/// Gone, with what is in it, on destruction. On a disk rather than in tmpfs, for direct I/O.
class TempFolder {
 public:
  TempFolder() {
    std::string name = "/var/tmp/kvern-nvme-XXXXXX";
    if (::mkdtemp(name.data()) != nullptr) path_ = name;
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string file(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

/// A made-up chunk: the first blocks of a prompt, in one piece or several. Every page of its bytes names it.
struct NvmeObject {
  std::uint64_t prompt = 0;
  std::uint32_t blocks = 4;
  std::uint32_t pages = 4;
  std::uint8_t namespace_number = 1;
  std::uint32_t version = 0;  ///< another form of the same chunk

  NamespaceId namespace_id() const {
    NamespaceId id;
    id.bytes[0] = namespace_number;
    return id;
  }
  BlockHash hash(std::uint32_t block) const {
    std::vector<std::uint8_t> bytes(32, 0x5a);
    std::memcpy(bytes.data(), &prompt, sizeof prompt);
    std::memcpy(bytes.data() + sizeof prompt, &block, sizeof block);
    return BlockHash(bytes);
  }
  std::vector<BlockHash> hashes(std::uint32_t count) const {
    std::vector<BlockHash> all;
    for (std::uint32_t i = 0; i < count; ++i) all.push_back(hash(i));
    return all;
  }
  ChunkKey key() const { return {namespace_id(), 0, hash(blocks - 1)}; }
  CellQuery query(std::uint32_t count) const { return {namespace_id(), 0, hashes(count)}; }
  CellQuery query() const { return query(blocks); }
  std::uint64_t bytes() const { return std::uint64_t{pages} * kTierAlignment; }

  void fill(std::span<std::byte> out) const {
    for (std::size_t page = 0; page * kTierAlignment < out.size(); ++page) {
      const auto at = out.subspan(page * kTierAlignment, kTierAlignment);
      const std::uint64_t seed = ((prompt * 31 + namespace_number) * 31 + version) * 31 + page;
      for (std::size_t i = 0; i < at.size(); i += sizeof seed) {
        const std::uint64_t word = (seed + i) * 0x9e3779b97f4a7c15;
        std::memcpy(at.data() + i, &word, sizeof word);
      }
    }
  }
  std::vector<std::byte> content() const {
    std::vector<std::byte> out(bytes());
    fill(out);
    return out;
  }
  TierObject object(std::size_t pieces = 1) const {
    auto buffer = std::make_shared<AlignedBuffer>(bytes());
    fill(buffer->span());
    TierObject object;
    object.key = key();
    object.blocks = hashes(blocks);
    auto rest = buffer->span();
    for (std::size_t i = 0; i < pieces; ++i) {
      const std::size_t size = i + 1 == pieces ? rest.size() : kTierAlignment;
      object.pieces.push_back(rest.first(size));
      rest = rest.subspan(size);
    }
    object.hold = std::move(buffer);
    return object;
  }
};

/// What a function given to a tier was called with.
template <typename T>
class Answer {
 public:
  std::function<void(T)> function() const {
    return [promise = promise_](T value) { promise->set_value(std::move(value)); };
  }
  bool ready() const { return future_.wait_for(std::chrono::seconds(0)) == std::future_status::ready; }
  T get() { return future_.get(); }

 private:
  std::shared_ptr<std::promise<T>> promise_ = std::make_shared<std::promise<T>>();
  std::future<T> future_ = promise_->get_future();
};

inline TierHit find(Tier& tier, CellQuery query) {
  Answer<Result<std::vector<TierHit>>> answer;
  tier.find({std::move(query)}, {}, answer.function());
  const auto hits = answer.get();
  return hits ? hits->front() : TierHit{};
}

inline Status write(Tier& tier, TierObject object) {
  Answer<Status> answer;
  tier.write(std::move(object), answer.function());
  return answer.get();
}

inline Status erase(Tier& tier, const ChunkKey& key) {
  Answer<Status> answer;
  tier.erase({key}, answer.function());
  return answer.get();
}

inline Status erase_all(Tier& tier, const NamespaceSet& namespaces) {
  Answer<Status> answer;
  tier.erase_all(namespaces, answer.function());
  return answer.get();
}

inline Result<std::vector<std::byte>> read(Tier& tier, const TierHit& hit) {
  const AlignedBuffer buffer(hit.bytes);
  Answer<Status> answer;
  tier.read(hit, 0, buffer.span(), {}, answer.function());
  if (auto status = answer.get(); !status) return failure(std::move(status));
  return std::vector<std::byte>(buffer.span().begin(), buffer.span().end());
}

/// Whether the object is found and its bytes are right.
inline ::testing::AssertionResult holds(Tier& tier, const NvmeObject& object) {
  const TierHit hit = find(tier, object.query());
  if (hit.bytes == 0) return ::testing::AssertionFailure() << "prompt " << object.prompt << " is not found";
  if (!(hit.key == object.key())) return ::testing::AssertionFailure() << "another key is found";
  const auto bytes = read(tier, hit);
  if (!bytes) return ::testing::AssertionFailure() << bytes.error().to_string();
  if (*bytes != object.content()) return ::testing::AssertionFailure() << "prompt " << object.prompt << ": wrong bytes";
  return ::testing::AssertionSuccess();
}

/// A log of 8 small regions in one file.
inline NvmeConfig small_log(const std::string& path, BlockIoKind kind = BlockIoKind::kAuto) {
  NvmeConfig config;
  config.files = {{path, 8 * (std::uint64_t{256} << 10)}};
  config.region_bytes = std::uint64_t{256} << 10;
  config.batch_age_ns = 0;
  config.rewrite_share = 0;
  config.io.kind = kind;
  config.breaker.failures = 1000;  // trouble of the device is what is looked at here
  config.breaker.stall_ns = kPatienceNs;
  return config;
}

/// A tier whose recovery has ended.
inline std::unique_ptr<NvmeTier> open_tier(const NvmeConfig& config, NvmeTier::OpenIo open_io = open_block_io,
                                           const Clock& clock = Clock::system()) {
  auto tier = std::make_unique<NvmeTier>(config, clock, nullptr, open_io);
  EXPECT_TRUE(tier->recovery(kPatienceNs).has_value());
  return tier;
}

/// What a request is, for those who meddle with it.
struct BlockRequest {
  enum class Kind { kRead, kWrite, kSync };
  Kind kind = Kind::kRead;
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  bool through = false;
};

/// What becomes of it.
struct BlockFault {
  int error = 0;               ///< ends with this errno, and nothing moves
  std::size_t most_bytes = 0;  ///< moves no more than this; 0: all
  bool corrupt = false;        ///< one bit of what is read flips
  bool hold = false;           ///< its end is told when release() is called
};

/// Decides over every request; shared by the test and the medium. Thread-safe.
class BlockFaults {
 public:
  using Rule = std::function<BlockFault(const BlockRequest&)>;
  void set(Rule rule) {
    std::lock_guard lock(mutex_);
    rule_ = std::move(rule);
    holding_ = true;
  }
  BlockFault decide(const BlockRequest& request) {
    std::lock_guard lock(mutex_);
    return rule_ ? rule_(request) : BlockFault{};
  }
  void keep(std::function<void()> end) {
    {
      std::lock_guard lock(mutex_);
      if (holding_) {
        held_.push_back(std::move(end));
        changed_.notify_all();
        return;
      }
    }
    end();
  }
  void wait_held(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return held_.size() >= count; });
  }
  /// Holds no more, and ends what was held.
  void release() {
    std::vector<std::function<void()>> held;
    {
      std::lock_guard lock(mutex_);
      rule_ = nullptr;
      holding_ = false;
      held.swap(held_);
    }
    for (auto& end : held) end();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Rule rule_;
  bool holding_ = false;
  std::vector<std::function<void()>> held_;
};

class FaultyBlockIo final : public BlockIo {
 public:
  FaultyBlockIo(std::unique_ptr<BlockIo> io, std::shared_ptr<BlockFaults> faults)
      : io_(std::move(io)), faults_(std::move(faults)) {}

  void read(std::uint32_t file, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
            BlockDone done) override {
    const auto fault = faults_->decide({BlockRequest::Kind::kRead, file, offset, into.size(), false});
    if (fault.error != 0) return done(-fault.error);
    if (fault.most_bytes > 0) into = into.first(std::min(fault.most_bytes, into.size()));
    io_->read(file, offset, into, std::move(cancel),
              [faults = faults_, fault, into, done = std::move(done)](std::int64_t result) {
                if (fault.corrupt && result > 0) into[into.size() / 2] ^= std::byte{16};
                end(*faults, fault, done, result);
              });
  }
  void write(std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from, bool through,
             BlockDone done) override {
    const auto fault = faults_->decide({BlockRequest::Kind::kWrite, file, offset, from.size(), through});
    if (fault.error != 0) return done(-fault.error);
    if (fault.most_bytes > 0) from = from.first(std::min(fault.most_bytes, from.size()));
    io_->write(file, offset, from, through, [faults = faults_, fault, done = std::move(done)](std::int64_t result) {
      end(*faults, fault, done, result);
    });
  }
  void sync(std::uint32_t file, BlockDone done) override {
    const auto fault = faults_->decide({BlockRequest::Kind::kSync, file, 0, 0, true});
    if (fault.error != 0) return done(-fault.error);
    io_->sync(file, std::move(done));
  }
  std::string_view kind() const override { return io_->kind(); }

 private:
  static void end(BlockFaults& faults, const BlockFault& fault, const BlockDone& done, std::int64_t result) {
    if (!fault.hold) return done(result);
    faults.keep([done, result] { done(result); });
  }

  std::unique_ptr<BlockIo> io_;
  const std::shared_ptr<BlockFaults> faults_;
};

inline NvmeTier::OpenIo faulty(std::shared_ptr<BlockFaults> faults) {
  return [faults](const std::vector<int>& files, const BlockIoConfig& config) {
    auto opened = open_block_io(files, config);
    opened.io = std::make_unique<FaultyBlockIo>(std::move(opened.io), faults);
    return opened;
  };
}

}  // namespace kvern::testing
