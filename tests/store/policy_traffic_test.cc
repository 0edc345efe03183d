// Policies under traffic: what they find in patterns whose best answer is known.

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "store/eviction_policy.h"

namespace kvern {
namespace {

using Prompt = std::vector<std::uint64_t>;  // names of its chunks; a name stands for the whole prompt up to there

/// A store of so many chunks, with one policy.
class Cache {
 public:
  /// held: chunks that cannot be taken, for as long as it says so.
  Cache(std::string_view policy, std::size_t capacity, std::function<bool(std::uint64_t name)> held = nullptr)
      : policy_(*make_eviction_policy(policy)), capacity_(capacity), held_(std::move(held)), name_of_(capacity) {
    for (std::uint32_t chunk = 0; chunk < capacity; ++chunk) spare_.push_back(chunk);
  }

  /// How many leading chunks were there; all are afterwards.
  std::size_t serve(const Prompt& prompt) {
    std::size_t found = 0;
    while (found < prompt.size() && chunk_of_.contains(prompt[found])) ++found;
    for (std::size_t i = found; i-- > 0;) policy_->touched(chunk_of_[prompt[i]]);
    for (std::size_t i = found; i < prompt.size(); ++i) {
      if (!chunk_of_.contains(prompt[i])) insert(prompt[i]);
      if (i > 0 && chunk_of_.contains(prompt[i - 1])) policy_->follows(chunk_of_[prompt[i]], chunk_of_[prompt[i - 1]]);
    }
    return found;
  }

 private:
  void insert(std::uint64_t name) {
    if (spare_.empty()) {
      std::uint32_t victim = policy_->victims(1).at(0);
      for (; held_ && held_(name_of_[victim]); victim = policy_->victims(1).at(0)) policy_->skipped(victim);
      policy_->erased(victim);
      chunk_of_.erase(name_of_[victim]);
      spare_.push_back(victim);
    }
    const std::uint32_t chunk = spare_.back();
    spare_.pop_back();
    chunk_of_[name] = chunk;
    name_of_[chunk] = name;
    policy_->inserted(chunk, {.bytes = 1, .fingerprint = name});
  }

  const std::unique_ptr<EvictionPolicy> policy_;
  const std::size_t capacity_;
  const std::function<bool(std::uint64_t name)> held_;
  std::map<std::uint64_t, std::uint32_t> chunk_of_;
  std::vector<std::uint64_t> name_of_;
  std::vector<std::uint32_t> spare_;
};

using Traffic = std::function<Prompt()>;

double hit_rate(std::string_view policy, std::size_t capacity, Traffic traffic, int requests) {
  Cache cache(policy, capacity);
  std::size_t found = 0;
  std::size_t asked = 0;
  for (int i = 0; i < requests; ++i) {
    const Prompt prompt = traffic();
    found += cache.serve(prompt);
    asked += prompt.size();
  }
  return static_cast<double>(found) / static_cast<double>(asked);
}

constexpr std::uint64_t kDocumentChunks = 8;
Prompt document(std::uint64_t number) {
  Prompt prompt;
  for (std::uint64_t i = 0; i < kDocumentChunks; ++i) prompt.push_back(number * kDocumentChunks + i);
  return prompt;
}

/// Documents one after another, over and over.
Traffic loop(std::uint64_t documents) {
  return [documents, next = std::uint64_t{0}]() mutable { return document(next++ % documents); };
}

/// Documents with popularities 1 / rank^exponent; the ranks move by `shift` every 2,000 requests.
Traffic zipf(std::uint64_t documents, double exponent, std::uint64_t shift = 0) {
  std::vector<double> weights;
  for (std::uint64_t i = 1; i <= documents; ++i) weights.push_back(std::pow(static_cast<double>(i), -exponent));
  return
      [=, random = std::mt19937_64(7), pick = std::discrete_distribution<std::uint64_t>(weights.begin(), weights.end()),
       count = std::uint64_t{0}]() mutable { return document((pick(random) + count++ / 2000 * shift) % documents); };
}

/// Half of the requests ask for popular documents, half for ones that nobody asks for again.
Traffic with_scans() {
  return [popular = zipf(100, 0.8), random = std::mt19937_64(8), next = std::uint64_t{1000}]() mutable {
    return random() % 2 == 0 ? popular() : document(next++);
  };
}

/// So many conversations at once, that share one of ten system prompts and grow by two chunks a turn, twelve turns
/// long.
Traffic sessions(std::size_t at_once) {
  struct Session {
    Prompt prompt;
    int turns = 0;
  };
  return [=, random = std::mt19937_64(9), open = std::vector<Session>(at_once), next = std::uint64_t{1000}]() mutable {
    Session& session = open[random() % open.size()];
    if (session.turns == 0) {
      session.prompt = document(random() % 10);
      session.turns = 12;
    }
    --session.turns;
    session.prompt.push_back(++next);
    session.prompt.push_back(++next);
    return session.prompt;
  };
}

constexpr int kRequests = 8000;

TEST(ReusePolicy, KeepsAPartOfALoopThatDoesNotFit) {
  // Half of it fits: LRU finds nothing, the best policy finds almost half.
  EXPECT_LT(hit_rate("lru", 400, loop(100), kRequests), 0.01);
  EXPECT_GT(hit_rate("reuse", 400, loop(100), kRequests), 0.35);
}

TEST(ReusePolicy, IsNotSweptByScans) {
  EXPECT_GT(hit_rate("reuse", 400, with_scans(), kRequests), hit_rate("lru", 400, with_scans(), kRequests) + 0.1);
}

TEST(ReusePolicy, IsNeverAPointBelowLru) {
  const std::vector<std::pair<std::string, std::function<Traffic()>>> patterns = {
      {"loop", [] { return loop(100); }},
      {"zipf", [] { return zipf(2000, 0.9); }},
      {"moving zipf", [] { return zipf(1000, 1.0, 300); }},
      {"scans", [] { return with_scans(); }},
      {"few sessions", [] { return sessions(20); }},
      {"many sessions", [] { return sessions(200); }},
  };
  for (const auto& [name, make] : patterns) {
    for (const std::size_t capacity : {1024U, 2048U, 4096U}) {
      EXPECT_GE(hit_rate("reuse", capacity, make(), kRequests), hit_rate("lru", capacity, make(), kRequests) - 0.01)
          << name << ", " << capacity << " chunks";
    }
  }
}

TEST(S3FifoAndTinyLfuPolicy, AreNotSweptByScans) {
  const double lru = hit_rate("lru", 400, with_scans(), kRequests);
  EXPECT_GT(hit_rate("s3fifo", 400, with_scans(), kRequests), lru + 0.1);
  EXPECT_GT(hit_rate("tinylfu", 400, with_scans(), kRequests), lru + 0.1);
}

// A request a second, with the conversations' own pauses.
TEST(ReusePolicy, ServesADayInSeconds) {
  constexpr int kSeconds = 24 * 3600;
  constexpr std::uint32_t kCapacity = 2000;
  const auto policy = make_reuse_policy();
  std::map<std::uint64_t, std::uint32_t> chunk_of;
  std::map<std::uint32_t, std::uint64_t> name_of;
  std::map<std::uint32_t, int> children;
  std::map<std::uint32_t, std::uint32_t> parent_of;
  const Traffic traffic = sessions(300);
  std::size_t found = 0;
  for (int second = 0; second < kSeconds; ++second) {
    const Prompt prompt = traffic();
    bool is_prefix = true;
    for (std::size_t i = 0; i < prompt.size(); ++i) {
      if (const auto hit = chunk_of.find(prompt[i]); hit != chunk_of.end()) {
        policy->touched(hit->second);
        found += is_prefix ? 1 : 0;
        continue;
      }
      is_prefix = false;
      auto chunk = static_cast<std::uint32_t>(chunk_of.size());
      if (chunk == kCapacity) {
        chunk = policy->victims(1).at(0);
        ASSERT_EQ(children[chunk], 0) << "what follows it is still there, in second " << second;
        if (const auto parent = parent_of.find(chunk); parent != parent_of.end()) {
          --children[parent->second];
          parent_of.erase(parent);
        }
        policy->erased(chunk);
        chunk_of.erase(name_of[chunk]);
      }
      chunk_of[prompt[i]] = chunk;
      name_of[chunk] = prompt[i];
      policy->inserted(chunk, {.bytes = 1, .fingerprint = prompt[i]});
      if (const auto parent = i > 0 ? chunk_of.find(prompt[i - 1]) : chunk_of.end(); parent != chunk_of.end()) {
        policy->follows(chunk, parent->second);
        parent_of[chunk] = parent->second;
        ++children[parent->second];
      }
    }
  }
  EXPECT_GT(found, static_cast<std::size_t>(kSeconds) * kDocumentChunks) << "system prompts and more";
}

TEST(ReusePolicy, DecidesTheSameEveryTime) {
  EXPECT_EQ(hit_rate("reuse", 300, zipf(500, 0.9), 2000), hit_rate("reuse", 300, zipf(500, 0.9), 2000));
}

// One engine computes prompts and another one decodes them: each is read once, soon, and never again. Many chunks of
// the prompts before are being written to a slow disk meanwhile.
TEST(PolicyTraffic, WhatHasJustComeIsThereForWhoeverComesForIt) {
  for (const char* policy : {"lru", "reuse"}) {
    for (const std::size_t capacity : {32U, 256U, 4096U}) {
      std::uint64_t number = 0;
      Cache cache(policy, capacity, [&](std::uint64_t name) {
        return name * 2654435761U % 7 < 3 && name / 8 + capacity / 16 > number && name / 8 < number;
      });
      std::size_t missed = 0;
      for (; number < 2 * capacity; ++number) {
        Prompt prompt;
        for (std::uint64_t chunk = 0; chunk < 8; ++chunk) prompt.push_back(number * 8 + chunk);
        cache.serve(prompt);
        missed += prompt.size() - cache.serve(prompt);
      }
      EXPECT_EQ(missed, 0U) << policy << ", " << capacity << " chunks";
    }
  }
}

}  // namespace
}  // namespace kvern
