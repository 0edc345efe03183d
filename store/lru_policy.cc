#include <vector>

#include "store/chunk_lists.h"
#include "store/chunk_tree.h"
#include "store/eviction_policy.h"

namespace kvern {
namespace {

class LruPolicy final : public EvictionPolicy {
 public:
  std::string_view name() const override { return "lru"; }

  void inserted(std::uint32_t chunk, const ChunkTraits& /*traits*/) override {
    if (tree_.contains(chunk)) return;
    tree_.insert(chunk);
    if (chunk >= used_at_.size()) used_at_.resize(chunk + std::size_t{1});
    use(chunk);
  }

  void follows(std::uint32_t chunk, std::uint32_t parent) override { tree_.follow(chunk, parent); }

  void touched(std::uint32_t chunk) override {
    if (tree_.contains(chunk)) use(chunk);
  }

  void erased(std::uint32_t chunk) override {
    order_.remove(chunk);
    tree_.erase(chunk);
  }

  std::vector<std::uint32_t> victims(std::size_t count) override {
    LeafFirst names(tree_, count);
    for (std::uint32_t chunk = order_.front(0); chunk != kNoChunk && names.add(chunk); chunk = order_.next(chunk)) {
    }
    return names.take();
  }

  /// Somebody holds the chunk, so that it and what it is reached through are in use now.
  void skipped(std::uint32_t chunk) override {
    for (; tree_.contains(chunk); chunk = tree_.parent(chunk)) use(chunk);
  }

  /// What comes back is in use now.
  void withhold(std::uint32_t chunk, bool withheld) override {
    if (!tree_.contains(chunk) || tree_.is_withheld(chunk) == withheld) return;
    tree_.set_withheld(chunk, withheld);
    withheld ? order_.remove(chunk) : use(chunk);
  }

  const ChunkTree& tree() const override { return tree_; }
  double expected_use(std::uint32_t chunk) const override {
    return tree_.contains(chunk) ? 1.0 / static_cast<double>(uses_ - used_at_[chunk] + 1) : 0.0;
  }

 private:
  void use(std::uint32_t chunk) {
    if (!tree_.is_withheld(chunk)) order_.push_back(0, chunk);
    used_at_[chunk] = ++uses_;
  }

  ChunkTree tree_;
  ChunkLists order_{1};  // from the least to the most recently used
  std::uint64_t uses_ = 0;
  std::vector<std::uint64_t> used_at_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru_policy() { return std::make_unique<LruPolicy>(); }

}  // namespace kvern
