#include "store/prefix_flush.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

#include "kernels/container.h"

namespace kvern {
namespace {

// Holds the block hashes of 450 blocks, far more than a chunk has.
constexpr std::size_t kStartBytes = 4 * kTierAlignment;
// Of one tier: hides the round trip to a remote one.
constexpr std::size_t kReadsAtOnce = 16;

}  // namespace

struct PrefixFlush::Buffer {
  explicit Buffer(std::size_t size)
      : bytes(static_cast<std::byte*>(::operator new (size, std::align_val_t{kTierAlignment}))), size_bytes(size) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete (bytes, std::align_val_t{kTierAlignment}); }
  std::span<std::byte> span() const { return {bytes, size_bytes}; }
  std::byte* const bytes;
  const std::size_t size_bytes;
};

PrefixFlush::PrefixFlush(ChunkStore& dram, const std::vector<Tier*>& tiers, WithTiers with_tiers,
                         const NamespaceSet& namespaces, const BlockHash& block, FlushDone done)
    : dram_(dram),
      with_tiers_(std::move(with_tiers)),
      namespaces_(namespaces),
      block_(block),
      done_(std::move(done)),
      left_(tiers.size()) {
  for (Tier* const tier : tiers) holdings_.push_back({.tier = tier, .name = tier->name()});
}

void PrefixFlush::start() {
  if (holdings_.empty()) return erase();
  for (Holding& holding : holdings_) {
    const auto page = [self = shared_from_this(), &holding](std::vector<TierHit> objects) {
      std::lock_guard lock(self->mutex_);
      holding.objects.insert(holding.objects.end(), objects.begin(), objects.end());
    };
    const auto listed = [self = shared_from_this(), &holding](const Status& status) {
      if (!status) {
        std::lock_guard lock(self->mutex_);
        self->trouble(holding, status);
        holding.objects.clear();
      }
      self->read_on(holding);
    };
    if (!with_tiers_([&] { holding.tier->list(namespaces_, page, listed); })) {
      listed({Code::kUnavailable, "the store is stopping"});
    }
  }
}

// Reads that end at once, or on another thread, find one thread here that goes on.
void PrefixFlush::read_on(Holding& holding) {
  std::unique_lock lock(mutex_);
  if (std::exchange(holding.reading, true)) return;
  while (holding.under_way < kReadsAtOnce && holding.next < holding.objects.size()) {
    const TierHit object = holding.objects[holding.next++];
    ++holding.under_way;
    lock.unlock();
    read(holding, object);
    lock.lock();
  }
  holding.reading = false;
  if (holding.under_way > 0 || std::exchange(holding.ended, true)) return;
  if (--left_ > 0) return;
  lock.unlock();
  erase();
}

void PrefixFlush::read(Holding& holding, const TierHit& object) {
  const auto buffer = std::make_shared<const Buffer>(std::min<std::uint64_t>(object.bytes, kStartBytes));
  const auto ended = [self = shared_from_this(), &holding, object, buffer](const Status& status) {
    self->take(holding, object, buffer->span(), status);
    self->read_on(holding);
  };
  if (!with_tiers_([&] { holding.tier->read(object, 0, buffer->span(), {}, ended); })) {
    take(holding, object, {}, {Code::kUnavailable, "the store is stopping"});
  }
}

void PrefixFlush::take(Holding& holding, const TierHit& object, std::span<const std::byte> start,
                       const Status& status) {
  const auto info = status ? peek_container_info(start) : std::nullopt;
  std::lock_guard lock(mutex_);
  --holding.under_way;
  if (info && info->key == object.key) {
    holding.chunks.push_back(ChunkAncestry::of(*info, block_));
  } else if (status || status.code() == Code::kCorrupt) {
    holding.unreadable.push_back(object.key);
  } else if (status.code() != Code::kNotFound) {
    trouble(holding, status);
  }
}

void PrefixFlush::trouble(const Holding& holding, const Status& status) {
  if (lower_) lower_ = Status(status.code(), holding.name + ": " + status.message());
}

void PrefixFlush::erase() {
  std::unique_lock lock(mutex_);
  std::vector<ChunkAncestry> chunks = dram_.ancestries(namespaces_, block_);
  for (const Holding& holding : holdings_) chunks.insert(chunks.end(), holding.chunks.begin(), holding.chunks.end());
  const std::vector<bool> goes = continue_prefix(chunks, block_);
  std::size_t at = chunks.size();
  std::vector<std::vector<ChunkKey>> keys(holdings_.size());
  for (std::size_t number = holdings_.size(); number-- > 0;) {
    Holding& holding = holdings_[number];
    at -= holding.chunks.size();
    for (std::size_t i = 0; i < holding.chunks.size(); ++i) {
      if (goes[at + i]) keys[number].push_back(holding.chunks[i].key);
    }
    keys[number].insert(keys[number].end(), holding.unreadable.begin(), holding.unreadable.end());
  }
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    if (goes[i]) gone_.push_back(chunks[i].key);
  }
  if (gone_.empty() && lower_) {
    lower_ = Status(Code::kNotFound, "no tier has block " + block_.to_hex() + " or what follows it");
  }
  left_ = holdings_.size() + 1;
  lock.unlock();
  const FlushedChunks flushed = dram_.flush(gone_);
  lock.lock();
  flushed_ = flushed;
  lock.unlock();
  const auto ended = [self = shared_from_this()](const Holding* holding, const Status& status) {
    std::unique_lock held(self->mutex_);
    if (holding != nullptr && !status) self->trouble(*holding, status);
    if (--self->left_ > 0) return;
    held.unlock();
    self->finish();
  };
  for (std::size_t number = 0; number < keys.size(); ++number) {
    const Holding* const holding = &holdings_[number];
    if (keys[number].empty()) {
      ended(holding, Status::ok());
      continue;
    }
    const auto erased = [ended, holding](const Status& status) { ended(holding, status); };
    if (!with_tiers_([&] { holding->tier->erase(std::move(keys[number]), erased); })) {
      ended(holding, {Code::kUnavailable, "the store is stopping"});
    }
  }
  ended(nullptr, Status::ok());
}

void PrefixFlush::finish() {
  flushed_ += dram_.flush(gone_);  // what was being published when it began
  done_(flushed_, lower_);
}

}  // namespace kvern
