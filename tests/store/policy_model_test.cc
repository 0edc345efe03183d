// Policies against naive models of themselves.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "store/chunk_tree.h"
#include "store/eviction_policy.h"
#include "store/frequency_sketch.h"

namespace kvern {
namespace {

using Numbers = std::vector<std::uint32_t>;
constexpr std::uint32_t kChunks = 24;

void drop(Numbers& from, std::uint32_t chunk) { std::erase(from, chunk); }
bool has(const Numbers& in, std::uint32_t chunk) { return std::ranges::find(in, chunk) != in.end(); }

/// What all naive policies have in common: who follows whom, by plain maps.
class Naive {
 public:
  virtual ~Naive() = default;
  void inserted(std::uint32_t chunk) {
    if (has(known, chunk)) return;
    known.push_back(chunk);
    do_insert(chunk);
  }
  void follows(std::uint32_t chunk, std::uint32_t parent) {
    if (!has(known, chunk) || !has(known, parent)) return;
    if (parent_of.contains(chunk) && parent_of[chunk] == parent) return;
    for (std::optional<std::uint32_t> each = parent; each; each = above(*each)) {
      if (*each == chunk) return;
    }
    leave_parent(chunk);
    parent_of[chunk] = parent;
    children_of[parent].insert(children_of[parent].begin(), chunk);
  }
  void touched(std::uint32_t chunk) {
    if (has(known, chunk)) do_touch(chunk);
  }
  void skipped(std::uint32_t chunk) {
    if (!has(known, chunk)) return;
    for (std::optional<std::uint32_t> each = chunk; each; each = above(*each)) do_skip(*each);
  }
  void erased(std::uint32_t chunk) {
    if (!has(known, chunk)) return;
    do_erase(chunk);
    leave_parent(chunk);
    for (const auto child : children_of[chunk]) parent_of.erase(child);
    children_of.erase(chunk);
    drop(known, chunk);
    drop(withheld, chunk);
  }
  /// With all that it is reached through.
  void withhold(std::uint32_t chunk) {
    if (!has(known, chunk)) return;
    for (std::optional<std::uint32_t> each = chunk; each; each = above(*each)) {
      if (has(withheld, *each)) continue;
      withheld.push_back(*each);
      do_withhold(*each);
    }
  }
  /// With all that follows it.
  void offer(std::uint32_t chunk) {
    if (!has(withheld, chunk)) return;
    for (const auto child : children_of[chunk]) offer(child);
    drop(withheld, chunk);
    do_offer(chunk);
  }
  bool may_follow(std::uint32_t chunk, std::uint32_t parent) const {
    return !has(withheld, chunk) || has(withheld, parent);
  }
  Numbers victims(std::size_t count) {
    Numbers named;
    const std::function<void(std::uint32_t)> name = [&](std::uint32_t chunk) {
      for (const auto child : children_of[chunk]) name(child);
      if (!has(named, chunk)) named.push_back(chunk);
    };
    for (const auto chunk : order()) name(chunk);
    named.resize(std::min(named.size(), count));
    return named;
  }

 protected:
  virtual void do_insert(std::uint32_t chunk) = 0;
  virtual void do_touch(std::uint32_t chunk) = 0;
  virtual void do_skip(std::uint32_t chunk) { do_touch(chunk); }
  virtual void do_withhold(std::uint32_t chunk) = 0;
  virtual void do_offer(std::uint32_t chunk) = 0;
  virtual void do_erase(std::uint32_t chunk) = 0;
  virtual Numbers order() = 0;

  Numbers known;
  Numbers withheld;

 private:
  std::optional<std::uint32_t> above(std::uint32_t chunk) {
    return parent_of.contains(chunk) ? std::optional(parent_of[chunk]) : std::nullopt;
  }
  void leave_parent(std::uint32_t chunk) {
    if (!parent_of.contains(chunk)) return;
    drop(children_of[parent_of[chunk]], chunk);
    parent_of.erase(chunk);
  }

  std::map<std::uint32_t, std::uint32_t> parent_of;
  std::map<std::uint32_t, Numbers> children_of;
};

std::uint64_t fingerprint_of(std::uint32_t chunk) { return (chunk + 1) * 0x9E3779B97F4A7C15ULL; }

class NaiveLru final : public Naive {
  void do_insert(std::uint32_t chunk) override { list.push_back(chunk); }
  void do_touch(std::uint32_t chunk) override {
    drop(list, chunk);
    if (!has(withheld, chunk)) list.push_back(chunk);
  }
  void do_erase(std::uint32_t chunk) override { drop(list, chunk); }
  void do_withhold(std::uint32_t chunk) override { drop(list, chunk); }
  void do_offer(std::uint32_t chunk) override { list.push_back(chunk); }
  Numbers order() override { return list; }
  Numbers list;
};

class NaiveS3Fifo final : public Naive {
  void do_insert(std::uint32_t chunk) override {
    const std::size_t remembered = std::max<std::size_t>(large.size(), 1);
    const auto first =
        ghosts.size() > remembered ? ghosts.end() - static_cast<std::ptrdiff_t>(remembered) - 1 : ghosts.begin();
    uses[chunk] = 0;
    (std::find(first, ghosts.end(), chunk) != ghosts.end() ? large : small).push_back(chunk);
    while (small.size() * 10 > known.size() && known.size() >= 10) {
      const auto leaving_small = small.front();
      small.erase(small.begin());
      if (uses[leaving_small] >= 2) {
        uses[leaving_small] = 0;
        large.push_back(leaving_small);
      } else {
        leaving.push_back(leaving_small);
      }
    }
    if (!large.empty() && uses[large.front()] > 0) {
      --uses[large.front()];
      std::ranges::rotate(large, large.begin() + 1);
    }
  }
  void do_touch(std::uint32_t chunk) override { uses[chunk] = std::min(uses[chunk] + 1, 3); }
  void do_skip(std::uint32_t chunk) override {
    for (Numbers* queue : {&small, &large, &leaving}) drop(*queue, chunk);
    if (!has(withheld, chunk)) large.push_back(chunk);
    do_touch(chunk);
  }
  void do_withhold(std::uint32_t chunk) override {
    for (Numbers* queue : {&small, &large, &leaving}) drop(*queue, chunk);
  }
  void do_offer(std::uint32_t chunk) override { large.push_back(chunk); }
  void do_erase(std::uint32_t chunk) override {
    if (!has(large, chunk)) ghosts.push_back(chunk);
    for (Numbers* queue : {&small, &large, &leaving}) drop(*queue, chunk);
  }
  Numbers order() override {
    Numbers all;
    for (int used = 0; used <= 3; ++used) {
      for (const Numbers* queue : {&leaving, &large, &small}) {
        for (const auto chunk : *queue) {
          if (uses[chunk] == used) all.push_back(chunk);
        }
      }
    }
    return all;
  }
  Numbers small, large, leaving, ghosts;
  std::map<std::uint32_t, int> uses;
};

class NaiveTinyLfu final : public Naive {
  void do_insert(std::uint32_t chunk) override {
    sketch.grow(10 * known.size());
    sketch.add(fingerprint_of(chunk));
    window.push_back(chunk);
    while (window.size() > 1 + known.size() / 100) {
      const auto comes = window.front();
      window.erase(window.begin());
      const bool wins = probation.empty() ||
                        sketch.estimate(fingerprint_of(comes)) > sketch.estimate(fingerprint_of(probation.front()));
      probation.insert(wins ? probation.end() : probation.begin(), comes);
    }
  }
  void do_touch(std::uint32_t chunk) override {
    sketch.add(fingerprint_of(chunk));
    if (has(withheld, chunk)) return;
    const bool in_window = has(window, chunk);
    do_erase(chunk);
    (in_window ? window : shielded).push_back(chunk);
    while (shielded.size() * 5 > (known.size() - window.size()) * 4) {
      probation.push_back(shielded.front());
      shielded.erase(shielded.begin());
    }
  }
  void do_skip(std::uint32_t chunk) override {
    do_erase(chunk);
    if (!has(withheld, chunk)) shielded.push_back(chunk);
  }
  void do_withhold(std::uint32_t chunk) override { do_erase(chunk); }
  void do_offer(std::uint32_t chunk) override { probation.push_back(chunk); }
  void do_erase(std::uint32_t chunk) override {
    for (Numbers* segment : {&window, &probation, &shielded}) drop(*segment, chunk);
  }
  Numbers order() override {
    Numbers all = probation;
    all.insert(all.end(), shielded.begin(), shielded.end());
    all.insert(all.end(), window.begin(), window.end());
    return all;
  }
  Numbers window, probation, shielded;
  FrequencySketch sketch{15};
};

using Operations = std::vector<std::tuple<std::uint8_t, std::uint8_t, std::uint8_t>>;

/// As the caller of EvictionPolicy::withhold() sees to it: with all that the chunk is reached through.
void withhold(EvictionPolicy& policy, std::uint32_t chunk) {
  if (!policy.tree().contains(chunk)) return;
  for (; chunk != kNoChunk; chunk = policy.tree().parent(chunk)) policy.withhold(chunk, true);
}
/// And with all that follows it, those first.
void offer(EvictionPolicy& policy, std::uint32_t chunk) {
  if (!policy.tree().contains(chunk) || !policy.tree().is_withheld(chunk)) return;
  const ChunkTree& tree = policy.tree();
  for (auto child = tree.first_child(chunk); child != kNoChunk; child = tree.next_sibling(child)) offer(policy, child);
  policy.withhold(chunk, false);
}

void expect_same(EvictionPolicy& policy, Naive& model, const Operations& operations) {
  for (const auto& [action, first, second] : operations) {
    const std::uint32_t chunk = first % kChunks;
    switch (action % 10) {
      case 8:
        withhold(policy, chunk);
        model.withhold(chunk);
        break;
      case 9:
        offer(policy, chunk);
        model.offer(chunk);
        break;
      case 0:
      case 1:
      case 2:
        policy.inserted(chunk, {.bytes = 1, .fingerprint = fingerprint_of(chunk)});
        model.inserted(chunk);
        break;
      case 3:
        policy.erased(chunk);
        model.erased(chunk);
        break;
      case 4:
      case 5:
        if (!model.may_follow(chunk, second % kChunks)) break;
        policy.follows(chunk, second % kChunks);
        model.follows(chunk, second % kChunks);
        break;
      case 6:
        policy.skipped(chunk);
        model.skipped(chunk);
        break;
      default:
        policy.touched(chunk);
        model.touched(chunk);
    }
    RC_ASSERT(policy.victims(second) == model.victims(second));
  }
}

RC_GTEST_PROP(LruPolicy, AgreesWithANaiveOne, (const Operations& operations)) {
  NaiveLru model;
  expect_same(*make_lru_policy(), model, operations);
}
RC_GTEST_PROP(S3FifoPolicy, AgreesWithANaiveOne, (const Operations& operations)) {
  NaiveS3Fifo model;
  expect_same(*make_s3fifo_policy(), model, operations);
}
RC_GTEST_PROP(TinyLfuPolicy, AgreesWithANaiveOne, (const Operations& operations)) {
  NaiveTinyLfu model;
  expect_same(*make_tinylfu_policy(), model, operations);
}

class EveryPolicy : public testing::TestWithParam<std::string_view> {};
INSTANTIATE_TEST_SUITE_P(Names, EveryPolicy,
                         testing::ValuesIn(eviction_policy_names().begin(), eviction_policy_names().end()),
                         [](const auto& each) { return std::string(each.param); });

TEST_P(EveryPolicy, KeepsParentsLongerThanWhatFollowsThem) {
  EXPECT_TRUE(rc::check([this](const Operations& operations) {
    const auto policy = *make_eviction_policy(GetParam());
    Numbers known;
    std::map<std::uint32_t, std::uint32_t> parent_of;
    for (const auto& [action, first, second] : operations) {
      const std::uint32_t chunk = first % kChunks;
      const std::uint32_t other = second % kChunks;
      const ChunkTree& tree = policy->tree();
      switch (action % 10) {
        case 8:
          withhold(*policy, chunk);
          break;
        case 9:
          offer(*policy, chunk);
          break;
        case 0:
        case 1:
        case 2:
          policy->inserted(chunk, {.bytes = 1, .fingerprint = fingerprint_of(chunk)});
          if (!has(known, chunk)) known.push_back(chunk);
          break;
        case 3:
          policy->erased(chunk);
          drop(known, chunk);
          std::erase_if(parent_of, [&](const auto& link) { return link.first == chunk || link.second == chunk; });
          break;
        case 4:
        case 5:
          if (other < chunk && has(known, chunk) && has(known, other) &&
              (!tree.is_withheld(chunk) || tree.is_withheld(other))) {
            policy->follows(chunk, other);
            parent_of[chunk] = other;
          }
          break;
        case 6:
          policy->skipped(chunk);
          break;
        default:
          policy->touched(chunk);
      }
      const Numbers victims = policy->victims(1000);
      RC_ASSERT(policy->victims(1000) == victims);
      RC_ASSERT(policy->victims(other) ==
                Numbers(victims.begin(),
                        victims.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(other, victims.size()))));
      Numbers sorted = victims;
      std::ranges::sort(sorted);
      std::ranges::sort(known);
      Numbers free = known;
      std::erase_if(free, [&](std::uint32_t each) { return tree.is_withheld(each); });
      RC_ASSERT(sorted == free);
      for (const auto& [child, parent] : parent_of) {
        if (tree.is_withheld(parent)) continue;
        RC_ASSERT(std::ranges::find(victims, child) < std::ranges::find(victims, parent));
      }
      for (std::uint32_t each = 0; each < kChunks; ++each)
        RC_ASSERT((policy->expected_use(each) > 0) <= has(known, each));
    }
  }));
}

TEST_P(EveryPolicy, NamesAnotherOneAfterASkip) {
  const auto policy = *make_eviction_policy(GetParam());
  for (std::uint32_t chunk = 0; chunk < 40; ++chunk) {
    policy->inserted(chunk, {.bytes = 1, .fingerprint = fingerprint_of(chunk)});
    if (chunk % 4 > 0) policy->follows(chunk, chunk - 1);
  }
  Numbers first_ones;
  for (int round = 0; round < 10; ++round) {
    const auto first = policy->victims(1).front();
    EXPECT_FALSE(has(first_ones, first)) << "round " << round;
    first_ones.push_back(first);
    policy->skipped(first);
  }
}

TEST_P(EveryPolicy, RefusesThatAChunkFollowsItself) {
  const auto policy = *make_eviction_policy(GetParam());
  for (std::uint32_t chunk = 0; chunk < 3; ++chunk) policy->inserted(chunk, {.bytes = 1, .fingerprint = chunk});
  policy->follows(0, 0);
  policy->follows(1, 0);
  policy->follows(2, 1);
  policy->follows(0, 2);
  policy->follows(1, 99);
  policy->follows(99, 1);
  EXPECT_EQ(policy->victims(10), (Numbers{2, 1, 0}));
}

TEST(MakeEvictionPolicy, KnowsNames) {
  for (const auto name : eviction_policy_names()) EXPECT_EQ((*make_eviction_policy(name))->name(), name);
  const auto unknown = make_eviction_policy("mru");
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().code(), Code::kInvalid);
  EXPECT_NE(unknown.error().message().find("use one of lru, s3fifo, tinylfu, reuse"), std::string::npos);
}

}  // namespace
}  // namespace kvern
