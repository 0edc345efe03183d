#include <vector>

#include "store/chunk_lists.h"
#include "store/chunk_tree.h"
#include "store/eviction_policy.h"
#include "store/frequency_sketch.h"

namespace kvern {
namespace {

class TinyLfuPolicy final : public EvictionPolicy {
 public:
  std::string_view name() const override { return "tinylfu"; }

  void inserted(std::uint32_t chunk, const ChunkTraits& traits) override {
    if (tree_.contains(chunk)) return;
    tree_.insert(chunk);
    if (chunk >= fingerprints_.size()) fingerprints_.resize(chunk + std::size_t{1});
    fingerprints_[chunk] = traits.fingerprint;
    sketch_.grow(kHistory * tree_.size());
    sketch_.add(traits.fingerprint);
    segments_.push_back(kWindow, chunk);
    while (segments_.size(kWindow) > 1 + tree_.size() / kWindowShare) leave_window();
  }

  void follows(std::uint32_t chunk, std::uint32_t parent) override { tree_.follow(chunk, parent); }

  void touched(std::uint32_t chunk) override {
    if (!tree_.contains(chunk)) return;
    sketch_.add(fingerprints_[chunk]);
    if (tree_.is_withheld(chunk)) return;
    const std::uint32_t segment = segments_.list_of(chunk);
    segments_.push_back(segment == kWindow ? kWindow : kProtected, chunk);
    while (segments_.size(kProtected) * 5 > (tree_.size() - segments_.size(kWindow)) * 4) {
      segments_.push_back(kProbation, segments_.front(kProtected));
    }
  }

  void erased(std::uint32_t chunk) override {
    segments_.remove(chunk);
    tree_.erase(chunk);
  }

  std::vector<std::uint32_t> victims(std::size_t count) override {
    LeafFirst names(tree_, count);
    for (const std::uint32_t segment : {kProbation, kProtected, kWindow}) {
      for (std::uint32_t chunk = segments_.front(segment); chunk != kNoChunk; chunk = segments_.next(chunk)) {
        if (!names.add(chunk)) return names.take();
      }
    }
    return names.take();
  }

  /// Somebody holds the chunk: it and what it is reached through are protected.
  void skipped(std::uint32_t chunk) override {
    for (; tree_.contains(chunk); chunk = tree_.parent(chunk)) {
      if (!tree_.is_withheld(chunk)) segments_.push_back(kProtected, chunk);
    }
  }

  /// What comes back is on probation.
  void withhold(std::uint32_t chunk, bool withheld) override {
    if (!tree_.contains(chunk) || tree_.is_withheld(chunk) == withheld) return;
    tree_.set_withheld(chunk, withheld);
    withheld ? segments_.remove(chunk) : segments_.push_back(kProbation, chunk);
  }

  const ChunkTree& tree() const override { return tree_; }

  double expected_use(std::uint32_t chunk) const override {
    return tree_.contains(chunk) ? sketch_.estimate(fingerprints_[chunk]) + 0.5 : 0.0;
  }

 private:
  enum Segment : std::uint32_t { kWindow, kProbation, kProtected, kSegments };
  static constexpr std::size_t kWindowShare =
      100;                                     // the window holds 1 %; the protected segment four fifths of the rest
  static constexpr std::size_t kHistory = 10;  // the sketch looks back ten times what is stored

  // Who comes out of the window stays if it was used more often than who would leave next, and leaves otherwise.
  void leave_window() {
    const std::uint32_t comes = segments_.front(kWindow);
    const std::uint32_t next = segments_.front(kProbation);
    const bool wins =
        next == kNoChunk || sketch_.estimate(fingerprints_[comes]) > sketch_.estimate(fingerprints_[next]);
    wins ? segments_.push_back(kProbation, comes) : segments_.push_front(kProbation, comes);
  }

  ChunkTree tree_;
  ChunkLists segments_{kSegments};
  FrequencySketch sketch_{15};
  std::vector<std::uint64_t> fingerprints_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_tinylfu_policy() { return std::make_unique<TinyLfuPolicy>(); }

}  // namespace kvern
