#include <limits>

#include "store/eviction_policy.h"

namespace kvern {
namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

/// A list of chunk numbers from the least to the most recently used, linked by number: no allocation per chunk.
class LruPolicy final : public EvictionPolicy {
 public:
  std::string_view name() const override { return "lru"; }

  void inserted(std::uint32_t chunk, std::uint64_t /*bytes*/) override {
    if (chunk >= links_.size()) links_.resize(chunk + std::size_t{1});
    if (!links_[chunk].listed) append(chunk);
  }

  void touched(std::uint32_t chunk) override {
    if (!is_listed(chunk)) return;
    remove(chunk);
    append(chunk);
  }

  void erased(std::uint32_t chunk) override {
    if (is_listed(chunk)) remove(chunk);
  }

  std::vector<std::uint32_t> victims(std::size_t count) override {
    std::vector<std::uint32_t> oldest;
    for (std::uint32_t chunk = first_; chunk != kNone && oldest.size() < count; chunk = links_[chunk].next) {
      oldest.push_back(chunk);
    }
    return oldest;
  }

  /// Somebody holds the chunk, so that it is in use now.
  void skipped(std::uint32_t chunk) override { touched(chunk); }

 private:
  struct Links {
    std::uint32_t previous = kNone;
    std::uint32_t next = kNone;
    bool listed = false;
  };

  bool is_listed(std::uint32_t chunk) const { return chunk < links_.size() && links_[chunk].listed; }

  void append(std::uint32_t chunk) {
    links_[chunk] = {.previous = last_, .next = kNone, .listed = true};
    (last_ == kNone ? first_ : links_[last_].next) = chunk;
    last_ = chunk;
  }

  void remove(std::uint32_t chunk) {
    const Links links = links_[chunk];
    (links.previous == kNone ? first_ : links_[links.previous].next) = links.next;
    (links.next == kNone ? last_ : links_[links.next].previous) = links.previous;
    links_[chunk] = {};
  }

  std::vector<Links> links_;
  std::uint32_t first_ = kNone;
  std::uint32_t last_ = kNone;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru_policy() { return std::make_unique<LruPolicy>(); }

}  // namespace kvern
