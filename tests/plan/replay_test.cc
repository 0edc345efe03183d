#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <list>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "plan/replay.h"

namespace kvern::plan {
namespace {

/// Prompts that share beginnings: the blocks of a trie, asked for at random.
Trace random_trace(std::uint32_t seed, std::size_t requests) {
  std::mt19937 random(seed);
  Trace trace{.block_tokens = 512};
  std::vector<std::vector<std::uint32_t>> children(1);  // by block + 1
  for (std::size_t i = 0; i < requests; ++i) {
    TraceRequest request{.timestamp_ms = static_cast<std::int64_t>(i)};
    std::uint32_t at = 0;
    for (auto depth = 1 + random() % 6; depth > 0; --depth) {
      const std::size_t choice = random() % (children[at].size() + 1);
      if (choice == children[at].size()) {
        children[at].push_back(trace.distinct_blocks++);
        children.emplace_back();
      }
      request.blocks.push_back(children[at][choice]);
      at = children[at][choice] + 1;
    }
    request.input_tokens = static_cast<std::uint32_t>(request.blocks.size() * 512 - random() % 512);
    trace.input_tokens += request.input_tokens;
    trace.requests.push_back(std::move(request));
  }
  return trace;
}

Ladder uncompressed() { return *Ladder::make({.name = "none", .rungs = {{.codec_spec = "raw", .bytes_share = 1}}}); }

ReplayReport run(const Trace& trace, ReplayConfig config) {
  auto report = replay(trace, config);
  if (!report) throw std::runtime_error(report.error().message());
  return std::move(*report);
}

/// LRU by a list, and nothing else.
std::uint64_t naive_lru(const Trace& trace, std::size_t capacity) {
  std::list<std::uint32_t> stored;  // oldest first
  std::uint64_t found_tokens = 0;
  const auto has = [&](std::uint32_t block) { return std::ranges::find(stored, block) != stored.end(); };
  for (const TraceRequest& request : trace.requests) {
    std::size_t found = 0;
    while (found < request.blocks.size() && has(request.blocks[found])) ++found;
    found_tokens += std::min<std::uint64_t>(found * 512, request.input_tokens);
    for (std::size_t i = found; i-- > 0;) {
      stored.remove(request.blocks[i]);
      stored.push_back(request.blocks[i]);
    }
    for (std::size_t i = found; i < request.blocks.size(); ++i) {
      stored.remove(request.blocks[i]);
      stored.push_back(request.blocks[i]);
      if (stored.size() > capacity) {
        // What follows the oldest one leaves before it.
        std::uint32_t victim = stored.front();
        for (const TraceRequest& other : trace.requests) {
          const auto at = std::ranges::find(other.blocks, victim);
          if (at == other.blocks.end()) continue;
          for (auto next = at + 1; next != other.blocks.end() && has(*next) && *next != request.blocks[i]; ++next) {
            victim = *next;
          }
        }
        stored.remove(victim);
      }
    }
  }
  return found_tokens;
}

/// Tries every block as a victim.
std::uint64_t best_possible(const Trace& trace, std::size_t capacity, std::size_t at,
                            const std::set<std::uint32_t>& stored) {
  if (at == trace.requests.size()) return 0;
  const TraceRequest& request = trace.requests[at];
  std::size_t found = 0;
  while (found < request.blocks.size() && stored.contains(request.blocks[found])) ++found;
  std::set<std::uint32_t> all = stored;
  all.insert(request.blocks.begin(), request.blocks.end());
  std::set<std::set<std::uint32_t>> kept = {all};
  while (kept.begin()->size() > capacity) {
    std::set<std::set<std::uint32_t>> fewer;
    for (const auto& each : kept) {
      for (const auto block : each) {
        auto without = each;
        without.erase(block);
        fewer.insert(std::move(without));
      }
    }
    kept = std::move(fewer);
  }
  std::uint64_t best = 0;
  for (const auto& each : kept) best = std::max(best, best_possible(trace, capacity, at + 1, each));
  return best + std::min<std::uint64_t>(found * 512, request.input_tokens);
}

TEST(Replay, EverythingFitsIntoAnEndlessStore) {
  const Trace trace = random_trace(1, 300);
  std::set<std::uint32_t> seen;
  std::uint64_t tokens = 0;
  for (const TraceRequest& request : trace.requests) {
    std::size_t found = 0;
    while (found < request.blocks.size() && seen.contains(request.blocks[found])) ++found;
    tokens += tokens_of(trace, request, found);
    seen.insert(request.blocks.begin(), request.blocks.end());
  }
  for (const auto policy : eviction_policy_names()) {
    const auto report = run(trace, {.policy = std::string(policy), .ladder = uncompressed(), .dram_bytes = 1e9});
    EXPECT_EQ(report.hit_tokens, tokens);
    EXPECT_EQ(report.dropped_chunks, 0U);
  }
  EXPECT_EQ(belady_hit_tokens(trace, trace.distinct_blocks), tokens);
  EXPECT_EQ(belady_hit_tokens(trace, 0), 0U);
}

RC_GTEST_PROP(Replay, OfLruAgreesWithANaiveOne, (std::uint32_t seed)) {
  const Trace trace = random_trace(seed, 120);
  for (const std::size_t capacity : {7U, 15U, 40U}) {
    const auto report =
        run(trace, {.policy = "lru", .ladder = uncompressed(), .dram_bytes = static_cast<double>(capacity)});
    RC_ASSERT(report.hit_tokens == naive_lru(trace, capacity));
  }
}

RC_GTEST_PROP(Belady, IsNeverBeaten, (std::uint32_t seed)) {
  const Trace trace = random_trace(seed, 200);
  for (const std::size_t capacity : {6U, 12U, 30U}) {
    const std::uint64_t belady = belady_hit_tokens(trace, capacity);
    for (const auto policy : eviction_policy_names()) {
      const auto report =
          run(trace,
              {.policy = std::string(policy), .ladder = uncompressed(), .dram_bytes = static_cast<double>(capacity)});
      RC_ASSERT(report.hit_tokens <= belady);
    }
  }
}

TEST(Belady, FindsAsMuchAsTryingEverything) {
  for (std::uint32_t seed = 0; seed < 30; ++seed) {
    Trace trace = random_trace(seed, 6);
    // Blocks of equal length, as Belady's rule counts blocks.
    for (TraceRequest& request : trace.requests) {
      while (request.blocks.size() > 2) request.blocks.pop_back();
      request.input_tokens = static_cast<std::uint32_t>(request.blocks.size() * 512);
    }
    for (const std::size_t capacity : {2U, 3U}) {
      EXPECT_EQ(belady_hit_tokens(trace, capacity), best_possible(trace, capacity, 0, {})) << "seed " << seed;
    }
  }
}

TEST(Replay, ALadderHoldsMore) {
  const Trace trace = random_trace(3, 2000);
  const auto profile = *find_ladder_profile("compact");
  std::uint64_t before = 0;
  for (std::size_t rungs = 1; rungs <= profile.rungs.size(); ++rungs) {
    LadderProfile cut = profile;
    cut.rungs.resize(rungs);
    const auto report = run(trace, {.policy = "lru", .ladder = *Ladder::make(cut), .dram_bytes = 60});
    EXPECT_GE(report.hit_tokens, before);
    before = report.hit_tokens;
    std::uint64_t by_rung = 0;
    for (const auto& rung : report.rungs) by_rung += rung.hit_tokens;
    EXPECT_EQ(by_rung, report.hit_tokens);
    EXPECT_GE(report.mean_error, profile.rungs.front().error - 1e-9);
    EXPECT_LE(report.mean_error, cut.rungs.back().error + 1e-9);
  }
}

TEST(Replay, LowerTiersServeWhatLeftDram) {
  const Trace trace = random_trace(4, 1000);
  ReplayConfig config{.policy = "reuse", .ladder = uncompressed(), .dram_bytes = 40};
  const auto alone = run(trace, config);
  config.lower = {{.name = "nvme", .kind = LowerTierModel::Kind::kLog, .bytes = 120}};
  const auto two = run(trace, config);
  config.lower.push_back({.name = "remote", .kind = LowerTierModel::Kind::kLru});
  const auto three = run(trace, config);
  EXPECT_GT(two.hit_tokens, alone.hit_tokens);
  EXPECT_EQ(three.hit_tokens, run(trace, {.policy = "lru", .ladder = uncompressed(), .dram_bytes = 1e9}).hit_tokens);
  ASSERT_EQ(three.tiers.size(), 3U);
  std::uint64_t by_tier = 0;
  for (const auto& tier : three.tiers) by_tier += tier.hit_tokens;
  EXPECT_EQ(by_tier, three.hit_tokens);
  EXPECT_EQ(three.tiers[2].written_bytes, trace.distinct_blocks) << "each block once";
  double read = 0;
  for (const auto& request : three.requests) read += request.read_bytes[1];
  EXPECT_EQ(read, three.tiers[1].read_bytes);
}

TEST(Replay, IsTheSameEveryTime) {
  const Trace trace = random_trace(5, 1500);
  const ReplayConfig config{
      .policy = "reuse", .ladder = *Ladder::make(*find_ladder_profile("compact")), .dram_bytes = 30};
  EXPECT_EQ(run(trace, config).hit_tokens, run(trace, config).hit_tokens);
  EXPECT_EQ(run(trace, config).mean_error, run(trace, config).mean_error);
}

TEST(Replay, OfAStoreSmallerThanABlockFindsNothing) {
  const Trace trace = random_trace(6, 100);
  EXPECT_EQ(run(trace, {.policy = "reuse", .ladder = uncompressed(), .dram_bytes = 0.5}).hit_tokens, 0U);
}

TEST(Replay, RefusesConfigurationsThatMeanNothing) {
  const Trace trace = random_trace(7, 10);
  const auto code = [&](ReplayConfig config) { return status_of(replay(trace, config)).code(); };
  EXPECT_EQ(code({.policy = "mru", .ladder = uncompressed()}), Code::kInvalid);
  EXPECT_EQ(code({.policy = "lru", .ladder = uncompressed(), .block_bytes = 0}), Code::kInvalid);
  EXPECT_EQ(code({.policy = "lru", .ladder = uncompressed(), .dram_bytes = -1}), Code::kInvalid);
  EXPECT_EQ(code({.policy = "lru", .ladder = uncompressed(), .demotion = {.sample_chunks = 0}}), Code::kInvalid);
  EXPECT_EQ(code({.policy = "lru", .ladder = uncompressed(), .lower = {{.name = "nvme", .bytes = -1}}}),
            Code::kInvalid);
}

}  // namespace
}  // namespace kvern::plan
