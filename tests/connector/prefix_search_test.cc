#include "connector/prefix_search.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstring>

namespace kvern {
namespace {

constexpr std::uint32_t kHashBytes = 32;

/// Hashes of a prompt's blocks: block i of prompt p.
std::string prompt_hashes(std::uint32_t prompt, std::uint32_t blocks) {
  std::string joined;
  for (std::uint32_t i = 0; i < blocks; ++i) {
    std::string hash(kHashBytes, '\0');
    std::memcpy(hash.data(), &prompt, sizeof prompt);
    std::memcpy(hash.data() + 8, &i, sizeof i);
    joined += hash;
  }
  return joined;
}

/// An index in memory of its own, and what is in it as plain sets.
struct StoredPrompt {
  static constexpr std::uint32_t kBlocks = 48;

  explicit StoredPrompt(std::size_t groups) : hashes(prompt_hashes(1, kBlocks)), present(groups) {
    for (auto& blocks : present) blocks.resize(kBlocks, false);
  }

  void store(std::uint16_t group, std::uint32_t begin, std::uint32_t end) {
    writer.make_live(next_chunk);
    for (std::uint32_t block = begin; block < end; ++block) {
      const auto hash = reinterpret_cast<const std::uint8_t*>(hashes.data()) + block * kHashBytes;
      writer.put(block_fingerprint(NamespaceId{}, group, {hash, kHashBytes}), next_chunk,
                 static_cast<std::uint16_t>(block - begin));
      present[group][block] = true;
    }
    ++next_chunk;
  }

  Found find(const MatcherConfig& config, std::uint32_t local, std::uint32_t limit, std::uint32_t prompt_tokens) {
    const auto reader = writer.reader();
    std::vector<IndexLookup> lookups;
    for (const auto& group : config.groups) {
      lookups.emplace_back(reader, PromptHashes{NamespaceId{}, group.group, hashes, kHashBytes}, config.chunk_blocks);
    }
    return find_common(config, lookups, local, limit, prompt_tokens);
  }

  /// The rule of prefix_matcher.h, word for word.
  std::uint32_t expected(const MatcherConfig& config, std::uint32_t local, std::uint32_t limit,
                         std::uint32_t prompt_tokens) const {
    for (std::uint32_t blocks = limit; blocks > local; --blocks) {
      const std::uint32_t tokens = blocks * config.block_tokens;
      bool served = true;
      for (std::size_t i = 0; i < config.groups.size(); ++i) {
        const std::uint32_t window = config.groups[i].window_tokens;
        std::uint32_t first = 0;
        if (window > 0 && tokens + 1 > window) {
          first = (tokens - window + 1) / config.block_tokens;
          if (tokens == prompt_tokens && (tokens - window + 1) % config.block_tokens == 0) served = false;
        }
        for (std::uint32_t block = std::max(local, first); block < blocks; ++block) {
          served = served && present[config.groups[i].group][block];
        }
      }
      if (served) return blocks;
    }
    return 0;
  }

  BlockIndexConfig index_config{.chunk_capacity = 1024, .slot_count = 4096, .generation = 1};
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> memory = std::vector<Line>(block_index_bytes(index_config) / sizeof(Line) + 1);
  BlockIndexWriter writer{std::as_writable_bytes(std::span(memory)), index_config};
  std::uint32_t next_chunk = 0;
  std::string hashes;
  std::vector<std::vector<bool>> present;
};

RC_GTEST_PROP(PrefixSearch, finds_what_the_rule_says_for_any_chunks_and_windows, ()) {
  MatcherConfig config;
  config.block_tokens = *rc::gen::element<std::uint32_t>(16, 32);
  config.chunk_blocks = *rc::gen::element<std::uint32_t>(1, 2, 8);
  const auto groups = *rc::gen::inRange<std::uint16_t>(1, 4);
  for (std::uint16_t group = 0; group < groups; ++group) {
    config.groups.push_back({group, *rc::gen::element<std::uint32_t>(0, 1, 33, 64, 128, 129)});
  }
  StoredPrompt prompt(groups);
  for (std::uint16_t group = 0; group < groups; ++group) {
    // Mostly whole cells, some short ones, some that lack their first blocks, some missing.
    for (std::uint32_t cell = 0; cell < StoredPrompt::kBlocks; cell += config.chunk_blocks) {
      const auto kind = *rc::gen::weightedElement<int>({{12, 0}, {1, 1}, {1, 2}, {1, 3}});
      const std::uint32_t end = cell + config.chunk_blocks;
      if (kind == 0) prompt.store(group, cell, end);
      if (kind == 1) prompt.store(group, cell, cell + *rc::gen::inRange<std::uint32_t>(1, config.chunk_blocks + 1));
      if (kind == 2) prompt.store(group, cell + *rc::gen::inRange<std::uint32_t>(0, config.chunk_blocks), end);
    }
  }
  const auto local = *rc::gen::inRange<std::uint32_t>(0, 12);
  const auto limit = *rc::gen::inRange<std::uint32_t>(local, StoredPrompt::kBlocks + 1);
  const std::uint32_t prompt_tokens = limit * config.block_tokens + *rc::gen::element<std::uint32_t>(0, 5);
  RC_ASSERT(prompt.find(config, local, limit, prompt_tokens).blocks ==
            prompt.expected(config, local, limit, prompt_tokens));

  std::vector<BitmapLookup> remote;
  for (std::uint16_t group = 0; group < groups; ++group) {
    std::string bits((StoredPrompt::kBlocks + 7) / 8, '\0');
    for (std::uint32_t block = 0; block < StoredPrompt::kBlocks; ++block) {
      if (prompt.present[group][block]) bits[block / 8] = static_cast<char>(bits[block / 8] | 1 << (block % 8));
    }
    remote.emplace_back(bits);
  }
  RC_ASSERT(find_common(config, remote, local, limit, prompt_tokens).blocks ==
            prompt.expected(config, local, limit, prompt_tokens));
}

TEST(PrefixSearch, a_prompt_that_ends_where_the_window_of_its_last_token_begins_gets_one_block_less) {
  MatcherConfig config;
  config.block_tokens = 32;
  config.chunk_blocks = 8;
  config.groups = {{0, 0}, {1, 129}};
  StoredPrompt prompt(2);
  prompt.store(0, 0, 8);
  prompt.store(1, 0, 8);
  EXPECT_EQ(prompt.find(config, 0, 8, 256).blocks, 7U);
  EXPECT_EQ(prompt.find(config, 0, 8, 257).blocks, 8U);
  config.groups[1].window_tokens = 128;
  EXPECT_EQ(prompt.find(config, 0, 8, 256).blocks, 8U);
}

TEST(PrefixSearch, an_answer_that_is_cut_short_or_absent_counts_as_not_stored) {
  const BitmapLookup none{std::string()};
  EXPECT_EQ(none.leading_end(0, 100), 0U);
  EXPECT_EQ(none.missing_from_end(0, 100), 99U);
  const BitmapLookup eight{std::string("\xff")};
  EXPECT_EQ(eight.leading_end(0, 100), 8U);
  EXPECT_EQ(eight.missing_from_end(0, 8), std::nullopt);
}

}  // namespace
}  // namespace kvern
