#include "store/chunk_store.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "store/chunk_record.h"
#include "store/chunk_tree.h"
#include "store/container_map.h"
#include "store/demotion.h"
#include "store/piecewise_vector.h"
#include "store/quota.h"
#include "store/retention.h"

namespace kvern {
namespace {

// Victims of one eviction round. They share one look at the hazards; more would be missed by readers for nothing when
// somebody holds them.
constexpr std::size_t kEvictionBatch = 32;
// Chunk numbers that flush() and snapshot(), and blocks that retain() look at before they let others have the lock.
constexpr std::uint32_t kScanBatch = 256;
// Victims that unsaved_victims() looks at in one call, with the lock held.
constexpr std::size_t kVictimScan = 512;
// Steps that next_demotion() looks at in one call.
constexpr int kDemotionTries = 8;
// Namespaces whose terms are known; beyond it those go that have no chunks.
constexpr std::size_t kMaxTerms = 8192;
// Chunks before a retained one that are retained with it: a prompt of a million tokens in chunks of 32.
constexpr std::size_t kMaxRetainedDepth = 1U << 15;
// Keeps chunk numbers, also one past the last, within 32 bits.
constexpr std::uint32_t kMaxChunkCapacity = 1U << 30;

}  // namespace

Status ChunkStoreConfig::validate() const {
  if (slab_bytes < Slab::kAlignment) return {Code::kInvalid, "slab_bytes must be at least 4096"};
  if (chunk_capacity == 0 || chunk_capacity > kMaxChunkCapacity) {
    return {Code::kInvalid, "chunk_capacity must be between 1 and " + std::to_string(kMaxChunkCapacity)};
  }
  if (index_slots < 4 || (index_slots & (index_slots - 1)) != 0) {
    return {Code::kInvalid, "index_slots must be a power of two, at least 4"};
  }
  if (demotion_free_bytes >= slab_bytes) return {Code::kInvalid, "demotion_free_bytes must be less than slab_bytes"};
  if (!(retain_share >= 0 && retain_share <= 1)) return {Code::kInvalid, "retain_share must be 0 to 1"};
  if (incomplete_ttl_ns <= 0) return {Code::kInvalid, "incomplete_ttl_ns must be above 0"};
  return Status::ok();
}

struct ChunkStore::State {
  struct Ticket {
    ChunkKey key;
    ShardRange range;
    Extent extent;
    const std::string* charged_to = nullptr;  // the tenant whose quota the extent counts against
  };
  struct Load {
    Extent extent;
    const std::string* charged_to = nullptr;
  };
  struct Tenant {
    std::unique_ptr<EvictionPolicy> policy;  // of its chunks alone
    std::uint64_t refused = 0;
  };
  using TicketMap = std::unordered_map<std::uint64_t, Ticket>;

  /// What is known of a key before its chunk is complete; kept while it has a ticket or a chunk. A ticket also keeps
  /// the chunk from being dropped.
  struct Pending {
    std::vector<std::uint64_t> tickets;
    std::optional<std::uint32_t> chunk;  // the record with the shards that have come
    std::int64_t last_shard_ns = 0;      // when the last of them did
  };

  /// A handle that holds a chunk, and the form in which it does.
  struct Pin {
    std::uint32_t chunk = 0;
    std::uint8_t form = 0;
  };
  /// Containers that others took the place of and that somebody still reads.
  struct FormerContainers {
    std::uint32_t chunk = 0;
    std::uint8_t form = 0;
    std::uint32_t pins = 0;
    ShardList shards;
  };
  struct Terms {
    StorageTerms storage;
    std::size_t ladder = 0;          ///< its number in demotion
    std::vector<std::string> specs;  ///< of its rungs, as containers say it
  };

  struct OfForm {
    std::uint64_t chunks = 0, bytes = 0;
  };

  struct Removal {
    ChunkKey key;
    std::vector<BlockHash> blocks;
    std::string_view reason;
  };

  /// Holds the lock; tells the listener of removals after it has let go of it.
  class Session {
   public:
    explicit Session(State& state) : state_(state), lock_(state.mutex) {}
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() {
      const auto removals = std::exchange(state_.removals, {});
      const auto listener = state_.listener;
      const bool pressed = std::exchange(state_.pressed, false);
      lock_.unlock();
      if (pressed && state_.pressure_listener) state_.pressure_listener();
      if (!listener) return;
      for (const auto& removal : removals) (*listener)(removal.key, removal.blocks, removal.reason);
    }

   private:
    State& state_;
    std::unique_lock<std::mutex> lock_;
  };

  State(const ChunkStoreConfig& store_config, std::span<std::byte> slab_bytes, std::span<std::byte> index_bytes,
        std::unique_ptr<EvictionPolicy> eviction_policy, HazardProbe hazard_probe, const Clock& store_clock,
        std::span<std::byte> map_bytes);

  // Looking up. None of these changes anything.
  bool holds(std::uint32_t chunk, std::size_t block, const NamespaceId& namespace_id, std::uint16_t group,
             const BlockHash& hash) const;
  std::optional<std::uint32_t> find_live(const NamespaceId& namespace_id, std::uint16_t group,
                                         const BlockHash& hash) const;
  std::optional<std::uint32_t> find_readable(const NamespaceId& namespace_id, std::uint16_t group,
                                             const BlockHash& hash) const;
  std::optional<std::uint32_t> find_same_start(const ContainerInfo& info) const;
  bool is_covered(const ContainerInfo& info) const;
  bool is_in_flight(const Pending& entry, const ShardRange& range) const;
  bool is_listed(std::uint32_t chunk, const NamespaceSet& namespaces) const;
  ChunkSummary summarize(const ChunkRecord& record) const;
  static std::vector<StoredShard> shards_of(const ChunkRecord& record);

  // Leaving.
  void unmap(const ChunkRecord& leaving);
  void list_claimed();
  void take_out_of_index(std::uint32_t chunk, std::string_view reason);
  void release(std::uint32_t chunk);
  std::uint64_t retire(std::span<const std::uint32_t> candidates, std::string_view reason);
  void drop_when_unheld(std::uint32_t chunk, ChunkState state, std::string_view reason);
  void drop_if_damaged(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& block);
  FlushedChunks flush(std::span<const std::uint32_t> live);
  void free_unheld();
  void drop_shards(std::uint32_t chunk);
  void drop_incomplete(const NamespaceSet& namespaces, std::int64_t shards_before_ns);
  template <typename Enough>
  bool evict_until(std::uint64_t bytes, Enough enough) {
    return evict_until(*policy, bytes, enough);
  }
  template <typename Enough>
  bool evict_until(EvictionPolicy& order, std::uint64_t bytes, Enough enough);
  template <typename Enough>
  bool evict_retained(const EvictionPolicy& order, Enough enough);

  // Retention.
  bool retain(std::uint32_t chunk, std::int64_t until_ns);
  void stop_retaining(std::uint32_t chunk);
  void let_expire();

  // Quotas.
  const std::string* limited_tenant(const NamespaceId& namespace_id) const;
  EvictionPolicy* policy_of_tenant(std::uint32_t chunk);
  Status charge(const std::string* tenant, std::uint64_t bytes);
  void refund(const std::string* tenant, std::uint64_t bytes);
  void charge_chunk(ChunkRecord& chunk, std::uint64_t added_bytes);
  template <typename Tell>
  void tell_policies(std::uint32_t chunk, Tell tell);

  // Coming.
  void close_ticket(TicketMap::iterator ticket);
  Result<bool> add_shard(const Ticket& ticket, const ContainerInfo& info, std::size_t container_bytes);
  std::optional<std::uint32_t> new_record(const ContainerInfo& info, const std::uint8_t* names);
  void note_order(std::uint32_t parent, std::uint32_t chunk);
  /// As the map of a warm restart has it: units of 67 ms, for nine years after the host's start.
  std::uint32_t use_time() const { return static_cast<std::uint32_t>(clock.now_ns() >> 26); }
  void use(std::uint32_t chunk, std::uint32_t at);
  bool enter_index(std::uint32_t chunk, const ContainerInfo& info);
  Result<bool> add_whole_shard(const Extent& extent, const ContainerInfo& info, std::size_t container_bytes);
  std::vector<LoadedShard> find_containers();
  void take_over(std::vector<LoadedShard> containers);
  Result<std::vector<Extent>> cut(Extent object, std::span<const LoadedShard> shards);
  void count_form(const ChunkRecord& chunk, bool enters);

  // The ladder.
  bool is_too_weak(const NamespaceId& namespace_id, const std::string& codec_spec) const;
  std::size_t ladder_number(const Ladder& ladder);
  void enroll(std::uint32_t chunk);

  ChunkRecord& record(std::uint32_t chunk) { return records[chunk]; }
  const ChunkRecord& record(std::uint32_t chunk) const { return records[chunk]; }
  bool is_live(std::uint32_t chunk) const {
    return chunk < records.size() && records[chunk].family != nullptr && records[chunk].state == ChunkState::kLive;
  }

  const ChunkStoreConfig config;
  const std::span<std::byte> slab_memory;
  const HazardProbe hazards;
  const Clock& clock;
  const std::unique_ptr<EvictionPolicy> policy;

  mutable std::mutex mutex;  // guards all that follows
  ChunkStoreStats counters;  // what is not derived from the rest
  std::map<std::string, OfForm> by_form;
  std::optional<ContainerMap> map;
  std::vector<LoadedShard> found;  // what an earlier store left, until it is taken over
  Slab slab;
  BlockIndexWriter index;
  FamilyTable families;
  PiecewiseVector<ChunkRecord> records;  // by chunk number, up to the largest that was ever in use
  std::vector<std::uint32_t> spare_numbers;
  TicketMap tickets;
  std::unordered_map<ChunkKey, Pending> pending;
  std::unordered_map<std::uint64_t, Pin> pins;
  std::vector<FormerContainers> former;
  std::vector<std::uint32_t> held;  // superseded and quarantined chunks that wait until nobody holds them
  std::unordered_set<std::uint32_t> claimed;
  std::vector<Removal> removals;
  std::shared_ptr<const RemovalListener> listener;
  std::function<void()> pressure_listener;
  bool pressed = false;
  std::unordered_map<std::uint64_t, Load> loads;
  Retention retention;  // of live chunks
  TenantQuotas quotas;
  std::map<std::string, Tenant> tenants;         // that have a quota; never erased
  std::unordered_map<NamespaceId, Terms> terms;  // those that are not the default
  std::optional<Demotion> demotion;              // once there is a ladder; knows all live chunks then
  std::size_t no_ladder = 0;                     // number of the ladder of those that stay as they are
  std::uint64_t next_id = 1;
};

namespace {

std::vector<Extent> extents_of(std::span<const LoadedShard> containers) {
  std::vector<Extent> extents;
  extents.reserve(containers.size());
  for (const LoadedShard& each : containers) extents.push_back({each.offset, each.bytes});
  return extents;
}

}  // namespace

ChunkStore::State::State(const ChunkStoreConfig& store_config, std::span<std::byte> slab_bytes,
                         std::span<std::byte> index_bytes, std::unique_ptr<EvictionPolicy> eviction_policy,
                         HazardProbe hazard_probe, const Clock& store_clock, std::span<std::byte> map_bytes)
    : config(store_config),
      slab_memory(slab_bytes),
      hazards(std::move(hazard_probe)),
      clock(store_clock),
      policy(std::move(eviction_policy)),
      map(map_bytes.empty() ? std::nullopt : std::make_optional<ContainerMap>(map_bytes, store_config.slab_bytes)),
      found(find_containers()),
      slab(store_config.slab_bytes, extents_of(found)),
      index(index_bytes, {.chunk_capacity = store_config.chunk_capacity,
                          .slot_count = store_config.index_slots,
                          .generation = store_config.generation}) {
  spare_numbers.reserve(config.chunk_capacity);
  for (std::uint32_t chunk = config.chunk_capacity; chunk-- > 0;) spare_numbers.push_back(chunk);
  take_over(std::exchange(found, {}));
}

// The containers that the map names and whose headers are good, in the order of their offsets and without overlap.
std::vector<LoadedShard> ChunkStore::State::find_containers() {
  std::vector<LoadedShard> containers;
  if (!map || !map->adopted()) return containers;
  std::uint64_t end = 0;
  for (const std::uint64_t offset : map->offsets()) {
    auto reader = offset >= end && offset < config.slab_bytes
                      ? ContainerReader::parse(slab_memory.first(config.slab_bytes).subspan(offset))
                      : failure(Code::kCorrupt, "it lies within another container, or outside of the slab");
    if (!reader || !check_container_info(reader->info())) {
      map->clear(offset);
      ++counters.dropped_containers;
      continue;
    }
    containers.push_back({reader->info(), offset, reader->size_bytes()});
    end = offset + padded_bytes(reader->size_bytes());
  }
  return containers;
}

// Extents of all of them are in use in the slab. A process that ended while it replaced the containers of a chunk left
// some of both forms, but all of one: each form is tried by itself. The policy sees the chunks in the order of their
// last use and, of those that were used together, the end of a prompt before its start, as match() shows them.
void ChunkStore::State::take_over(std::vector<LoadedShard> containers) {
  const auto form_of = [](const LoadedShard& each) {
    const auto hash = each.info.key.last_block.bytes();
    return std::tuple(each.info.key.namespace_id, each.info.key.group,
                      std::string_view(reinterpret_cast<const char*>(hash.data()), hash.size()),
                      std::string_view(each.info.codec_spec));
  };
  std::ranges::stable_sort(containers, {}, form_of);
  struct Form {
    std::span<const LoadedShard> containers;
    std::uint32_t last_use = 0;
  };
  std::vector<Form> forms;
  for (std::size_t begin = 0, end = 0; begin < containers.size(); begin = end) {
    Form form;
    while (end < containers.size() && form_of(containers[end]) == form_of(containers[begin])) {
      form.last_use = std::max(form.last_use, map->last_use(containers[end++].offset));
    }
    form.containers = std::span(containers).subspan(begin, end - begin);
    forms.push_back(form);
  }
  std::ranges::stable_sort(
      forms, {}, [](const Form& form) { return std::pair(form.last_use, ~form.containers.front().info.position); });
  for (const Form& form : forms) {
    for (const LoadedShard& each : form.containers) {
      if (is_covered(each.info)) {
        slab.release({each.offset, each.bytes});
        map->clear(each.offset);
      } else if (!add_whole_shard({each.offset, each.bytes}, each.info, each.bytes)) {
        map->clear(each.offset);
        ++counters.dropped_containers;
      }
    }
    for (const LoadedShard& each : form.containers) map->touch(each.offset, form.last_use);  // being found is no use
    counters.dropped_containers += counters.incomplete_chunks;
    drop_incomplete(NamespaceSet::all(), std::numeric_limits<std::int64_t>::max());
  }
  counters.recovered_chunks = counters.chunks;
  counters.recovered_bytes = counters.encoded_bytes;
}

bool ChunkStore::State::holds(std::uint32_t chunk, std::size_t block, const NamespaceId& namespace_id,
                              std::uint16_t group, const BlockHash& hash) const {
  return is_live(chunk) && record(chunk).belongs_to(namespace_id, group) && record(chunk).has_block(block, hash);
}

std::optional<std::uint32_t> ChunkStore::State::find_live(const NamespaceId& namespace_id, std::uint16_t group,
                                                          const BlockHash& hash) const {
  const auto hit = index.find(block_fingerprint(namespace_id, group, hash.bytes()));
  if (!hit || !holds(hit->chunk, hit->block_in_chunk, namespace_id, group, hash)) return std::nullopt;
  return hit->chunk;
}

// Somebody may have claimed a chunk that was flushed since, or superseded by one that is gone already.
std::optional<std::uint32_t> ChunkStore::State::find_readable(const NamespaceId& namespace_id, std::uint16_t group,
                                                              const BlockHash& hash) const {
  if (const auto chunk = find_live(namespace_id, group, hash)) return chunk;
  for (const auto chunk : held) {
    const ChunkRecord& candidate = record(chunk);
    if (candidate.state != ChunkState::kLeaving || !candidate.belongs_to(namespace_id, group)) continue;
    for (std::size_t block = 0; block < candidate.blocks; ++block) {
      if (candidate.has_block(block, hash)) return chunk;
    }
  }
  return std::nullopt;
}

// The live chunk of the same grid cell, shorter or longer or equal.
std::optional<std::uint32_t> ChunkStore::State::find_same_start(const ContainerInfo& info) const {
  const auto chunk = find_live(info.key.namespace_id, info.key.group, info.block_hashes.front());
  if (!chunk || !record(*chunk).shares_start_with(info)) return std::nullopt;
  return chunk;
}

bool ChunkStore::State::is_covered(const ContainerInfo& info) const {
  const auto chunk = find_same_start(info);
  return chunk && record(*chunk).blocks >= info.block_hashes.size();
}

bool ChunkStore::State::is_in_flight(const Pending& entry, const ShardRange& range) const {
  return std::ranges::any_of(entry.tickets, [&](std::uint64_t id) { return tickets.at(id).range == range; });
}

// A live chunk of one of the namespaces.
bool ChunkStore::State::is_listed(std::uint32_t chunk, const NamespaceSet& namespaces) const {
  return is_live(chunk) && namespaces.contains(record(chunk).family->namespace_id);
}

ChunkStore::ChunkSummary ChunkStore::State::summarize(const ChunkRecord& chunk) const {
  return {.key = chunk.key(),
          .blocks = chunk.block_hashes(),
          .tokens = chunk.tokens(),
          .encoded_bytes = chunk.encoded_bytes(),
          .raw_bytes = chunk.raw_bytes(),
          .codec_spec = chunk.family->codec_spec,
          .shards = static_cast<std::uint32_t>(chunk.shards.size())};
}

std::vector<StoredShard> ChunkStore::State::shards_of(const ChunkRecord& chunk) {
  std::vector<StoredShard> shards;
  shards.reserve(chunk.shards.size());
  for (const auto& shard : chunk.shards) {
    shards.push_back(
        {shard.extent, shard.range.layer_begin, shard.range.layers, shard.range.head_begin, shard.range.heads});
  }
  return shards;
}

// A restart must not find it any more.
void ChunkStore::State::unmap(const ChunkRecord& leaving) {
  if (!map) return;
  for (const auto& shard : leaving.shards) map->clear(shard.extent.offset);
}

// Only what was retired before the call is safe to free after it.
void ChunkStore::State::list_claimed() {
  claimed.clear();
  if (hazards) hazards(claimed);
}

void ChunkStore::State::take_out_of_index(std::uint32_t chunk, std::string_view reason) {
  const ChunkRecord& leaving = record(chunk);
  unmap(leaving);
  for (std::size_t block = 0; block < leaving.blocks; ++block) index.erase(leaving.fingerprint(block), chunk);
  tell_policies(chunk, [&](EvictionPolicy& each) { each.erased(chunk); });
  retention.remove(chunk);
  if (demotion) demotion->left(chunk);
  --counters.chunks;
  count_form(leaving, false);
  if (listener) removals.push_back({leaving.key(), leaving.block_hashes(), reason});
}

// The chunk is in the index no more, and nobody holds it.
void ChunkStore::State::release(std::uint32_t chunk) {
  const ChunkRecord& leaving = record(chunk);
  unmap(leaving);
  for (const auto& shard : leaving.shards) slab.release(shard.extent);
  if (leaving.charged) refund(limited_tenant(leaving.family->namespace_id), leaving.encoded_bytes());
  counters.encoded_bytes -= leaving.encoded_bytes();
  counters.raw_bytes -= leaving.raw_bytes();
  families.release(leaving.family);
  records[chunk] = {};
  spare_numbers.push_back(chunk);
}

// Frees those of the live, unpinned candidates that nobody claims; returns their encoded bytes.
std::uint64_t ChunkStore::State::retire(std::span<const std::uint32_t> candidates, std::string_view reason) {
  if (candidates.empty()) return 0;
  for (const auto chunk : candidates) index.begin_retire(chunk);
  list_claimed();
  std::uint64_t bytes = 0;
  for (const auto chunk : candidates) {
    if (claimed.contains(chunk)) {
      index.cancel_retire(chunk);
      tell_policies(chunk, [&](EvictionPolicy& each) { each.skipped(chunk); });
      continue;
    }
    bytes += record(chunk).encoded_bytes();
    take_out_of_index(chunk, reason);
    index.finish_retire(chunk);
    release(chunk);
  }
  return bytes;
}

// Takes a live chunk out of the index for good, whoever holds it.
void ChunkStore::State::drop_when_unheld(std::uint32_t chunk, ChunkState state, std::string_view reason) {
  index.begin_retire(chunk);
  take_out_of_index(chunk, reason);
  record(chunk).state = state;
  held.push_back(chunk);
  free_unheld();
}

// The index names a chunk for the block that does not say so. Either its names were damaged in the slab: then it leaves
// like one that fails its checksums. Or such a chunk has left, its slots in the index could not be found by its names,
// and another has its number now: then the slot goes.
void ChunkStore::State::drop_if_damaged(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& block) {
  const std::uint64_t fingerprint = block_fingerprint(namespace_id, group, block.bytes());
  const auto hit = index.find(fingerprint);
  if (!hit || !is_live(hit->chunk)) return;
  const ChunkRecord& named = record(hit->chunk);
  const bool is_another_block =
      hit->block_in_chunk < named.blocks && named.fingerprint(hit->block_in_chunk) == fingerprint;
  if (is_another_block) return;
  index.erase(fingerprint, hit->chunk);
  const Extent& first = named.shards.begin()->extent;
  const auto container = ContainerReader::parse(slab_memory.subspan(first.offset, first.bytes));
  if (container && container->info().key == named.key()) return;
  ++counters.quarantined_chunks;
  drop_when_unheld(hit->chunk, ChunkState::kQuarantined, "quarantined");
  if (listener) removals.back().blocks.clear();  // those of the chunk that are damaged say nothing of what has gone
}

// Takes all of them out of the index, and frees those that nobody holds.
FlushedChunks ChunkStore::State::flush(std::span<const std::uint32_t> live) {
  FlushedChunks flushed;
  for (const auto chunk : live) index.begin_retire(chunk);
  list_claimed();
  for (const auto chunk : live) {
    ++flushed.chunks;
    flushed.bytes += record(chunk).encoded_bytes();
    take_out_of_index(chunk, "flushed");
    if (record(chunk).pins == 0 && !claimed.contains(chunk)) {
      index.finish_retire(chunk);
      release(chunk);
      continue;
    }
    ++flushed.held;
    record(chunk).state = ChunkState::kLeaving;
    held.push_back(chunk);
  }
  return flushed;
}

void ChunkStore::State::free_unheld() {
  if (held.empty()) return;
  list_claimed();
  std::erase_if(held, [this](std::uint32_t chunk) {
    if (record(chunk).pins > 0 || claimed.contains(chunk)) return false;
    index.finish_retire(chunk);
    release(chunk);
    return true;
  });
}

void ChunkStore::State::drop_shards(std::uint32_t chunk) {
  release(chunk);
  --counters.incomplete_chunks;
}

void ChunkStore::State::drop_incomplete(const NamespaceSet& namespaces, std::int64_t shards_before_ns) {
  std::erase_if(pending, [&](const auto& item) {
    const auto& [key, entry] = item;
    // Without a chunk it is that of a shard that is being added: making room for its number has come here.
    if (!entry.chunk || !entry.tickets.empty() || !namespaces.contains(key.namespace_id)) return false;
    if (entry.last_shard_ns > shards_before_ns) return false;
    drop_shards(*entry.chunk);
    return true;
  });
}

// Evicts until enough() holds; false when nothing is left that could go. Each round takes about as many victims as make
// up the bytes, and looks at every chunk at most once. What is retained goes last.
template <typename Enough>
bool ChunkStore::State::evict_until(EvictionPolicy& order, std::uint64_t bytes, Enough enough) {
  if (enough()) return true;
  free_unheld();
  drop_incomplete(NamespaceSet::all(), clock.now_ns() - config.incomplete_ttl_ns);
  let_expire();
  std::vector<std::uint32_t> candidates;
  std::uint64_t left = std::min<std::uint64_t>(order.tree().size(), counters.chunks - retention.size());
  while (!enough()) {
    candidates.clear();
    std::uint64_t candidate_bytes = 0;
    const std::uint64_t left_before = left;
    for (const auto chunk : order.victims(std::min<std::uint64_t>(kEvictionBatch, left))) {
      if (!candidates.empty() && candidate_bytes >= bytes) break;
      --left;
      if (record(chunk).pins > 0) {
        tell_policies(chunk, [&](EvictionPolicy& each) { each.skipped(chunk); });
        break;  // what it is reached through is next in the list, and must not leave before it
      }
      candidates.push_back(chunk);
      candidate_bytes += record(chunk).encoded_bytes();
    }
    if (left == left_before) return evict_retained(order, enough);
    const std::uint64_t chunks_before = counters.chunks;
    counters.evicted_bytes += retire(candidates, "evicted");
    counters.evicted_chunks += chunks_before - counters.chunks;
  }
  return true;
}

// All that the order names is in use. Nothing is pinned by being retained.
template <typename Enough>
bool ChunkStore::State::evict_retained(const EvictionPolicy& order, Enough enough) {
  for (const std::uint32_t chunk : retention.all()) {
    const ChunkTree& tree = order.tree();
    if (!tree.contains(chunk) || tree.children(chunk) > 0 || record(chunk).pins > 0) continue;
    const std::uint64_t chunks_before = counters.chunks;
    counters.evicted_bytes += retire({&chunk, 1}, "evicted");
    counters.evicted_chunks += chunks_before - counters.chunks;
    if (enough()) return true;
  }
  return false;
}

// The chunk and all that it is reached through. False, with nothing changed, when its tenant may not have so much.
bool ChunkStore::State::retain(std::uint32_t chunk, std::int64_t until_ns) {
  std::uint32_t tenant = 0;
  const NamespaceId& namespace_id = record(chunk).family->namespace_id;
  static_assert(sizeof tenant == NamespaceId::kTenantBytes);
  std::memcpy(&tenant, namespace_id.bytes.data(), sizeof tenant);
  std::vector<std::uint32_t> chain;
  std::uint64_t more_bytes = 0;
  for (std::uint32_t each = chunk; each != kNoChunk; each = policy->tree().parent(each)) {
    const Retention::Wish* const known = retention.find(each);
    if (known != nullptr && known->until_ns >= until_ns) break;
    if (chain.size() == kMaxRetainedDepth) return false;
    more_bytes += known == nullptr ? record(each).encoded_bytes() : 0;
    chain.push_back(each);
  }
  std::uint64_t of_bytes = slab.capacity_bytes();
  if (const std::string* const limited = limited_tenant(namespace_id)) {
    of_bytes = std::min(of_bytes, quotas.limit(*limited));
  }
  const double most_bytes = config.retain_share * static_cast<double>(of_bytes);
  if (static_cast<double>(retention.bytes_of(tenant) + more_bytes) > most_bytes) return false;
  for (const std::uint32_t each : chain) {
    const ChunkRecord& kept = record(each);
    retention.put(each, {until_ns, kept.position, kept.encoded_bytes(), tenant});
    tell_policies(each, [&](EvictionPolicy& order) { order.withhold(each, true); });
  }
  return true;
}

void ChunkStore::State::stop_retaining(std::uint32_t chunk) {
  retention.remove(chunk);
  tell_policies(chunk, [&](EvictionPolicy& each) { each.withhold(chunk, false); });
}

void ChunkStore::State::let_expire() {
  const std::int64_t now_ns = clock.now_ns();
  for (auto chunk = retention.first(); chunk && retention.find(*chunk)->until_ns <= now_ns; chunk = retention.first()) {
    stop_retaining(*chunk);
  }
}

void ChunkStore::State::close_ticket(TicketMap::iterator ticket) {
  refund(ticket->second.charged_to, ticket->second.extent.bytes);
  const auto entry = pending.find(ticket->second.key);
  std::erase(entry->second.tickets, ticket->first);
  if (entry->second.tickets.empty() && !entry->second.chunk) pending.erase(entry);
  tickets.erase(ticket);
}

// Turns an open ticket, whose bytes are written, into a shard; see publish(). The extent is freed unless it was used.
Result<bool> ChunkStore::State::add_shard(const Ticket& ticket, const ContainerInfo& info,
                                          std::size_t container_bytes) {
  const auto give_up = [&](Code code, std::string message) {
    slab.release(ticket.extent);
    return failure(code, std::move(message));
  };
  if (const auto status = check_container_info(info); !status) return give_up(status.code(), status.message());
  if (!(info.key == ticket.key) || ShardRange::of(info.shape) != ticket.range) {
    return give_up(Code::kInvalid, "the container is not the one that the ticket was given for");
  }
  if (container_bytes == 0 || container_bytes > ticket.extent.bytes) {
    return give_up(Code::kInvalid,
                   "a container of " + std::to_string(container_bytes) + " bytes does not fit the ticket");
  }
  const std::uint8_t* const names =
      find_block_names(slab_memory.subspan(ticket.extent.offset, container_bytes), info.codec_spec, info.block_hashes);
  if (names == nullptr) return give_up(Code::kInvalid, "the container does not name its blocks where it should");
  Pending& entry = pending.at(ticket.key);
  if (is_covered(info)) {
    slab.release(ticket.extent);
    if (entry.chunk) drop_shards(*std::exchange(entry.chunk, std::nullopt));
    return true;
  }
  if (entry.chunk) {
    const ChunkRecord& others = record(*entry.chunk);
    if (const auto status = others.check_same_chunk(info); !status) return give_up(status.code(), status.message());
    if (others.shards.size() >= kMaxShardsPerChunk) return give_up(Code::kRefused, "the chunk has too many shards");
    if (others.covers(ticket.range)) {
      slab.release(ticket.extent);
      return false;
    }
  } else {
    entry.chunk = new_record(info, names);
    if (!entry.chunk) return give_up(Code::kBusy, "no chunk number is free: what is stored is in use");
    ++counters.incomplete_chunks;
  }
  const std::uint32_t chunk = *entry.chunk;
  ChunkRecord& whole = record(chunk);
  const Extent extent = slab.shrink(ticket.extent, container_bytes);
  // Lower tiers take whole pages; what is left of another chunk must not go with them.
  std::ranges::fill(
      slab_memory.subspan(extent.offset + container_bytes, padded_bytes(container_bytes) - container_bytes),
      std::byte{0});
  whole.shards.push_back({extent, ticket.range, info.shape.raw_bytes()});
  whole.lossy_generations = std::max(
      whole.lossy_generations, static_cast<std::uint8_t>(std::min<std::uint32_t>(info.lossy_generations, UINT8_MAX)));
  entry.last_shard_ns = clock.now_ns();
  charge_chunk(whole, container_bytes);
  counters.encoded_bytes += container_bytes;
  counters.raw_bytes += info.shape.raw_bytes();
  if (!whole.is_complete()) return false;
  if (!enter_index(chunk, info)) {
    drop_shards(chunk);
    entry.chunk.reset();
    return failure(Code::kBusy, "the index is full: what is stored is in use");
  }
  entry.chunk.reset();
  --counters.incomplete_chunks;
  return true;
}

// A shard that was not announced by begin_write(). The extent is freed unless it was used.
Result<bool> ChunkStore::State::add_whole_shard(const Extent& extent, const ContainerInfo& info,
                                                std::size_t container_bytes) {
  pending.try_emplace(info.key);
  auto outcome = add_shard({info.key, ShardRange::of(info.shape), extent}, info, container_bytes);
  const auto entry = pending.find(info.key);
  if (entry->second.tickets.empty() && !entry->second.chunk) pending.erase(entry);
  return outcome;
}

// Extents of the containers that lie behind one another in the object; what is left of it is freed. kCorrupt, with all
// of it freed, when they do not.
Result<std::vector<Extent>> ChunkStore::State::cut(Extent object, std::span<const LoadedShard> shards) {
  std::uint64_t end = 0;
  for (const LoadedShard& shard : shards) {
    if (shard.offset != end || shard.bytes == 0 || padded_bytes(shard.bytes) > object.bytes - end) {
      slab.release(object);
      return failure(Code::kCorrupt, "the containers do not lie behind one another in the object");
    }
    end += padded_bytes(shard.bytes);
  }
  std::vector<Extent> extents;
  extents.reserve(shards.size());
  for (const LoadedShard& shard : shards) {
    const std::uint64_t room = padded_bytes(shard.bytes);
    Extent mine = object;
    object.bytes -= room;
    if (object.bytes > 0) std::tie(mine, object) = slab.split(mine, room);
    extents.push_back(mine);
  }
  if (object.bytes > 0) slab.release(object);
  return extents;
}

// Of a complete chunk that enters or leaves the index, or changes its form there.
void ChunkStore::State::count_form(const ChunkRecord& chunk, bool enters) {
  const std::uint64_t sign = enters ? 1 : -1ULL;
  auto& generations = counters.of_lossy_generations;
  generations[std::min<std::size_t>(chunk.lossy_generations, generations.size() - 1)] += sign;
  OfForm& form = by_form[chunk.family->codec_spec];
  form.chunks += sign;
  form.bytes += sign * chunk.encoded_bytes();
  if (form.chunks == 0) by_form.erase(chunk.family->codec_spec);
}

bool ChunkStore::State::is_too_weak(const NamespaceId& namespace_id, const std::string& codec_spec) const {
  const auto known = terms.find(namespace_id);
  if (known == terms.end()) return false;
  const double floor = known->second.storage.max_relative_error;
  return floor < 1 && !(known_error(codec_spec).value_or(1) <= floor);
}

// Null for those without a quota. Stays valid.
const std::string* ChunkStore::State::limited_tenant(const NamespaceId& namespace_id) const {
  if (tenants.empty()) return nullptr;
  const auto known = terms.find(namespace_id);
  if (known == terms.end() || known->second.storage.tenant_bytes == 0) return nullptr;
  return &tenants.find(known->second.storage.tenant)->first;
}

// Room within the quota, for which the tenant's own chunks leave.
Status ChunkStore::State::charge(const std::string* tenant, std::uint64_t bytes) {
  if (tenant == nullptr) return Status::ok();
  Tenant& of = tenants.at(*tenant);
  const std::uint64_t limit = quotas.limit(*tenant);
  if (bytes > limit) {
    ++of.refused;
    return {Code::kRefused, "tenant " + *tenant + " may hold " + std::to_string(limit) + " bytes; a container of " +
                                std::to_string(bytes) + " never fits"};
  }
  const auto is_within = [&] { return quotas.over(*tenant, bytes) == 0; };
  if (!evict_until(*of.policy, quotas.over(*tenant, bytes), is_within)) {
    ++of.refused;
    return {Code::kBusy, "tenant " + *tenant + " holds " + std::to_string(quotas.used(*tenant)) + " of " +
                             std::to_string(limit) + " bytes, which are in use: " + std::to_string(bytes) +
                             " more do not fit"};
  }
  return quotas.charge(*tenant, bytes);
}

void ChunkStore::State::refund(const std::string* tenant, std::uint64_t bytes) {
  if (tenant != nullptr) quotas.refund(*tenant, bytes);
}

// added_bytes: those of them that are new.
void ChunkStore::State::charge_chunk(ChunkRecord& chunk, std::uint64_t added_bytes) {
  const std::string* const tenant = limited_tenant(chunk.family->namespace_id);
  if (tenant == nullptr) return;
  quotas.add(*tenant, chunk.charged ? added_bytes : chunk.encoded_bytes());
  chunk.charged = true;
}

EvictionPolicy* ChunkStore::State::policy_of_tenant(std::uint32_t chunk) {
  const std::string* const tenant = limited_tenant(record(chunk).family->namespace_id);
  return tenant == nullptr ? nullptr : tenants.at(*tenant).policy.get();
}

template <typename Tell>
void ChunkStore::State::tell_policies(std::uint32_t chunk, Tell tell) {
  tell(*policy);
  if (EvictionPolicy* const own = policy_of_tenant(chunk)) tell(*own);
}

// Namespaces with the same rungs share a ladder.
std::size_t ChunkStore::State::ladder_number(const Ladder& ladder) {
  for (const auto& [id, known] : terms) {
    const auto& other = known.storage.ladder;
    if (other && other->name() == ladder.name() && other->rungs().size() == ladder.rungs().size()) return known.ladder;
  }
  return demotion->add_ladder(ladder);
}

// The demotion knows the chunk from now on.
void ChunkStore::State::enroll(std::uint32_t chunk) {
  if (!demotion) return;
  const ChunkRecord& each = record(chunk);
  if (const auto known = terms.find(each.family->namespace_id); known != terms.end()) {
    const auto& specs = known->second.specs;
    const auto rung = std::ranges::find(specs, each.family->codec_spec);
    if (rung != specs.end() && specs.size() > 1) {
      const auto number = static_cast<std::uint8_t>(rung - specs.begin());
      return demotion->entered(chunk, known->second.ladder, {number, each.lossy_generations},
                               static_cast<double>(each.raw_bytes()));
    }
  }
  demotion->entered(chunk, no_ladder, {}, static_cast<double>(each.encoded_bytes()));
}

std::optional<std::uint32_t> ChunkStore::State::new_record(const ContainerInfo& info, const std::uint8_t* names) {
  if (!evict_until(0, [this] { return !spare_numbers.empty(); })) return std::nullopt;
  const std::uint32_t chunk = spare_numbers.back();
  spare_numbers.pop_back();
  records.grow(chunk + std::size_t{1});
  ChunkRecord& fresh = records[chunk];
  fresh.family = families.acquire(
      {info.key.namespace_id, info.key.group, info.block_tokens, info.group_layers, info.model_heads, info.codec_spec});
  fresh.names = names;
  fresh.position = info.position;
  fresh.previous_tag = info.previous_tag;
  fresh.blocks = static_cast<std::uint16_t>(info.block_hashes.size());
  fresh.hash_bytes = static_cast<std::uint8_t>(info.block_hashes.front().size());
  return chunk;
}

// A caller may name neighbours that are none; those that stand in no order cannot be.
void ChunkStore::State::note_order(std::uint32_t parent, std::uint32_t chunk) {
  if (record(parent).position >= record(chunk).position) return;
  // What is retained follows only what is retained as long.
  if (const Retention::Wish* const wish = retention.find(chunk); wish != nullptr && !retain(parent, wish->until_ns)) {
    return;
  }
  tell_policies(chunk, [&](EvictionPolicy& each) { each.follows(chunk, parent); });
}

void ChunkStore::State::use(std::uint32_t chunk, std::uint32_t at) {
  tell_policies(chunk, [&](EvictionPolicy& each) { each.touched(chunk); });
  if (map) map->touch(record(chunk).shards[0].extent.offset, at);
}

// Publishes a complete chunk; false, with nothing changed, when the index has no room.
bool ChunkStore::State::enter_index(std::uint32_t chunk, const ContainerInfo& info) {
  ChunkRecord& entering = record(chunk);
  const std::size_t blocks = entering.blocks;
  const auto has_room = [&] { return index.used_slots() + blocks <= index.slot_limit(); };
  if (blocks > index.slot_limit() || !evict_until(0, has_room)) return false;
  // New fingerprints first, since only they can fail, and while the chunk is not live, so that nobody sees them.
  for (std::size_t block = 0; block < blocks; ++block) {
    if (index.find(entering.fingerprint(block))) continue;
    if (index.put(entering.fingerprint(block), chunk, static_cast<std::uint16_t>(block))) continue;
    for (std::size_t undo = 0; undo < block; ++undo) index.erase(entering.fingerprint(undo), chunk);
    return false;
  }
  const auto shorter = find_same_start(info);
  index.make_live(chunk);
  entering.state = ChunkState::kLive;
  if (map) {
    const std::uint32_t now = use_time();
    for (const auto& shard : entering.shards) map->set(shard.extent.offset, now);
  }
  ++counters.chunks;
  count_form(entering, true);
  enroll(chunk);
  pressed = pressed || (demotion && slab.capacity_bytes() - slab.used_bytes() < config.demotion_free_bytes);
  const ChunkTraits traits{.bytes = entering.encoded_bytes(), .fingerprint = entering.fingerprint(0)};
  tell_policies(chunk, [&](EvictionPolicy& each) { each.inserted(chunk, traits); });
  // Blocks of a shorter chunk are pointed to this one before that one goes, so that a reader finds them at any moment.
  for (std::size_t block = 0; block < blocks; ++block) {
    index.put(entering.fingerprint(block), chunk, static_cast<std::uint16_t>(block));
  }
  if (shorter) {
    ++counters.superseded_chunks;
    if (const Retention::Wish* const wish = retention.find(*shorter)) {
      const std::int64_t until_ns = wish->until_ns;
      stop_retaining(*shorter);
      retain(chunk, until_ns);
    }
    drop_when_unheld(*shorter, ChunkState::kLeaving, "superseded");
  }
  return true;
}

ChunkStore::ChunkStore(const ChunkStoreConfig& config, std::span<std::byte> slab_memory,
                       std::span<std::byte> index_memory, std::unique_ptr<EvictionPolicy> policy, HazardProbe hazards,
                       const Clock& clock, std::span<std::byte> map_memory) {
  if (const auto status = config.validate(); !status) throw std::invalid_argument("chunk store: " + status.message());
  if (slab_memory.size() < config.slab_bytes) throw std::invalid_argument("chunk store: slab_memory is too small");
  if (!policy) throw std::invalid_argument("chunk store: there is no eviction policy");
  state_ = std::make_unique<State>(config, slab_memory, index_memory, std::move(policy), std::move(hazards), clock,
                                   map_memory);
}

ChunkStore::~ChunkStore() = default;

Presence ChunkStore::presence(const ChunkKey& key, const ShardShape& shard) const {
  const State& s = *state_;
  const ShardRange range = ShardRange::of(shard);
  std::lock_guard lock(s.mutex);
  if (s.find_live(key.namespace_id, key.group, key.last_block)) return Presence::kStored;
  const auto entry = s.pending.find(key);
  if (entry == s.pending.end()) return Presence::kAbsent;
  const auto chunk = entry->second.chunk;
  if (chunk && s.record(*chunk).covers(range)) return Presence::kStored;
  if (s.is_in_flight(entry->second, range)) return Presence::kInFlight;
  return chunk ? Presence::kPartlyStored : Presence::kAbsent;
}

Result<WriteTicket> ChunkStore::begin_write(const ContainerInfo& info, std::size_t max_bytes) {
  if (auto status = check_container_info(info); !status) return failure(std::move(status));
  const ShardRange range = ShardRange::of(info.shape);
  State& s = *state_;
  State::Session session(s);
  if (max_bytes == 0 || max_bytes > s.slab.capacity_bytes()) {
    return failure(Code::kRefused, "a container of " + std::to_string(max_bytes) + " bytes does not fit a slab of " +
                                       std::to_string(s.slab.capacity_bytes()) + " bytes");
  }
  if (s.is_too_weak(info.key.namespace_id, info.codec_spec)) {
    return failure(Code::kRefused, info.codec_spec + " is weaker than its namespace's max_relative_error allows");
  }
  if (s.is_covered(info)) return failure(Code::kBusy, "stored already");
  if (const auto entry = s.pending.find(info.key); entry != s.pending.end()) {
    if (s.is_in_flight(entry->second, range)) return failure(Code::kBusy, "in flight: somebody else writes this shard");
    if (entry->second.chunk) {
      const ChunkRecord& others = s.record(*entry->second.chunk);
      if (others.covers(range)) return failure(Code::kBusy, "stored already");
      if (auto status = others.check_same_chunk(info); !status) return failure(std::move(status));
    }
  }
  const std::string* const tenant = s.limited_tenant(info.key.namespace_id);
  if (auto status = s.charge(tenant, max_bytes); !status) return failure(std::move(status));
  std::optional<Extent> extent;
  const auto allocate = [&] { return (extent = s.slab.allocate(max_bytes)).has_value(); };
  if (!s.evict_until(max_bytes, allocate)) {
    s.refund(tenant, max_bytes);
    return failure(Code::kBusy, "no room for " + std::to_string(max_bytes) + " bytes: what is stored is in use");
  }
  const std::uint64_t id = s.next_id++;
  s.tickets.emplace(id, State::Ticket{info.key, range, *extent, tenant});
  s.pending[info.key].tickets.push_back(id);
  return WriteTicket{id, *extent};
}

std::span<std::byte> ChunkStore::bytes(const WriteTicket& ticket) {
  return state_->slab_memory.subspan(ticket.extent.offset, ticket.extent.bytes);
}

Result<bool> ChunkStore::publish(const WriteTicket& ticket, const ContainerInfo& info, std::size_t container_bytes) {
  State& s = *state_;
  State::Session session(s);
  const auto open = s.tickets.find(ticket.id);
  if (open == s.tickets.end()) return failure(Code::kInvalid, "there is no such write ticket");
  auto outcome = s.add_shard(open->second, info, container_bytes);
  s.close_ticket(open);
  return outcome;
}

void ChunkStore::abort(const WriteTicket& ticket) {
  State& s = *state_;
  State::Session session(s);
  if (const auto load = s.loads.find(ticket.id); load != s.loads.end()) {
    s.slab.release(load->second.extent);
    s.refund(load->second.charged_to, load->second.extent.bytes);
    s.loads.erase(load);
  }
  const auto open = s.tickets.find(ticket.id);
  if (open == s.tickets.end()) return;
  s.slab.release(open->second.extent);
  s.close_ticket(open);
}

Result<WriteTicket> ChunkStore::begin_load(std::uint64_t bytes, const std::optional<NamespaceId>& namespace_id) {
  State& s = *state_;
  if (bytes == 0 || bytes % Slab::kAlignment != 0 || bytes > s.slab.capacity_bytes()) {
    return failure(Code::kRefused, "an object of " + std::to_string(bytes) + " bytes does not fit the slab");
  }
  State::Session session(s);
  const std::string* const tenant = namespace_id ? s.limited_tenant(*namespace_id) : nullptr;
  if (auto status = s.charge(tenant, bytes); !status) return failure(std::move(status));
  std::optional<Extent> extent;
  const auto allocate = [&] { return (extent = s.slab.allocate(bytes)).has_value(); };
  if (!s.evict_until(bytes, allocate)) {
    s.refund(tenant, bytes);
    return failure(Code::kBusy, "no room for " + std::to_string(bytes) + " bytes: what is stored is in use");
  }
  const std::uint64_t id = s.next_id++;
  s.loads.emplace(id, State::Load{*extent, tenant});
  return WriteTicket{id, *extent};
}

Status ChunkStore::publish_load(const WriteTicket& ticket, std::span<const LoadedShard> shards, std::uint8_t saved_in) {
  State& s = *state_;
  State::Session session(s);
  const auto open = s.loads.find(ticket.id);
  if (open == s.loads.end()) return Status(Code::kInvalid, "there is no such ticket");
  const Extent object = open->second.extent;
  s.refund(open->second.charged_to, object.bytes);
  s.loads.erase(open);
  if (std::ranges::any_of(shards, [&](const LoadedShard& each) {
        return s.is_too_weak(each.info.key.namespace_id, each.info.codec_spec);
      })) {
    s.slab.release(object);
    return Status(Code::kRefused, "it is weaker than its namespace's max_relative_error allows");
  }
  const auto extents = s.cut(object, shards);
  if (!extents) return extents.error();
  bool complete = false;
  Status outcome;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    if (!outcome || complete) {
      s.slab.release((*extents)[i]);
      continue;
    }
    const auto added = s.add_whole_shard((*extents)[i], shards[i].info, shards[i].bytes);
    if (!added) outcome = added.error();
    complete = added.value_or(false);
  }
  if (!outcome) return outcome;
  if (!complete) return Status(Code::kCorrupt, "the object does not hold all shards of its chunk");
  const ChunkKey& key = shards.front().info.key;
  if (const auto chunk = s.find_live(key.namespace_id, key.group, key.last_block))
    s.record(*chunk).saved_in |= saved_in;
  return Status::ok();
}

void ChunkStore::mark_saved(const ChunkKey& key, std::uint8_t saved_in) {
  State& s = *state_;
  std::lock_guard lock(s.mutex);
  const auto chunk = s.find_live(key.namespace_id, key.group, key.last_block);
  // A longer chunk may have taken over the block.
  if (!chunk || !(s.record(*chunk).key() == key)) return;
  s.record(*chunk).saved_in |= saved_in;
}

std::vector<UnsavedChunk> ChunkStore::unsaved_victims(std::uint64_t bytes, std::uint8_t wanted_in) const {
  const State& s = *state_;
  std::vector<UnsavedChunk> unsaved;
  std::lock_guard lock(s.mutex);
  std::uint64_t seen_bytes = 0;
  const auto add = [&](std::span<const std::uint32_t> victims) {
    for (const auto chunk : victims) {
      if (seen_bytes >= bytes) break;
      const ChunkRecord& victim = s.record(chunk);
      seen_bytes += victim.encoded_bytes();
      const auto missing_in = static_cast<std::uint8_t>(wanted_in & ~victim.saved_in);
      if (missing_in != 0) unsaved.push_back({victim.key(), missing_in});
    }
  };
  const std::size_t scanned = std::min<std::uint64_t>(kVictimScan, s.counters.chunks);
  const auto victims = s.policy->victims(scanned);
  add(victims);
  if (victims.size() < scanned && seen_bytes < bytes) add(s.retention.all());
  return unsaved;
}

std::size_t ChunkStore::match(const NamespaceId& namespace_id, std::uint16_t group, std::span<const BlockHash> blocks) {
  State& s = *state_;
  std::vector<std::uint64_t> fingerprints;
  fingerprints.reserve(blocks.size());
  for (const auto& block : blocks) fingerprints.push_back(block_fingerprint(namespace_id, group, block.bytes()));
  std::vector<BlockIndexHit> hits(blocks.size());
  hits.resize(s.index.reader().find_leading(fingerprints, hits));

  const std::uint32_t now = s.use_time();
  std::lock_guard lock(s.mutex);
  std::size_t found = 0;
  while (found < hits.size() &&
         s.holds(hits[found].chunk, hits[found].block_in_chunk, namespace_id, group, blocks[found])) {
    ++found;
  }
  // From the last to the first, so that the end of a prompt is older than its start and leaves before it.
  for (std::size_t i = found; i-- > 0;) {
    if (i + 1 < found && hits[i].chunk == hits[i + 1].chunk) continue;
    if (i + 1 < found) s.note_order(hits[i].chunk, hits[i + 1].chunk);
    s.use(hits[i].chunk, now);
  }
  return found;
}

void ChunkStore::link(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& previous,
                      const BlockHash& next) {
  State& s = *state_;
  std::lock_guard lock(s.mutex);
  const auto parent = s.find_live(namespace_id, group, previous);
  const auto chunk = s.find_live(namespace_id, group, next);
  if (parent && chunk) s.note_order(*parent, *chunk);
}

RetainedChunks ChunkStore::retain(const NamespaceId& namespace_id, std::uint16_t group,
                                  std::span<const BlockHash> blocks, std::int64_t until_ns) {
  State& s = *state_;
  RetainedChunks retained;
  std::optional<std::uint32_t> before;
  while (!blocks.empty()) {
    std::lock_guard lock(s.mutex);
    s.let_expire();
    if (until_ns <= s.clock.now_ns()) break;
    const auto batch = blocks.first(std::min<std::size_t>(blocks.size(), kScanBatch));
    blocks = blocks.subspan(batch.size());
    for (const BlockHash& block : batch) {
      const auto chunk = s.find_live(namespace_id, group, block);
      if (!chunk || chunk == before) continue;
      before = chunk;
      ++(s.retain(*chunk, until_ns) ? retained.chunks : retained.refused);
    }
  }
  return retained;
}

Result<PinnedChunk> ChunkStore::pin(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& block,
                                    PinFor what_for) {
  State& s = *state_;
  State::Session session(s);
  const auto chunk = what_for == PinFor::kClaimed ? s.find_readable(namespace_id, group, block)
                                                  : s.find_live(namespace_id, group, block);
  if (!chunk) {
    s.drop_if_damaged(namespace_id, group, block);
    return failure(Code::kNotFound, "no complete chunk holds block " + block.to_hex());
  }
  ChunkRecord& pinned = s.record(*chunk);
  if (pinned.pins++ == 0) ++s.counters.pinned_chunks;
  if (what_for != PinFor::kMove && pinned.state == ChunkState::kLive) {
    s.use(*chunk, s.use_time());
  }
  PinnedChunk result{.pin = s.next_id++, .chunk = *chunk, .tokens = pinned.tokens(), .shards = s.shards_of(pinned)};
  s.pins.emplace(result.pin, State::Pin{*chunk, pinned.form});
  return result;
}

void ChunkStore::unpin(std::uint64_t pin) {
  State& s = *state_;
  std::lock_guard lock(s.mutex);
  const auto it = s.pins.find(pin);
  if (it == s.pins.end()) return;
  const State::Pin pin_of = it->second;
  s.pins.erase(it);
  ChunkRecord& held = s.record(pin_of.chunk);
  if (--held.pins == 0) --s.counters.pinned_chunks;
  if (pin_of.form == held.form) return;
  const auto former = std::ranges::find_if(
      s.former, [&](const auto& each) { return each.chunk == pin_of.chunk && each.form == pin_of.form; });
  if (--former->pins > 0) return;
  for (const auto& shard : former->shards) s.slab.release(shard.extent);
  s.former.erase(former);
}

std::span<const std::byte> ChunkStore::bytes(const StoredShard& shard) const {
  return state_->slab_memory.subspan(shard.extent.offset, shard.extent.bytes);
}

void ChunkStore::quarantine(const NamespaceId& namespace_id, std::uint16_t group, const BlockHash& block) {
  State& s = *state_;
  State::Session session(s);
  const auto chunk = s.find_readable(namespace_id, group, block);
  if (!chunk) return;
  ++s.counters.quarantined_chunks;
  if (s.record(*chunk).state == ChunkState::kLive) {
    s.drop_when_unheld(*chunk, ChunkState::kQuarantined, "quarantined");
  } else {
    s.record(*chunk).state = ChunkState::kQuarantined;
  }
}

void ChunkStore::drop(const ChunkKey& key) {
  State& s = *state_;
  State::Session session(s);
  const auto chunk = s.find_live(key.namespace_id, key.group, key.last_block);
  if (chunk && s.record(*chunk).key() == key) s.drop_when_unheld(*chunk, ChunkState::kQuarantined, "dropped");
  const auto entry = s.pending.find(key);
  if (entry == s.pending.end() || !entry->second.tickets.empty()) return;
  s.drop_shards(*entry->second.chunk);
  s.pending.erase(entry);
}

FlushedChunks ChunkStore::flush(const NamespaceSet& namespaces) {
  State& s = *state_;
  FlushedChunks flushed;
  std::vector<std::uint32_t> candidates;
  for (std::uint32_t begin = 0; begin < s.config.chunk_capacity; begin += kScanBatch) {
    State::Session session(s);
    candidates.clear();
    const std::uint32_t end = std::min(s.config.chunk_capacity, begin + kScanBatch);
    for (std::uint32_t chunk = begin; chunk < end; ++chunk) {
      if (s.is_listed(chunk, namespaces)) candidates.push_back(chunk);
    }
    flushed += s.flush(candidates);
  }
  State::Session session(s);
  s.drop_incomplete(namespaces, std::numeric_limits<std::int64_t>::max());
  s.free_unheld();
  return flushed;
}

FlushedChunks ChunkStore::flush(std::span<const ChunkKey> keys) {
  State& s = *state_;
  FlushedChunks flushed;
  while (!keys.empty()) {
    State::Session session(s);
    const auto batch = keys.first(std::min<std::size_t>(keys.size(), kScanBatch));
    keys = keys.subspan(batch.size());
    std::vector<std::uint32_t> candidates;
    for (const ChunkKey& key : batch) {
      const auto chunk = s.find_live(key.namespace_id, key.group, key.last_block);
      if (chunk && s.record(*chunk).key() == key) candidates.push_back(*chunk);
    }
    std::ranges::sort(candidates);
    candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
    flushed += s.flush(candidates);
  }
  return flushed;
}

std::vector<ChunkAncestry> ChunkStore::ancestries(const NamespaceSet& namespaces, const BlockHash& block) const {
  const State& s = *state_;
  std::vector<ChunkAncestry> all;
  for (std::uint32_t begin = 0; begin < s.config.chunk_capacity; begin += kScanBatch) {
    std::lock_guard lock(s.mutex);
    const std::uint32_t end = std::min(s.config.chunk_capacity, begin + kScanBatch);
    for (std::uint32_t chunk = begin; chunk < end; ++chunk) {
      if (!s.is_listed(chunk, namespaces)) continue;
      const ChunkRecord& each = s.record(chunk);
      bool holds = false;
      for (std::size_t i = 0; i < each.blocks; ++i) holds = holds || each.has_block(i, block);
      all.push_back({each.key(), each.position, each.position + each.tokens(), each.previous_tag, holds});
    }
  }
  return all;
}

void ChunkStore::sweep() {
  State& s = *state_;
  State::Session session(s);
  s.free_unheld();
  s.drop_incomplete(NamespaceSet::all(), s.clock.now_ns() - s.config.incomplete_ttl_ns);
  s.let_expire();
}

void ChunkStore::set_terms(const NamespaceId& namespace_id, StorageTerms storage) {
  State& s = *state_;
  if (storage.is_default()) return;
  bool first = false;
  {
    std::lock_guard lock(s.mutex);
    if (s.terms.contains(namespace_id)) return;
    if (s.terms.size() >= kMaxTerms) {
      std::erase_if(s.terms, [&](const auto& known) { return !s.families.has_namespace(known.first); });
    }
    first = storage.ladder && !s.demotion;
    if (first) {
      s.demotion.emplace(DemotionConfig{});
      s.no_ladder = s.demotion->add_ladder(*Ladder::make({.name = "none", .rungs = {{.codec_spec = "raw"}}}));
    }
    if (storage.tenant_bytes > 0) {
      s.quotas.set_limit(storage.tenant, storage.tenant_bytes);
      State::Tenant& tenant = s.tenants[storage.tenant];
      if (!tenant.policy) tenant.policy = make_eviction_policy(s.policy->name()).value();
    }
    State::Terms terms{.storage = std::move(storage), .ladder = s.no_ladder, .specs = {}};
    if (terms.storage.ladder) {
      terms.ladder = s.ladder_number(*terms.storage.ladder);
      for (const Rung& rung : terms.storage.ladder->rungs()) {
        // One that the model's keys do not allow is never reached.
        const auto codec = make_codec(rung.codec_spec, terms.storage.rotation);
        terms.specs.emplace_back(codec ? (*codec)->spec() : std::string_view());
      }
    }
    s.terms.emplace(namespace_id, std::move(terms));
  }
  // What is there already.
  for (std::uint32_t begin = 0; begin < s.config.chunk_capacity; begin += kScanBatch) {
    State::Session session(s);
    const std::uint32_t end = std::min(s.config.chunk_capacity, begin + kScanBatch);
    for (std::uint32_t chunk = begin; chunk < end; ++chunk) {
      if (!s.is_listed(chunk, NamespaceSet::all())) continue;
      if (s.is_listed(chunk, namespace_id) && s.is_too_weak(namespace_id, s.record(chunk).family->codec_spec)) {
        s.drop_when_unheld(chunk, ChunkState::kQuarantined, "flushed");
        continue;
      }
      if (first || s.is_listed(chunk, namespace_id)) s.enroll(chunk);
      ChunkRecord& each = s.record(chunk);
      if (EvictionPolicy* const own = s.policy_of_tenant(chunk); own != nullptr && !each.charged) {
        s.charge_chunk(each, 0);
        own->inserted(chunk, {.bytes = each.encoded_bytes(), .fingerprint = each.fingerprint(0)});
        own->withhold(chunk, s.retention.find(chunk) != nullptr);
      }
    }
  }
}

void ChunkStore::set_pressure_listener(std::function<void()> listener) {
  std::lock_guard lock(state_->mutex);
  state_->pressure_listener = std::move(listener);
}

Result<DemotionOrder> ChunkStore::next_demotion() {
  State& s = *state_;
  std::lock_guard lock(s.mutex);
  if (!s.demotion || s.slab.capacity_bytes() - s.slab.used_bytes() >= s.config.demotion_free_bytes) {
    return failure(Code::kNotFound, "there is room enough");
  }
  bool in_use = false;
  for (int i = 0; i < kDemotionTries; ++i) {
    const auto step = s.demotion->next(*s.policy);
    if (!step || !step->to) break;
    ChunkRecord& chunk = s.record(step->chunk);
    in_use = chunk.pins > 0;
    if (in_use) continue;
    const State::Terms& terms = s.terms.at(chunk.family->namespace_id);
    const Ladder& ladder = *terms.storage.ladder;
    ++chunk.pins;
    ++s.counters.pinned_chunks;
    DemotionOrder order{
        .key = chunk.key(),
        .chunk = {.pin = s.next_id++, .chunk = step->chunk, .tokens = chunk.tokens(), .shards = s.shards_of(chunk)},
        .to = *step->to,
        .codec_spec = terms.specs[step->to->rung],
        .rotation = terms.storage.rotation,
        .error = ladder.rung(s.demotion->form(step->chunk)).error,
        .expected_error = ladder.rung(*step->to).error,
        .error_max = terms.storage.max_relative_error};
    s.pins.emplace(order.chunk.pin, State::Pin{step->chunk, chunk.form});
    return order;
  }
  if (in_use) return failure(Code::kBusy, "what should step down is in use");
  return failure(Code::kRefused, "nothing should step down");
}

Status ChunkStore::replace(const WriteTicket& ticket, const DemotionOrder& order, std::span<const LoadedShard> shards) {
  State& s = *state_;
  State::Session session(s);
  const auto open = s.loads.find(ticket.id);
  if (open == s.loads.end()) return Status(Code::kInvalid, "there is no such ticket");
  const Extent object = open->second.extent;
  s.refund(open->second.charged_to, object.bytes);
  s.loads.erase(open);
  const auto pin = s.pins.find(order.chunk.pin);
  if (pin == s.pins.end() || s.record(pin->second.chunk).state != ChunkState::kLive) {
    s.slab.release(object);
    return Status(Code::kNotFound, "the chunk has gone meanwhile");
  }
  const std::uint32_t number = pin->second.chunk;
  ChunkRecord& chunk = s.record(number);
  if (shards.size() != chunk.shards.size() || pin->second.form != chunk.form) {
    s.slab.release(object);
    return Status(Code::kInvalid, "the containers are not those of the chunk's shards");
  }
  const auto extents = s.cut(object, shards);
  if (!extents) return extents.error();
  const std::uint8_t* const names = find_block_names(
      s.slab_memory.subspan(extents->front().offset, shards.front().bytes), order.codec_spec, chunk.block_hashes());
  if (names == nullptr) {
    for (const Extent& extent : *extents) s.slab.release(extent);
    return Status(Code::kInvalid, "the containers do not name the chunk's blocks");
  }
  ShardList fresh;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::uint64_t bytes = shards[i].bytes;
    const Extent extent{(*extents)[i].offset, bytes};
    std::ranges::fill(s.slab_memory.subspan(extent.offset + bytes, padded_bytes(bytes) - bytes), std::byte{0});
    fresh.push_back({extent, chunk.shards[i].range, chunk.shards[i].raw_bytes});
  }
  // At any instant a restart finds all containers of one form: the new ones are on the map before the old ones go.
  if (s.map) {
    const std::uint32_t last_use = s.map->last_use(chunk.shards[0].extent.offset);
    for (const auto& shard : fresh) s.map->set(shard.extent.offset, last_use);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    s.unmap(chunk);
  }
  const std::uint64_t bytes_before = chunk.encoded_bytes();
  s.count_form(chunk, false);
  std::uint32_t pins = chunk.pins;
  for (const auto& each : s.former) pins -= each.chunk == number ? each.pins : 0;
  s.former.push_back({number, chunk.form, pins, std::exchange(chunk.shards, std::move(fresh))});
  ++chunk.form;
  chunk.names = names;  // those that it was named in go once nobody reads them
  ChunkFamily family = *chunk.family;
  family.codec_spec = order.codec_spec;
  const ChunkFamily* const left = std::exchange(chunk.family, s.families.acquire(std::move(family)));
  s.families.release(left);
  chunk.lossy_generations = order.to.lossy_generations;
  s.count_form(chunk, true);
  const std::uint64_t bytes_after = chunk.encoded_bytes();
  if (chunk.charged) s.refund(s.limited_tenant(order.key.namespace_id), bytes_before - bytes_after);
  if (const Retention::Wish* const known = s.retention.find(number)) {
    Retention::Wish wish = *known;
    wish.bytes = bytes_after;
    s.retention.put(number, wish);
  }
  s.counters.encoded_bytes += bytes_after - bytes_before;
  ++s.counters.demoted_chunks;
  s.counters.demoted_bytes += bytes_before - bytes_after;
  if (s.demotion) s.demotion->stepped(number, order.to);
  return Status::ok();
}

void ChunkStore::exempt_from_demotion(const DemotionOrder& order) {
  State& s = *state_;
  std::lock_guard lock(s.mutex);
  const auto pin = s.pins.find(order.chunk.pin);
  if (pin == s.pins.end() || !s.demotion) return;
  const ChunkRecord& chunk = s.record(pin->second.chunk);
  if (chunk.state != ChunkState::kLive) return;
  s.demotion->entered(pin->second.chunk, s.no_ladder, {}, static_cast<double>(chunk.encoded_bytes()));
}

std::vector<StoredFormStats> ChunkStore::forms() const {
  const State& s = *state_;
  std::lock_guard lock(s.mutex);
  std::vector<StoredFormStats> forms;
  for (const auto& [spec, form] : s.by_form) forms.push_back({spec, form.chunks, form.bytes});
  return forms;
}

std::vector<TenantStats> ChunkStore::tenants() const {
  const State& s = *state_;
  std::lock_guard lock(s.mutex);
  std::vector<TenantStats> all;
  for (const auto& [name, tenant] : s.tenants) {
    all.push_back({name, s.quotas.used(name), s.quotas.limit(name), tenant.refused});
  }
  return all;
}

void ChunkStore::set_removal_listener(RemovalListener listener) {
  std::lock_guard lock(state_->mutex);
  state_->listener = listener ? std::make_shared<const RemovalListener>(std::move(listener)) : nullptr;
}

void ChunkStore::cut_off(std::uint64_t offset) {
  const std::lock_guard lock(state_->mutex);
  state_->slab.cut_off(offset);
}

ChunkStoreStats ChunkStore::stats() const {
  const State& s = *state_;
  std::lock_guard lock(s.mutex);
  ChunkStoreStats stats = s.counters;
  stats.capacity_bytes = s.slab.capacity_bytes();
  stats.used_bytes = s.slab.used_bytes();
  stats.index_slots_used = s.index.used_slots();
  stats.retained_chunks = s.retention.size();
  stats.retained_bytes = s.retention.bytes();
  return stats;
}

std::vector<ChunkStore::ChunkSummary> ChunkStore::snapshot(const NamespaceSet& namespaces, std::size_t limit) const {
  const State& s = *state_;
  std::vector<ChunkSummary> summaries;
  for (std::uint32_t begin = 0; begin < s.config.chunk_capacity && summaries.size() < limit; begin += kScanBatch) {
    std::lock_guard lock(s.mutex);
    const std::uint32_t end = std::min(s.config.chunk_capacity, begin + kScanBatch);
    for (std::uint32_t chunk = begin; chunk < end && summaries.size() < limit; ++chunk) {
      if (s.is_listed(chunk, namespaces)) summaries.push_back(s.summarize(s.record(chunk)));
    }
  }
  return summaries;
}

std::optional<ChunkStore::ChunkSummary> ChunkStore::describe(const NamespaceId& namespace_id, std::uint16_t group,
                                                             const BlockHash& block) const {
  const State& s = *state_;
  std::lock_guard lock(s.mutex);
  const auto chunk = s.find_live(namespace_id, group, block);
  if (!chunk) return std::nullopt;
  return s.summarize(s.record(*chunk));
}

}  // namespace kvern
