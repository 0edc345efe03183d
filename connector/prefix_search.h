#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/block_index.h"
#include "base/keys.h"
#include "connector/prefix_matcher.h"

namespace kvern {

/// How PrefixMatcher finds the longest prefix that is stored, apart from claims and threads.

/// The block hashes of a prompt, joined, as one group stores them.
struct PromptHashes {
  NamespaceId namespace_id;
  std::uint16_t group = 0;
  std::string_view joined;
  std::uint32_t hash_bytes = 0;
};

/// Blocks [begin, end) of the prompt lie in one chunk.
struct Span {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
  BlockIndexHit hit;
};

/// Look-ups of one group in the shared index. A block that is found stands for the blocks before it in its chunk: their
/// hashes are part of its own.
class IndexLookup {
 public:
  IndexLookup(const BlockIndexReader& index, PromptHashes hashes, std::uint32_t chunk_blocks)
      : index_(index), hashes_(hashes), chunk_blocks_(chunk_blocks) {}

  /// The end of the blocks that are stored from begin on without a gap, at most limit.
  std::uint32_t leading_end(std::uint32_t begin, std::uint32_t limit) {
    std::array<std::uint64_t, kBatchCells> fingerprints;
    std::array<BlockIndexHit, kBatchCells> hits;
    std::uint32_t at = begin;
    while (at < limit) {
      std::size_t cells = 0;
      for (std::uint32_t end = at; end < limit && cells < kBatchCells; ++cells) {
        end = cell_end(end, limit);
        fingerprints[cells] = fingerprint(end - 1);
      }
      const std::size_t found = index_.find_leading(std::span(fingerprints).first(cells), hits);
      for (std::size_t cell = 0; cell < cells; ++cell) {
        const std::uint32_t end = cell_end(at, limit);
        const std::uint32_t covered = cell < found ? cover_with(at, end, hits[cell]) : cover(at, end - 1);
        if (covered < end) return covered;
        at = end;
      }
    }
    return limit;
  }

  /// Checks that blocks [begin, end) are stored; otherwise returns the end of a shorter candidate.
  std::optional<std::uint32_t> missing_from_end(std::uint32_t begin, std::uint32_t end) {
    for (std::uint32_t at = end; at > begin;) {
      const auto known = std::ranges::find_if(spans_, [&](const Span& s) { return s.begin < at && at <= s.end; });
      if (known != spans_.end()) {
        at = known->begin;
        continue;
      }
      const auto hit = index_.find(fingerprint(at - 1));
      if (!hit) return at - 1;
      spans_.push_back({start_of(at - 1, *hit), at, *hit});
      at = spans_.back().begin;
    }
    return std::nullopt;
  }

  const std::vector<Span>& spans() const { return spans_; }

 private:
  std::uint64_t fingerprint(std::uint32_t block) const {
    return block_fingerprint(
        hashes_.namespace_id, hashes_.group,
        {reinterpret_cast<const std::uint8_t*>(hashes_.joined.data()) + std::size_t{block} * hashes_.hash_bytes,
         hashes_.hash_bytes});
  }
  std::uint32_t cell_end(std::uint32_t block, std::uint32_t limit) const {
    return static_cast<std::uint32_t>(
        std::min<std::uint64_t>(limit, (std::uint64_t{block} / chunk_blocks_ + 1) * chunk_blocks_));
  }
  static std::uint32_t start_of(std::uint32_t block, const BlockIndexHit& hit) {
    return block - std::min<std::uint32_t>(block, hit.block_in_chunk);
  }
  /// hit is of block end - 1.
  std::uint32_t cover_with(std::uint32_t begin, std::uint32_t end, const BlockIndexHit& hit) {
    const std::uint32_t start = start_of(end - 1, hit);
    if (start > begin) {
      const std::uint32_t covered = cover(begin, start);
      if (covered < start) return covered;
    }
    spans_.push_back({start, end, hit});
    return end;
  }
  /// The end of what is stored from begin on without a gap. A cell has few blocks, so each is asked for.
  std::uint32_t cover(std::uint32_t begin, std::uint32_t end) {
    for (; end > begin; --end) {
      if (const auto hit = index_.find(fingerprint(end - 1))) return cover_with(begin, end, *hit);
    }
    return begin;
  }

  /// Cells whose look-ups are prefetched together: their fingerprints cost little when they were made in vain.
  static constexpr std::size_t kBatchCells = 32;

  const BlockIndexReader& index_;
  const PromptHashes hashes_;
  const std::uint32_t chunk_blocks_;
  std::vector<Span> spans_;
};

/// The same over the daemon's answer.
class BitmapLookup {
 public:
  explicit BitmapLookup(std::string present) : present_(std::move(present)) {}
  std::uint32_t leading_end(std::uint32_t begin, std::uint32_t limit) const {
    while (begin < limit && is_present(begin)) ++begin;
    return begin;
  }
  std::optional<std::uint32_t> missing_from_end(std::uint32_t begin, std::uint32_t end) const {
    for (std::uint32_t at = end; at > begin; --at) {
      if (!is_present(at - 1)) return at - 1;
    }
    return std::nullopt;
  }

 private:
  bool is_present(std::uint32_t block) const {
    return block / 8 < present_.size() && (static_cast<unsigned char>(present_[block / 8]) >> (block % 8) & 1) != 0;
  }
  std::string present_;
};

/// First block that a sliding group needs so that T tokens count as computed.
inline std::uint32_t window_begin(std::uint64_t tokens, std::uint32_t window, std::uint32_t block_tokens) {
  return tokens + 1 <= window ? 0 : static_cast<std::uint32_t>((tokens - window + 1) / block_tokens);
}

struct Found {
  std::uint32_t blocks = 0;
  const char* reason = "";
};

/// The largest number of blocks, at most limit, that all groups can serve when the engine has the first local ones:
/// full groups without a gap, sliding groups in the last window. lookups: one per group of the configuration.
template <typename Lookup>
Found find_common(const MatcherConfig& config, std::vector<Lookup>& lookups, std::uint32_t local, std::uint32_t limit,
                  std::uint32_t prompt_tokens) {
  std::uint32_t blocks = limit;
  for (std::size_t i = 0; i < lookups.size(); ++i) {
    if (config.groups[i].window_tokens == 0) blocks = lookups[i].leading_end(local, blocks);
  }
  if (blocks <= local) return {0, "not stored"};
  const char* reason = blocks < limit ? "not stored any further" : "";
  for (bool settled = false; !settled && blocks > local;) {
    settled = true;
    for (std::size_t i = 0; i < lookups.size() && settled; ++i) {
      const std::uint32_t window = config.groups[i].window_tokens;
      if (window == 0) continue;
      const std::uint64_t tokens = std::uint64_t{blocks} * config.block_tokens;
      if (tokens == prompt_tokens && tokens >= window && (tokens - window + 1) % config.block_tokens == 0) {
        --blocks;
        settled = false;
        continue;
      }
      const std::uint32_t begin = std::max(local, window_begin(tokens, window, config.block_tokens));
      if (const auto shorter = lookups[i].missing_from_end(begin, blocks)) {
        blocks = *shorter;
        settled = false;
        reason = "window not stored";
      }
    }
  }
  if (blocks <= local) return {0, reason};
  return {blocks, reason};
}

}  // namespace kvern
