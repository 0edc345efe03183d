#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/keys.h"
#include "base/status.h"
#include "kernels/compaction.h"
#include "kernels/container.h"
#include "kernels/rope.h"
#include "service/in_flight.h"
#include "service/store_pipeline.h"
#include "store/chunk_store.h"
#include "store/tiered_store.h"
#include "transport/compact_handle.h"

namespace kvern {

/// Queries of some layers and query heads: [layer][row][head][dim] of the prompt's dtype, without gaps.
struct QueryPart {
  std::uint32_t layer_begin = 0;
  std::uint32_t layers = 0;
  std::uint32_t head_begin = 0;
  std::uint32_t heads = 0;
  std::string bytes;
};

/// All that is needed to make one compact cache of a prompt whose chunks are stored.
struct CompactionOrder {
  CompactHandle handle;
  CompactionPlan plan;
  std::shared_ptr<const Codec> codec;  ///< of the chunks of the cache
  /// How the model turns its keys; none: they stay where they are.
  std::optional<rope::Parameters> rotation;
  /// Of chunks of the whole group: all layers and heads; without last block, hashes, position and tokens.
  ContainerInfo info;
  std::uint32_t chunk_tokens = 0;
  std::uint32_t hash_bytes = 0;
  std::uint32_t query_heads = 0;   ///< over all ranks
  std::vector<QueryPart> queries;  ///< cover all layers and heads where the plan needs queries

  std::vector<ChunkKey> source_keys() const;
  std::vector<ChunkKey> slot_keys() const;
  /// Keys and values of the prompt, as the engine holds them.
  std::uint64_t prompt_bytes() const;
  /// About what the work takes at its peak, queries included.
  std::uint64_t memory_bytes() const;
};

/// One key per chunk of so many blocks that the hashes make up.
std::vector<ChunkKey> chunk_keys(const std::vector<BlockHash>& hashes, const NamespaceId& namespace_id,
                                 std::uint16_t group, std::uint32_t chunk_blocks);

/// Errors of the layers' attention, see attention_error().
struct CompactionError {
  double mean = 0;
  double max = 0;
};

/// Makes compact caches out of stored chunks. Thread-safe.
class CompactionTask {
 public:
  /// The prompt, held, and what is kept of it: all that measure() needs.
  struct Cut;
  struct Outcome {
    std::uint64_t stored_bytes = 0;
    std::vector<std::uint32_t> layer_slots;  ///< of a ragged cache: tokens that each layer keeps
    std::shared_ptr<const Cut> cut;          ///< null without queries, which the error is measured by
  };
  struct Parts {
    ChunkStore& store;
    TieredStore& tiers;
    StorePipeline& pipeline;
    InFlight& in_flight;
    Executor* helpers = nullptr;  ///< for heads of a layer; the result does not depend on it
  };
  explicit CompactionTask(const Parts& parts) : parts_(parts) {}

  /// Holds the prompt's chunks, cuts layer by layer, turns the kept keys to the slots 0 … M - 1 and stores the cache as
  /// ordinary chunks; on this thread and the helpers', and stops soon after cancelled is set (kExpired). kNotFound when
  /// a chunk of the prompt is gone, kCorrupt when one is damaged. What it had stored when it failed is left to the
  /// caller.
  Result<Outcome> run(const CompactionOrder& order, const std::atomic<bool>& cancelled) const;

  /// How far the attention of the captured queries over what is kept is off that over the whole prompt; on this thread
  /// and the helpers given (null: none). It takes longer than run(), and nobody who decodes has to wait for it.
  /// Failures as of run().
  Result<CompactionError> measure(const CompactionOrder& order, const Cut& cut, const std::atomic<bool>& cancelled,
                                  Executor* helpers) const;

 private:
  const Parts parts_;
};

}  // namespace kvern
