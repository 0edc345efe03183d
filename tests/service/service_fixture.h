#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/block_index.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/keys.h"
#include "kernels/container.h"
#include "service/hazards.h"
#include "service/hot_service.h"
#include "service/in_flight.h"
#include "service/metrics.h"
#include "service/namespaces.h"
#include "service/remote_data.h"
#include "service/sessions.h"
#include "service/store_pipeline.h"
#include "store/chunk_store.h"
#include "store/eviction_policy.h"
#include "store/tiered_store.h"
#include "tests/base/collected_spans.h"
#include "tests/store/memory_tier.h"
#include "transport/shared_memory.h"
#include "transport/wire.h"

namespace kvern::testing {

constexpr std::uint32_t kBlockTokens = 4;
constexpr std::uint32_t kChunkTokens = 16;
constexpr std::uint32_t kHashBytes = 32;
constexpr std::uint64_t kSlabBytes = 1U << 20;
constexpr std::uint64_t kStagingBytes = 64U << 10;
constexpr std::int64_t kTimeoutNs = 1'000'000'000;

/// The facts of a small model: 2 layers, 2 KV heads, rows of 8 bfloat16.
inline std::map<std::string, std::string> model_facts() {
  return {{"model", "tiny"},
          {"weights", "0a0b"},
          {"dtype", "bfloat16"},
          {"kv_dtype", "bfloat16"},
          {"block_tokens", "4"},
          {"chunk_tokens", "16"},
          {"layers", "2"},
          {"kv_heads", "2"},
          {"key_dim", "8"},
          {"value_dim", "8"},
          {"groups", "full:2"},
          {"rope", "theta=10000"},
          {"hash_algorithm", "sha256_cbor"},
          {"hash_seed", "0"}};
}

inline std::vector<std::pair<std::string, std::string>> as_fields(const std::map<std::string, std::string>& facts) {
  return {facts.begin(), facts.end()};
}

/// The hash of one block of a made-up prompt.
inline std::string block_hash(std::uint64_t prompt, std::uint64_t block) {
  std::string bytes(kHashBytes, '\x5a');
  std::memcpy(bytes.data(), &prompt, sizeof prompt);
  std::memcpy(bytes.data() + sizeof prompt, &block, sizeof block);
  return bytes;
}

inline std::string block_hashes(std::uint64_t prompt, std::uint64_t first, std::uint64_t blocks) {
  std::string joined;
  for (std::uint64_t block = first; block < first + blocks; ++block) joined += block_hash(prompt, block);
  return joined;
}

inline ShardShape model_shape(std::uint32_t tokens) {
  return {.dtype = DType::kBFloat16,
          .layer_begin = 0,
          .layers = 2,
          .head_begin = 0,
          .heads = 2,
          .tokens = tokens,
          .key_dim = 8,
          .value_dim = 8};
}

/// Checksums as the writer sends them, in the order layer, part, head.
inline std::string plane_checksums(const ShardShape& shape, std::span<const std::byte> canonical) {
  std::string joined;
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        const std::uint64_t sum =
            checksum64(canonical.data() + shape.plane_offset(layer, part, head), shape.plane_bytes(part));
        joined.append(reinterpret_cast<const char*>(&sum), sizeof sum);
      }
    }
  }
  return joined;
}

/// Bytes that look like small bfloat16 numbers and differ from prompt to prompt.
inline void fill(std::span<std::byte> bytes, std::uint64_t seed) {
  for (std::size_t i = 0; i + 1 < bytes.size(); i += 2) {
    const std::uint64_t mixed = (seed * 0x9e3779b97f4a7c15ULL + i) * 0xbf58476d1ce4e5b9ULL;
    bytes[i] = static_cast<std::byte>(mixed >> 56);
    bytes[i + 1] = static_cast<std::byte>(0x3e + (mixed >> 40) % 2);
  }
}

/// The daemon's middle in one process: everything but sockets and threads. Encoding happens when the executor is
/// stepped, time passes when the clock is moved.
class ServiceFixture {
 public:
  explicit ServiceFixture(std::uint64_t slab_bytes = kSlabBytes, std::uint64_t max_sessions = 16)
      : slab_memory(SharedMemory::create_anonymous("test-slab", slab_bytes).value()),
        index_memory(SharedMemory::create_anonymous("test-index", block_index_bytes(index_config())).value()),
        store(
            {.slab_bytes = slab_bytes,
             .chunk_capacity = index_config().chunk_capacity,
             .index_slots = index_config().slot_count,
             .generation = 1,
             .incomplete_ttl_ns = 60'000'000'000},
            slab_memory.bytes(), index_memory.bytes(), make_lru_policy(),
            [this](std::unordered_set<std::uint32_t>& claimed) { hazards.collect(claimed); }, clock),
        tiers(store, lower_tiers(), movers, TieredStoreConfig{}, [this] { return usable_bytes; }),
        namespaces([](const std::map<std::string, std::string>&) {
          return NamespaceTerms{.codec_spec = "raw", .storage = {}};
        }),
        pipeline(store, tiers, executor, metrics, clock, [this] { return usable_bytes; }),
        sessions({.max_sessions = max_sessions,
                  .staging_bytes_max = kStagingBytes,
                  .timeout_ns = kTimeoutNs,
                  .tick_ns = 100'000'000,
                  .segment = small_segment()},
                 7, hazards, clock),
        hot({.sessions = sessions,
             .store = store,
             .tiers = tiers,
             .pipeline = pipeline,
             .in_flight = in_flight,
             .metrics = metrics,
             .clock = clock,
             .slab_bytes = slab_bytes,
             .tracer = &tracer}),
        remote(sessions, store) {}

  /// One tier that ends its operations at once, and is written through.
  std::vector<LowerTier> lower_tiers() {
    auto tier = std::make_unique<MemoryTier>(clock);
    lower = tier.get();
    std::vector<LowerTier> tiers_below;
    tiers_below.push_back({std::move(tier), WritePolicy::kThrough});
    return tiers_below;
  }
  static BlockIndexConfig index_config() { return {.chunk_capacity = 1024, .slot_count = 8192, .generation = 1}; }
  static SegmentLayout small_segment() {
    return {.hazard_capacity = 64, .request_ring_bytes = 1U << 16, .reply_ring_bytes = 1U << 16};
  }

  /// A worker whose staging lies in this process, as a remote one's does.
  std::shared_ptr<Session> open_worker(std::uint64_t staging_bytes = kStagingBytes) {
    return sessions
        .open({.role = SessionRole::kWorker,
               .plane = SessionPlane::kUcx,
               .local = false,
               .tenant = "default",
               .client_name = "test",
               .attributes = {},
               .staging_bytes = staging_bytes},
              1)
        .value();
  }
  /// A worker with shared memory, admitted over the connection of that number.
  std::shared_ptr<Session> open_local(std::uint64_t connection) {
    const auto session = sessions
                             .open({.role = SessionRole::kWorker,
                                    .plane = SessionPlane::kShm,
                                    .local = true,
                                    .tenant = "default",
                                    .client_name = "test",
                                    .attributes = {},
                                    .staging_bytes = kStagingBytes},
                                   1)
                             .value();
    return sessions.admit(connection, session->token(), PeerProcess{}).value();
  }
  NamespaceId register_model(Session& session, const std::map<std::string, std::string>& facts = model_facts()) {
    const auto space = namespaces.add(as_fields(facts), session.identity().tenant).value();
    EXPECT_TRUE(session.add_namespace(space));
    return space->id;
  }

  /// The answer, or nullopt when it has to wait for the executor.
  std::optional<wire::HotReply> ask(std::uint64_t session_id, const wire::HotRequest& request) {
    const auto answer = std::make_shared<std::optional<wire::HotReply>>();
    hot.handle(session_id, request, [answer](wire::HotReply reply) { *answer = std::move(reply); });
    return *answer;
  }

  static wire::HotRequest reserve_request(const NamespaceId& id, std::uint64_t prompt, std::uint64_t chunks,
                                          std::uint64_t blocks_per_chunk = kChunkTokens / kBlockTokens) {
    wire::HotRequest request;
    request.set_id(1);
    auto* reserve = request.mutable_reserve();
    reserve->set_namespace_id(id.bytes.data(), id.bytes.size());
    reserve->set_hash_bytes(kHashBytes);
    reserve->set_block_tokens(kBlockTokens);
    reserve->set_group_layers(2);
    reserve->set_model_heads(2);
    auto* shard = reserve->mutable_shard();
    shard->set_dtype(static_cast<std::uint32_t>(DType::kBFloat16));
    shard->set_layers(2);
    shard->set_heads(2);
    shard->set_key_dim(8);
    shard->set_value_dim(8);
    for (std::uint64_t chunk = 0; chunk < chunks; ++chunk) {
      auto* item = reserve->add_items();
      item->set_block_hashes(block_hashes(prompt, chunk * blocks_per_chunk, blocks_per_chunk));
      item->set_position(chunk * blocks_per_chunk * kBlockTokens);
      if (chunk > 0) item->set_previous_block(block_hash(prompt, chunk * blocks_per_chunk - 1));
    }
    return request;
  }

  /// Fills the reserved staging and answers with the item of a Commit.
  static wire::CommitItem write(Session& session, std::uint64_t reservation_id, std::uint64_t seed) {
    const auto reservation = session.find_reservation(reservation_id);
    const auto canonical = reservation->block.bytes().first(reservation->info.shape.raw_bytes());
    fill(canonical, seed);
    wire::CommitItem item;
    item.set_reservation_id(reservation_id);
    item.set_plane_checksums(plane_checksums(reservation->info.shape, canonical));
    return item;
  }

  /// Reserves, writes, commits and encodes; the statuses of the commit.
  std::vector<Status> store_chunks(Session& session, const NamespaceId& id, std::uint64_t prompt,
                                   std::uint64_t chunks) {
    const auto reserved = ask(session.id(), reserve_request(id, prompt, chunks));
    wire::HotRequest request;
    std::vector<Status> statuses;
    for (const auto& item : reserved->reserved().items()) {
      if (item.outcome() == wire::RESERVED) {
        *request.mutable_commit()->add_items() = write(session, item.reservation_id(), prompt);
      }
    }
    if (!request.has_commit()) return statuses;
    hot.handle(session.id(), request, [&statuses](const wire::HotReply& reply) {
      for (const auto& each : reply.committed().items()) statuses.push_back(to_status(each));
    });
    executor.run_all();
    return statuses;
  }

  std::optional<wire::HotReply> fetch(std::uint64_t session_id, const NamespaceId& id, const std::string& hash) {
    wire::HotRequest request;
    request.mutable_fetch()->set_namespace_id(id.bytes.data(), id.bytes.size());
    request.mutable_fetch()->add_items()->set_block_hash(hash);
    return ask(session_id, request);
  }

  ManualClock clock;
  CollectedSpans spans;
  Tracer tracer{spans, clock, 0};           ///< records what comes with a sampled trace context
  std::uint64_t usable_bytes = UINT64_MAX;  ///< of the slab
  Metrics metrics;
  HazardRegistry hazards;
  InFlight in_flight;
  SharedMemory slab_memory;
  SharedMemory index_memory;
  ChunkStore store;
  ManualExecutor movers;
  MemoryTier* lower = nullptr;
  TieredStore tiers;
  NamespaceRegistry namespaces;
  ManualExecutor executor;
  StorePipeline pipeline;
  Sessions sessions;
  HotService hot;
  RemoteData remote;
};

}  // namespace kvern::testing
