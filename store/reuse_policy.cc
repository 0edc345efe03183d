#include <algorithm>
#include <deque>
#include <queue>
#include <unordered_map>
#include <vector>

#include "store/chunk_lists.h"
#include "store/chunk_tree.h"
#include "store/eviction_policy.h"
#include "store/reuse_model.h"

namespace kvern {
namespace {

/// Names those that are worth least to keep, by the model. Chunks that nothing follows stand in lists by class and age
/// step, so that only the fronts of the lists are compared; the others enter once they are ends of their prompts.
class ReusePolicy final : public EvictionPolicy {
 public:
  std::string_view name() const override { return "reuse"; }

  void inserted(std::uint32_t chunk, const ChunkTraits& traits) override {
    if (tree_.contains(chunk)) return;
    tree_.insert(chunk);
    if (chunk >= chunks_.size()) chunks_.resize(chunk + std::size_t{1});
    chunks_[chunk] = {.fingerprint = traits.fingerprint};
    model_.set_stored(tree_.size());
    if (const std::uint32_t before = lists_.front(kNewest); before != kNoChunk) list(before);
    use(chunk);
    lists_.push_back(kNewest, chunk);
  }

  void follows(std::uint32_t chunk, std::uint32_t parent) override {
    if (!tree_.contains(chunk)) return;
    const std::uint32_t before = tree_.parent(chunk);
    if (before == parent || !tree_.follow(chunk, parent)) return;
    if (before != kNoChunk) list(before);
    if (chunks_[chunk].is_unreachable) {
      chunks_[chunk].is_unreachable = false;
      list(chunk);
    }
    list(parent);
  }

  void touched(std::uint32_t chunk) override {
    if (!tree_.contains(chunk)) return;
    // A look-up, the reads that follow and those of other ranks are one use.
    const bool is_same_use = model_.now() - chunks_[chunk].used_at < kOneUse;
    if (!is_same_use) use(chunk);
  }

  void erased(std::uint32_t chunk) override {
    if (!tree_.contains(chunk)) return;
    const std::uint32_t parent = tree_.parent(chunk);
    for (std::uint32_t child = tree_.first_child(chunk); child != kNoChunk; child = tree_.next_sibling(child)) {
      chunks_[child].is_unreachable = true;
      list(child);
    }
    lists_.remove(chunk);
    tree_.erase(chunk);
    if (parent != kNoChunk) list(parent);
  }

  std::vector<std::uint32_t> victims(std::size_t count) override;

  /// Somebody holds the chunk. It is named after all others for a while.
  void skipped(std::uint32_t chunk) override {
    if (!lists_.contains(chunk)) return;
    lists_.push_back(kHeld, chunk);
    if (held_until_ <= model_.now()) held_until_ = model_.now() + kHeldUses;
  }

  /// What comes back takes the place that its last use gives it.
  void withhold(std::uint32_t chunk, bool withheld) override {
    if (!tree_.contains(chunk) || tree_.is_withheld(chunk) == withheld) return;
    tree_.set_withheld(chunk, withheld);
    list(chunk);
  }

  const ChunkTree& tree() const override { return tree_; }
  double expected_use(std::uint32_t chunk) const override {
    if (!tree_.contains(chunk) || chunks_[chunk].is_unreachable) return 0;
    const Chunk& each = chunks_[chunk];
    return model_.worth(each.chunk_class, ReuseModel::age_step(model_.now() - each.used_at));
  }

 private:
  struct Chunk {
    std::uint64_t fingerprint = 0;
    std::uint64_t used_at : ReuseModel::kTimeBits = 0;
    std::uint64_t chunk_class : 2 = 0;
    bool is_unreachable : 1 = false;  ///< its parent left
  };
  static_assert(sizeof(Chunk) == 16 && ReuseModel::kClasses <= 4);
  static constexpr std::uint64_t kOneUse = 16;
  // How long chunks that were held are not asked about again, in uses.
  static constexpr std::uint64_t kHeldUses = 64;
  static constexpr int kSearchSteps = 32;
  static constexpr std::uint32_t kUnreachable = ReuseModel::kClasses * ReuseModel::kAges;
  // The chunk that came last: it is about to be continued, and what continues it must not take its place.
  static constexpr std::uint32_t kNewest = kUnreachable + 1;
  static constexpr std::uint32_t kHeld = kNewest + 1;
  static constexpr std::uint32_t kLists = kHeld + 1;

  std::uint32_t list_for(std::uint32_t chunk) const {
    const Chunk& each = chunks_[chunk];
    if (each.is_unreachable) return kUnreachable;
    const std::size_t step = ReuseModel::age_step(model_.now() - each.used_at);
    return static_cast<std::uint32_t>(each.chunk_class * ReuseModel::kAges + step);
  }

  void use(std::uint32_t chunk) {
    Chunk& used = chunks_[chunk];
    used.chunk_class = model_.use(used.fingerprint) & 3U;
    used.used_at = model_.now() & ReuseModel::kTimeMask;
    lists_.remove(chunk);
    list(chunk);
  }

  // Where it belongs now: nowhere while others follow it, or while it is withheld.
  void list(std::uint32_t chunk) {
    if (tree_.children(chunk) > 0 || tree_.is_withheld(chunk)) {
      lists_.remove(chunk);
    } else {
      list_by_age(list_for(chunk), chunk);
    }
  }

  // Lists are in the order of use. What was used now goes to the end; what becomes the end of a prompt was mostly used
  // with what followed it, and goes near the front. Where neither is true the place is not looked for any further.
  void list_by_age(std::uint32_t list, std::uint32_t chunk) {
    const auto is_older = [this, used_at = chunks_[chunk].used_at](std::uint32_t other) {
      return chunks_[other].used_at < used_at;
    };
    lists_.remove(chunk);
    std::uint32_t from_front = lists_.front(list);
    std::uint32_t from_back = lists_.back(list);
    for (int steps = 0; steps < kSearchSteps; ++steps) {
      if (from_back == kNoChunk) break;
      if (is_older(from_back)) {
        const std::uint32_t after = lists_.next(from_back);
        return after == kNoChunk ? lists_.push_back(list, chunk) : lists_.insert_before(after, chunk);
      }
      if (!is_older(from_front)) return lists_.insert_before(from_front, chunk);
      from_front = lists_.next(from_front);
      from_back = lists_.previous(from_back);
    }
    lists_.push_back(list, chunk);
  }

  void let_age();

  ReuseModel model_;
  ChunkTree tree_;
  ChunkLists lists_{kLists};
  std::vector<Chunk> chunks_;
  std::uint64_t held_until_ = 0;
};

// The front of a list is the oldest in it, nearly; who stands behind a younger one comes to the next list a little
// late.
void ReusePolicy::let_age() {
  for (std::uint32_t each = 0; each < kUnreachable; ++each) {
    for (std::uint32_t chunk = lists_.front(each); chunk != kNoChunk; chunk = lists_.front(each)) {
      const std::uint32_t wanted = list_for(chunk);
      if (wanted == each) break;
      list_by_age(wanted, chunk);
    }
  }
  if (model_.now() < held_until_) return;
  for (std::uint32_t chunk = lists_.front(kHeld); chunk != kNoChunk; chunk = lists_.front(kHeld)) list(chunk);
}

std::vector<std::uint32_t> ReusePolicy::victims(std::size_t count) {
  let_age();
  // A chunk whose followers were all named is a candidate like the fronts of the lists, and at equal worth before them.
  struct Candidate {
    double worth;
    std::uint64_t turn;
    std::uint32_t chunk;
    bool operator<(const Candidate& other) const {
      return worth != other.worth ? worth > other.worth : turn > other.turn;
    }
  };
  constexpr std::uint64_t kListTurn = 1ULL << 32U;
  std::priority_queue<Candidate> candidates;
  std::unordered_map<std::uint32_t, std::uint32_t> named_children;
  const auto worth_in = [this](std::uint32_t list) {
    if (list == kUnreachable) return 0.0;
    // What was used so lately may still be in that use, which is not counted twice: the model knows nothing of it.
    const bool in_use = list % ReuseModel::kAges == 0;
    if (list == kHeld || list == kNewest || in_use) return std::numeric_limits<double>::infinity();
    return model_.worth(list / ReuseModel::kAges, list % ReuseModel::kAges);
  };
  const auto add = [&](std::uint32_t list, std::uint32_t chunk) {
    if (chunk != kNoChunk) candidates.push({worth_in(list), kListTurn + list, chunk});
  };
  for (std::uint32_t list = 0; list < kLists; ++list) add(list, lists_.front(list));

  std::vector<std::uint32_t> named;
  named.reserve(std::min(count, tree_.size()));
  while (named.size() < count && !candidates.empty()) {
    const std::uint32_t chunk = candidates.top().chunk;
    candidates.pop();
    if (const std::uint32_t list = lists_.list_of(chunk); list != ChunkLists::kNoList) add(list, lists_.next(chunk));
    named.push_back(chunk);
    const std::uint32_t parent = tree_.parent(chunk);
    if (parent == kNoChunk || tree_.is_withheld(parent) || ++named_children[parent] < tree_.children(parent)) continue;
    candidates.push({worth_in(list_for(parent)), named.size(), parent});
  }
  return named;
}

}  // namespace

std::unique_ptr<EvictionPolicy> make_reuse_policy() { return std::make_unique<ReusePolicy>(); }

}  // namespace kvern
