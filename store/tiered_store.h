#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/executor.h"
#include "base/keys.h"
#include "base/status.h"
#include "base/trace.h"
#include "store/chunk_store.h"
#include "store/prefix_flush.h"
#include "store/tier.h"

namespace kvern {

/// When a tier gets the chunks of the DRAM tier.
enum class WritePolicy {
  kOff,      ///< never: others fill it
  kThrough,  ///< as soon as a chunk is complete
  kBack,     ///< before it leaves DRAM
};

struct LowerTier {
  std::unique_ptr<Tier> tier;
  WritePolicy write = WritePolicy::kThrough;
};

struct TieredStoreConfig {
  /// Bytes that one prefetch has under way at once: enough to keep a disk or a network busy, little enough that several
  /// share them.
  std::uint64_t prefetch_window_bytes = 64ULL << 20;
  /// Prefetches at once; more are answered with what DRAM has.
  std::size_t prefetches_max = 256;
  /// How many bytes of next victims are kept saved, so that they can leave without being lost.
  std::uint64_t write_back_bytes = 64ULL << 20;
  /// Share of the DRAM tier that may be held for the writes of one lower tier: a chunk stays where it is until it is
  /// written, and a tier that is slow must not fill DRAM with what waits for it. A small DRAM tier holds as much as
  /// saving_bytes_min, but no more than a quarter of itself.
  double saving_share = 0.125;
  std::uint64_t saving_bytes_min = 64ULL << 20;

  std::uint64_t saving_bytes_max(std::uint64_t dram_bytes) const;
  Status validate() const;
};

/// Asked for by a look-up; see TieredStore::prefetch(). Ends the movement when it goes away, and lets go of the chunks
/// that it brought up.
class Prefetch {
 public:
  virtual ~Prefetch() = default;
  /// Chunks are still on their way. Once false it stays so.
  virtual bool pending() const = 0;
};

/// What a flush drops: everything of the namespaces, or, with a block, of that the chunks that hold the block and those
/// that continue it.
struct FlushScope {
  NamespaceSet namespaces = NamespaceSet::all();
  std::optional<BlockHash> prefix = {};
};

struct TieredStoreStats {
  struct OfTier {
    std::string name;
    WritePolicy write = WritePolicy::kOff;
    TierStats tier;
    std::uint64_t promoted_chunks = 0, promoted_bytes = 0, promoted_tokens = 0;
    std::uint64_t saved_chunks = 0, unsaved_chunks = 0;  ///< written, and given up
    std::uint64_t corrupt_chunks = 0;                    ///< read, found damaged and erased
  };
  std::vector<OfTier> tiers;
  std::uint64_t prefetches = 0;
};

/// Moves chunks between the DRAM tier and those below it. Thread-safe; nothing here blocks its caller but wait_saved()
/// and the destructor. A tier that is slow or broken costs its hits and nothing else.
class TieredStore {
 public:
  /// dram and executor (for the verification of what was read) outlive this. At most 8 tiers, fastest first.
  /// usable_bytes: how much of the slab can be written yet; null: all. Throws std::invalid_argument when the
  /// configuration is not valid.
  TieredStore(ChunkStore& dram, std::vector<LowerTier> tiers, Executor& executor, const TieredStoreConfig& config,
              std::function<std::uint64_t()> usable_bytes = nullptr);
  /// Ends all movement. What was not written yet is not written any more: wait_saved() before.
  ~TieredStore();

  bool has_tiers() const;

  /// Brings up the chunks of a prompt that lower tiers have and DRAM has not: from first_block on, up to the first gap.
  /// blocks: all of the prompt's, in order; chunk_blocks: blocks per grid cell. Chunks appear in the index one by one,
  /// verified. Never null. span: ends when the movement does, with a child for each chunk that is read.
  std::shared_ptr<Prefetch> prefetch(const NamespaceId& namespace_id, std::uint16_t group,
                                     std::span<const BlockHash> blocks, std::size_t first_block,
                                     std::size_t chunk_blocks, SpanPtr span = nullptr);

  /// A chunk has become complete in DRAM. span: gets a child for each tier that it is written to.
  void stored(const ChunkKey& key, const SpanPtr& span = nullptr);
  /// Saves those that will leave DRAM next. Called now and then, and cheap when there is room.
  void save_victims();
  /// Waits for what is being written; kExpired when that takes longer.
  Status wait_saved(std::int64_t timeout_ns);
  /// Drops what the scope says from all tiers and then calls done; kNotFound: no tier has the prefix. What somebody
  /// holds in DRAM is found by nobody else any more. Meanwhile nothing moves, so that nothing comes back from one tier
  /// to another.
  void flush(const FlushScope& scope, FlushDone done);

  /// Chunks that nobody may find any more: they leave DRAM at once, but for the bytes that somebody still reads, and
  /// the lower tiers until done is called, with the first failure. What is on its way between tiers does not arrive.
  void erase(const std::vector<ChunkKey>& keys, Tier::Done done);

  TieredStoreStats stats() const;

 private:
  struct State;
  class Job;
  const std::shared_ptr<State> state_;
};

}  // namespace kvern
