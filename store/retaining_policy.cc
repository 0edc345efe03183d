#include <algorithm>
#include <utility>
#include <vector>

#include "store/chunk_tree.h"
#include "store/eviction_policy.h"

namespace kvern {
namespace {

/// Names what is to be retained, and what that is reached through, after all else. Nothing is pinned: under enough
/// pressure it leaves all the same.
class RetainingPolicy final : public EvictionPolicy {
 public:
  RetainingPolicy(std::unique_ptr<EvictionPolicy> inner, const Clock& clock)
      : inner_(std::move(inner)), clock_(clock) {}

  std::string_view name() const override { return inner_->name(); }

  void inserted(std::uint32_t chunk, const ChunkTraits& traits) override {
    if (tree_.contains(chunk)) return;
    tree_.insert(chunk);
    if (chunk >= until_ns_.size()) until_ns_.resize(chunk + std::size_t{1});
    until_ns_[chunk] = traits.retain_until_ns;
    inner_->inserted(chunk, traits);
  }

  void follows(std::uint32_t chunk, std::uint32_t parent) override {
    inner_->follows(chunk, parent);
    if (!tree_.follow(chunk, parent)) return;
    const std::int64_t until_ns = until_ns_[chunk];
    for (; parent != kNoChunk && until_ns_[parent] < until_ns; parent = tree_.parent(parent)) {
      until_ns_[parent] = until_ns;
    }
  }

  void touched(std::uint32_t chunk) override { inner_->touched(chunk); }

  void erased(std::uint32_t chunk) override {
    tree_.erase(chunk);
    inner_->erased(chunk);
  }

  // What is retained has to be stepped over: the more of it is cold, the longer this takes.
  std::vector<std::uint32_t> victims(std::size_t count) override {
    const auto is_free = [this, now_ns = clock_.now_ns()](std::uint32_t chunk) { return until_ns_[chunk] <= now_ns; };
    for (std::size_t asked = count;; asked *= 2) {
      std::vector<std::uint32_t> named = inner_->victims(asked);
      const auto free = static_cast<std::size_t>(std::ranges::count_if(named, is_free));
      if (free < count && named.size() == asked && asked > 0) continue;
      std::stable_partition(named.begin(), named.end(), is_free);
      named.resize(std::min(named.size(), count));
      return named;
    }
  }

  void skipped(std::uint32_t chunk) override { inner_->skipped(chunk); }
  double expected_use(std::uint32_t chunk) const override { return inner_->expected_use(chunk); }

 private:
  const std::unique_ptr<EvictionPolicy> inner_;
  const Clock& clock_;
  ChunkTree tree_;
  std::vector<std::int64_t> until_ns_;  // by chunk: of itself and of what follows it
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_retaining_policy(std::unique_ptr<EvictionPolicy> inner, const Clock& clock) {
  return std::make_unique<RetainingPolicy>(std::move(inner), clock);
}

}  // namespace kvern
