#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "store/chunk_lists.h"
#include "store/chunk_tree.h"
#include "store/eviction_policy.h"
#include "store/fingerprint_mix.h"

namespace kvern {
namespace {

/// Which fingerprints left the small queue lately: one entry per home slot, overwritten by the next that falls there.
class Ghosts {
 public:
  void grow(std::size_t entries) {
    if (entries <= slots_.size()) return;
    const std::vector<Slot> before = std::exchange(slots_, std::vector<Slot>(std::bit_ceil(entries)));
    for (const Slot& each : before) {
      if (each.left_at > 0) add(each.fingerprint, each.left_at);
    }
  }
  void add(std::uint64_t fingerprint, std::uint64_t now) { slots_[slot(fingerprint)] = {fingerprint, now}; }
  bool contains(std::uint64_t fingerprint, std::uint64_t not_before) const {
    const Slot& each = slots_[slot(fingerprint)];
    return each.fingerprint == fingerprint && each.left_at >= not_before && each.left_at > 0;
  }

 private:
  struct Slot {
    std::uint64_t fingerprint = 0;
    std::uint64_t left_at = 0;
  };
  std::size_t slot(std::uint64_t fingerprint) const {
    return static_cast<std::size_t>(mix_fingerprint(fingerprint, 7)) & (slots_.size() - 1);
  }
  std::vector<Slot> slots_ = std::vector<Slot>(4096);
};

class S3FifoPolicy final : public EvictionPolicy {
 public:
  std::string_view name() const override { return "s3fifo"; }

  void inserted(std::uint32_t chunk, const ChunkTraits& traits) override {
    if (tree_.contains(chunk)) return;
    tree_.insert(chunk);
    if (chunk >= chunks_.size()) chunks_.resize(chunk + std::size_t{1});
    chunks_[chunk] = {.fingerprint = traits.fingerprint};
    ghosts_.grow(2 * tree_.size());
    // Ghosts are as many as the large queue holds chunks.
    const std::uint64_t ghosts = std::max<std::size_t>(queues_.size(kMain), 1);
    const bool came_back = ghosts_.contains(traits.fingerprint, left_ > ghosts ? left_ - ghosts : 1);
    queues_.push_back(came_back ? kMain : kSmall, chunk);
    while (queues_.size(kSmall) * kSmallShare > tree_.size() && tree_.size() >= kSmallShare) leave_small();
    turn_main();
  }

  void follows(std::uint32_t chunk, std::uint32_t parent) override { tree_.follow(chunk, parent); }

  void touched(std::uint32_t chunk) override {
    if (tree_.contains(chunk)) chunks_[chunk].uses = std::min<std::uint8_t>(chunks_[chunk].uses + 1U, kUsesMost);
  }

  void erased(std::uint32_t chunk) override {
    if (!tree_.contains(chunk)) return;
    if (queues_.list_of(chunk) != kMain) ghosts_.add(chunks_[chunk].fingerprint, ++left_);
    queues_.remove(chunk);
    tree_.erase(chunk);
  }

  std::vector<std::uint32_t> victims(std::size_t count) override {
    LeafFirst names(tree_, count);
    for (std::uint8_t uses = 0; uses <= kUsesMost; ++uses) {
      for (const std::uint32_t queue : {kLeaving, kMain, kSmall}) {
        for (std::uint32_t chunk = queues_.front(queue); chunk != kNoChunk; chunk = queues_.next(chunk)) {
          if (chunks_[chunk].uses == uses && !names.add(chunk)) return names.take();
        }
      }
    }
    return names.take();
  }

  /// Somebody holds the chunk: it and what it is reached through go round once more.
  void skipped(std::uint32_t chunk) override {
    for (; tree_.contains(chunk); chunk = tree_.parent(chunk)) {
      if (!tree_.is_withheld(chunk)) queues_.push_back(kMain, chunk);
      touched(chunk);
    }
  }

  /// What comes back goes to the large queue.
  void withhold(std::uint32_t chunk, bool withheld) override {
    if (!tree_.contains(chunk) || tree_.is_withheld(chunk) == withheld) return;
    tree_.set_withheld(chunk, withheld);
    withheld ? queues_.remove(chunk) : queues_.push_back(kMain, chunk);
  }

  const ChunkTree& tree() const override { return tree_; }

  double expected_use(std::uint32_t chunk) const override {
    if (!tree_.contains(chunk)) return 0;
    return chunks_[chunk].uses + (queues_.list_of(chunk) == kMain ? 1.5 : 0.5);
  }

 private:
  struct Chunk {
    std::uint64_t fingerprint = 0;
    std::uint8_t uses = 0;
  };
  // The queues of the paper, and what has left the small one and waits for its eviction.
  enum Queue : std::uint32_t { kLeaving, kSmall, kMain, kQueues };
  static constexpr std::size_t kSmallShare = 10;  // the small queue holds a tenth
  static constexpr std::uint8_t kUsesMost = 3;
  static constexpr std::uint8_t kUsesToStay = 2;

  void leave_small() {
    const std::uint32_t chunk = queues_.front(kSmall);
    const bool stays = chunks_[chunk].uses >= kUsesToStay;
    if (stays) chunks_[chunk].uses = 0;
    queues_.push_back(stays ? kMain : kLeaving, chunk);
  }

  // The hand of the clock: a used one at the front goes round once more. It moves with what comes, as that is what
  // something has to leave for.
  void turn_main() {
    const std::uint32_t chunk = queues_.front(kMain);
    if (chunk == kNoChunk || chunks_[chunk].uses == 0) return;
    --chunks_[chunk].uses;
    queues_.push_back(kMain, chunk);
  }

  ChunkTree tree_;
  ChunkLists queues_{kQueues};
  Ghosts ghosts_;
  std::uint64_t left_ = 0;  // how many left the small queue and then the store
  std::vector<Chunk> chunks_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_s3fifo_policy() { return std::make_unique<S3FifoPolicy>(); }

}  // namespace kvern
