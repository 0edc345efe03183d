#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvern {

/// Where a chunk number could stand and none does.
inline constexpr std::uint32_t kNoChunk = std::numeric_limits<std::uint32_t>::max();

/// What a policy is told of a chunk that enters.
struct ChunkTraits {
  std::uint64_t bytes = 0;
  /// Names the content for good, so that a policy recognises a chunk that left and comes back under another number.
  std::uint64_t fingerprint = 0;
};

class ChunkTree;

/// Decides what leaves first. Knows chunks by their number only, and time by the uses that it is told of.
/// Deterministic. Not thread-safe: the store's lock is held.
///
/// A chunk is reached through the chunks before it alone, so that one whose parent left is dead weight: policies name a
/// chunk after all that follow it. A victim list is to be taken from its front, and a chunk that could not be taken
/// keeps the ones before it in its prompt alive only as long as the caller leaves them, too.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  virtual std::string_view name() const = 0;
  /// A chunk is stored now. A number that is known already is ignored.
  virtual void inserted(std::uint32_t chunk, const ChunkTraits& traits) = 0;
  /// The chunk continues the prompt of the parent. Told once both are known; ignored when one is not, or when the
  /// parent would come to follow itself.
  virtual void follows(std::uint32_t chunk, std::uint32_t parent) = 0;
  virtual void touched(std::uint32_t chunk) = 0;
  virtual void erased(std::uint32_t chunk) = 0;
  /// Up to count victims, best first. They stay known to the policy until erased(); a victim that could not be taken
  /// (leased, claimed) is reported by skipped(), so that the next call does not name it first again. Asking changes
  /// nothing in the order.
  virtual std::vector<std::uint32_t> victims(std::size_t count) = 0;
  virtual void skipped(std::uint32_t chunk) = 0;
  /// A chunk that is withheld is no victim until it is not withheld any more; its uses are told as before. What it is
  /// reached through is withheld, too: the caller sees to it, before a withheld chunk follows another as well.
  virtual void withhold(std::uint32_t chunk, bool withheld) = 0;
  /// How much use of the chunk is expected in the time ahead; only the order and the ratios within one policy mean
  /// something. 0 for a chunk that is not known.
  virtual double expected_use(std::uint32_t chunk) const = 0;
  /// All chunks that it knows, and who follows whom.
  virtual const ChunkTree& tree() const = 0;
};

/// Least recently used.
std::unique_ptr<EvictionPolicy> make_lru_policy();
/// S3-FIFO (SOSP 2023): what is not used again while it passes a small queue leaves; what is, goes to a large one.
std::unique_ptr<EvictionPolicy> make_s3fifo_policy();
/// W-TinyLFU (TOS 2017): a small window, and behind it what is used more often than what it would replace.
std::unique_ptr<EvictionPolicy> make_tinylfu_policy();
/// Least expected use, learnt from when chunks came back before: store/reuse_model.h, docs/planner.md. The default.
std::unique_ptr<EvictionPolicy> make_reuse_policy();

inline constexpr std::string_view kDefaultEvictionPolicy = "reuse";

std::span<const std::string_view> eviction_policy_names();
/// kInvalid, with the names that there are, for any other.
Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name);

}  // namespace kvern
