#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/block_index.h"
#include "base/clock.h"
#include "base/keys.h"
#include "base/status.h"
#include "kernels/container.h"
#include "store/ancestry.h"
#include "store/eviction_policy.h"
#include "store/slab.h"
#include "store/storage_terms.h"

namespace kvern {

/// The DRAM tier: containers in a slab, found through the shared block index.
///
/// One logical chunk holds the containers of all its shards (ranks). It is published in the index when the stored
/// shards cover every (layer, head) of the group, and is evicted as a whole. Containers are immutable; manifest last: a
/// chunk becomes findable only after all its bytes are in place.
///
/// Thread-safe. The lock is held for bookkeeping only, never while bytes are copied or encoded.

struct ChunkStoreConfig {
  std::uint64_t slab_bytes = 0;
  std::uint32_t chunk_capacity = 1U << 16;
  std::uint32_t index_slots = 1U << 20;
  std::uint64_t generation = 1;
  /// Chunks of which some shards never came are dropped after this long without a new shard.
  std::int64_t incomplete_ttl_ns = 60'000'000'000;
  /// Demotion begins when less than this is free: enough that stores find room while chunks step down.
  std::uint64_t demotion_free_bytes = 0;
  /// What one tenant may have retained at once, as a share of the slab, or of its quota where it has a smaller one.
  double retain_share = 0.25;
  Status validate() const;
};

/// Where one shard's container lies.
struct StoredShard {
  Extent extent;
  std::uint32_t layer_begin = 0, layers = 0, head_begin = 0, heads = 0;
};

/// A chunk that is pinned: it is neither evicted nor freed until unpin(pin).
struct PinnedChunk {
  std::uint64_t pin = 0;  ///< handle for unpin()
  std::uint32_t chunk = 0;
  std::uint32_t tokens = 0;
  std::vector<StoredShard> shards;
};

/// Room for one container that is being written. Abandoned by abort() or turned into a shard by publish().
struct WriteTicket {
  std::uint64_t id = 0;
  Extent extent;
};

struct ChunkStoreStats {
  std::uint64_t capacity_bytes = 0, used_bytes = 0, pinned_chunks = 0, chunks = 0, incomplete_chunks = 0;
  std::uint64_t raw_bytes = 0, encoded_bytes = 0;  ///< of what is stored now
  std::uint64_t evicted_chunks = 0, evicted_bytes = 0, superseded_chunks = 0, quarantined_chunks = 0;
  std::uint64_t index_slots_used = 0;
  std::uint64_t retained_chunks = 0, retained_bytes = 0;
  /// What a warm restart found: chunks taken over, and containers that were dropped since they were damaged, of an
  /// unknown format or without the other shards of their chunk.
  std::uint64_t recovered_chunks = 0, recovered_bytes = 0, dropped_containers = 0;
  std::uint64_t demoted_chunks = 0, demoted_bytes = 0;     ///< steps down ladders, and bytes that they freed
  std::array<std::uint64_t, 3> of_lossy_generations = {};  ///< complete chunks by lossy encodings; the last: 2 or more
};

/// One container of a chunk object that was read from a lower tier and verified.
struct LoadedShard {
  ContainerInfo info;
  std::uint64_t offset = 0;  ///< within the object, a multiple of Slab::kAlignment
  std::uint64_t bytes = 0;   ///< of the container, without what pads it
};

/// A step down a ladder that is to be carried out; see ChunkStore::next_demotion().
struct DemotionOrder {
  ChunkKey key;
  PinnedChunk chunk;
  StoredForm to;
  std::string codec_spec;  ///< of the form to make
  std::string rotation;
  double error = 0;           ///< of the form that there is
  double expected_error = 0;  ///< of the form to make, as the ladder knows it
  double error_max = 1;       ///< what the form to make may have
};

/// What is stored in one form.
struct StoredFormStats {
  std::string codec_spec;
  std::uint64_t chunks = 0, bytes = 0;
};

/// A tenant with a quota.
struct TenantStats {
  std::string tenant;
  std::uint64_t used_bytes = 0, limit_bytes = 0;
  std::uint64_t refused = 0;  ///< containers for which it had no room
};

/// What a pin is taken for.
enum class PinFor {
  kUse,      ///< counts as a use for eviction
  kClaimed,  ///< the same, by a reader who claimed the chunk: it may have left the index since
  kMove,     ///< to be written elsewhere, which is no use
};

/// A chunk that some lower tiers do not have.
struct UnsavedChunk {
  ChunkKey key;
  std::uint8_t missing_in = 0;  ///< bit i: lower tier i
};

/// What a flush took out of the index.
struct FlushedChunks {
  std::uint64_t chunks = 0, bytes = 0;
  std::uint64_t held = 0;  ///< of the chunks: somebody holds them still, and their bytes are freed after that
  bool operator==(const FlushedChunks&) const = default;
  FlushedChunks& operator+=(const FlushedChunks& other) {
    chunks += other.chunks;
    bytes += other.bytes;
    held += other.held;
    return *this;
  }
};

/// What became of a wish to retain chunks.
struct RetainedChunks {
  std::uint64_t chunks = 0;   ///< that are kept until then, or longer, and were asked for
  std::uint64_t refused = 0;  ///< the tenant may have no more retained
};

enum class Presence { kAbsent, kStored, kPartlyStored, kInFlight };

class ChunkStore {
 public:
  /// Fills the set with the numbers of chunks that sessions claim at this moment (hazard slots). Called with the
  /// store's lock held, after begin_retire() of the candidates; must not call back. Reads the slots with seq_cst loads.
  using HazardProbe = std::function<void(std::unordered_set<std::uint32_t>& claimed)>;
  /// Called, without the lock, for every chunk that left the index (for KV events); must not throw. reason: "evicted",
  /// "superseded" (its blocks are found in a longer chunk now), "quarantined", "flushed", "dropped". blocks: none when
  /// the chunk's names were damaged, so that nobody knows which have gone.
  using RemovalListener =
      std::function<void(const ChunkKey& key, std::span<const BlockHash> blocks, std::string_view reason)>;

  /// All memory is owned by the caller and outlives the store. map_memory (ContainerMap; empty: none) makes a warm
  /// restart possible: what an earlier store left in it and in the slab is taken over, see ChunkStoreStats. Headers are
  /// verified then, sections by whoever reads them. Throws std::invalid_argument when a size does not fit.
  ChunkStore(const ChunkStoreConfig& config, std::span<std::byte> slab_memory, std::span<std::byte> index_memory,
             std::unique_ptr<EvictionPolicy> policy, HazardProbe hazards, const Clock& clock,
             std::span<std::byte> map_memory = {});
  ~ChunkStore();

  /// De-duplication, before anything is reserved. With a shard's layer and head range: kStored when that range is there
  /// already, kInFlight when somebody else has a ticket for that very key and range.
  Presence presence(const ChunkKey& key, const ShardShape& shard) const;

  /// Room for a container of at most max_bytes; evicts when needed, and what is the tenant's own first where the tenant
  /// is at its limit. kBusy when everything that could go is pinned or
  /// claimed, kRefused when max_bytes is larger than the slab could ever hold, kNotFound never. Fails with kBusy
  /// ("in flight") when the same key and range is being written.
  Result<WriteTicket> begin_write(const ContainerInfo& info, std::size_t max_bytes);
  /// The writable bytes of a ticket.
  std::span<std::byte> bytes(const WriteTicket& ticket);
  /// The container of container_bytes is complete in the ticket's bytes: shrink, add the shard, and publish the chunk
  /// when it is complete. A longer chunk of the same grid cell takes over the block hashes of a shorter one, which is
  /// dropped once nobody holds it. Returns true when the chunk is complete (readable by others) now.
  Result<bool> publish(const WriteTicket& ticket, const ContainerInfo& info, std::size_t container_bytes);
  void abort(const WriteTicket& ticket);

  /// Room for a whole chunk object of a lower tier (store/tier.h), bytes being a multiple of Slab::kAlignment. Fails as
  /// begin_write() does. Counts against the quota of the namespace's tenant, if one is given.
  Result<WriteTicket> begin_load(std::uint64_t bytes, const std::optional<NamespaceId>& namespace_id = std::nullopt);
  /// The object is complete and verified in the ticket's bytes: publishes the chunk, unless it is stored already.
  /// saved_in: bit i says that lower tier i has it. kCorrupt when the shards are not a complete chunk.
  Status publish_load(const WriteTicket& ticket, std::span<const LoadedShard> shards, std::uint8_t saved_in);
  /// Lower tier i has the chunk now, for each bit i that is set.
  void mark_saved(const ChunkKey& key, std::uint8_t saved_in);
  /// Of the chunks that would leave first, about so many bytes: those that not all lower tiers of the mask have.
  std::vector<UnsavedChunk> unsaved_victims(std::uint64_t bytes, std::uint8_t wanted_in) const;

  /// How many leading blocks of the prompt are stored: blocks[i] is the hash of block i. Touches what it finds.
  /// For remote clients and tools; local clients read the index themselves.
  std::size_t match(const NamespaceId& namespace_id, std::uint16_t group, std::span<const BlockHash> blocks);

  /// Two neighbouring blocks of a prompt: the chunk of the first is not evicted before that of the second from now on.
  /// match() says so of what it finds. Nothing happens when they are in one chunk, or one of them is not stored.
  void link(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& previous, const BlockHash& next);

  /// Keeps the chunks of these blocks, and those that they are reached through, until then by the store's clock: they
  /// leave after all others, those that were to stay longest last. A wish for an earlier time changes nothing. Blocks
  /// that are not stored are passed over. Not kept across a restart.
  RetainedChunks retain(const NamespaceId& namespace_id, std::uint16_t group, std::span<const BlockHash> blocks,
                        std::int64_t until_ns);

  /// Pins the complete chunk that holds this block. kNotFound on a miss. The caller (a lease) must unpin.
  Result<PinnedChunk> pin(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& block,
                          PinFor what_for = PinFor::kUse);
  void unpin(std::uint64_t pin);
  /// Read access to a shard of a pinned chunk.
  std::span<const std::byte> bytes(const StoredShard& shard) const;

  /// Takes a chunk out of the index for good after a checksum failed; its bytes are freed once nobody holds it.
  void quarantine(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& block);
  /// Takes a chunk out for good, whole or not, because whoever stored it wants it gone; its bytes are freed once nobody
  /// holds it. Nothing happens when it is not there, or while another shard of it is being written.
  void drop(const ChunkKey& key);
  /// Nothing of these namespaces is found any more. What is pinned or claimed stays readable for who holds it.
  FlushedChunks flush(const NamespaceSet& namespaces);
  /// The same of single chunks; those that are not there are passed over.
  FlushedChunks flush(std::span<const ChunkKey> keys);
  /// All complete chunks of these namespaces, with regard to the block; see continue_prefix().
  std::vector<ChunkAncestry> ancestries(const NamespaceSet& namespaces, const BlockHash& block) const;
  /// Frees incomplete chunks past their TTL and chunks whose drop had to wait. Called now and then by the service.
  void sweep();

  /// How chunks of this namespace are kept from now on; the first terms of a namespace hold. Those that are there and
  /// weaker than allowed are dropped. Chunks of a namespace that has no terms never step down.
  void set_terms(const NamespaceId& namespace_id, StorageTerms terms);
  /// Called, without the lock, when a chunk was stored and less than demotion_free_bytes is free. Set before any thread
  /// stores.
  void set_pressure_listener(std::function<void()> listener);
  /// The chunk that should step down its ladder next, pinned; the caller unpins it. kNotFound: there is room enough;
  /// kRefused: nothing may step down, or it is better that something leaves; kBusy: the chunk is in use.
  Result<DemotionOrder> next_demotion();
  /// The containers in the ticket (begin_load()) take the place of those of the order's chunk, in one step: whoever
  /// looks it up from now on gets the new ones, whoever holds it keeps the old ones until unpin(). kNotFound when the
  /// chunk has gone meanwhile. What lower tiers have is better, and stays.
  Status replace(const WriteTicket& ticket, const DemotionOrder& order, std::span<const LoadedShard> shards);
  /// The chunk cannot take this step and is not asked to take one again.
  void exempt_from_demotion(const DemotionOrder& order);
  /// Complete chunks by form.
  std::vector<StoredFormStats> forms() const;
  /// Those that have quotas.
  std::vector<TenantStats> tenants() const;

  /// The slab's memory cannot be had from this offset on, after all: the store is that much smaller from now on.
  void cut_off(std::uint64_t offset);

  void set_removal_listener(RemovalListener listener);
  ChunkStoreStats stats() const;
  /// Keys of all complete chunks with their block hashes (the snapshot for KV events, kvernctl inspect).
  struct ChunkSummary {
    ChunkKey key;
    std::vector<BlockHash> blocks;
    std::uint32_t tokens = 0;
    std::uint64_t encoded_bytes = 0, raw_bytes = 0;
    std::string codec_spec;
    std::uint32_t shards = 0;
  };
  std::vector<ChunkSummary> snapshot(const NamespaceSet& namespaces, std::size_t limit) const;
  std::optional<ChunkSummary> describe(const NamespaceId& namespace_id, std::uint16_t group,
                                       const BlockHash& block) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvern
