#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/keys.h"
#include "base/slot_layout.h"
#include "base/status.h"
#include "connector/cache_layout.h"

namespace kvern {

struct Session;

/// What is known of a compact cache before its prompt is computed; follows from the spec and the prompt's length alone.
struct CompactionTerms {
  std::string spec;              ///< canonical
  std::uint32_t slots = 0;       ///< M: tokens that a request claims in every layer
  std::uint32_t query_rows = 0;  ///< last queries of the prompt that the method reads; 0: none
  SlotLayout layout = SlotLayout::kRectangular;
};
/// kInvalid or kRefused with the reason, see CompactionPlan::make(), also for layout and page_tokens.
Result<CompactionTerms> compaction_terms(std::string_view spec, std::uint32_t prompt_tokens,
                                         SlotLayout layout = SlotLayout::kRectangular, std::uint32_t page_tokens = 0);

/// How keys turn by their positions; for those who test that a model does it so.
struct KeyRotation {
  bool interleaved = false;         ///< pairs are elements 2i and 2i + 1, else i and i + the number of pairs
  std::vector<double> frequencies;  ///< of each pair, radians per position
};
/// From the fact `rotation`. kInvalid with the reason, also for rotations that no daemon can move keys by.
Result<KeyRotation> key_rotation(std::string_view fact);

/// Where the pages of a compact cache lie: [layer][page] -> (layer, block of the request), see slot_pages().
Result<std::vector<std::vector<std::pair<std::uint32_t, std::uint32_t>>>> slot_places(
    SlotLayout layout, std::span<const std::uint32_t> pages_of_layers, std::uint32_t blocks);

/// Asks the daemon for a compact cache of a prompt whose blocks are stored, raw, under the source hashes of the handle
/// (transport/compact_handle.h). Every rank asks for its shard.
struct CompactionJob {
  std::uint64_t id = 0;  ///< caller's, unique
  int namespace_handle = 0;
  std::string handle;
  std::string spec;  ///< canonical
  std::uint16_t group = 0;
  std::uint32_t prompt_tokens = 0;
  std::uint32_t slots = 0;
  std::int64_t expires_at = 0;   ///< unix seconds
  std::uint32_t hash_bytes = 0;  ///< of the engine's block hashes
  std::vector<BlockHash> source_hashes;
  std::vector<BlockHash> slot_hashes;
  std::uint32_t query_rows = 0;
  std::uint32_t query_heads = 0;  ///< of this rank
  /// One per layer of this shard, [query_rows][query_heads][key_dim] of the group's dtype; none without query_rows.
  std::vector<std::string> queries;
  std::string traceparent = {};  ///< as in StoreJob
};

/// Whether the job agrees with itself and with the pages: kInvalid with a sentence. The hashes must be those that the
/// handle stands for, which the daemon derives itself.
Status check_compaction(const CompactionJob& job, const GroupPages& pages);

/// Sends the job, its queries in pieces, and returns the daemon's answer; blocks. The daemon refuses a job whose
/// queries are not all there.
Status send_compaction(const Session& session, const NamespaceId& namespace_id, const CompactionJob& job,
                       const GroupPages& pages, std::chrono::milliseconds timeout);

enum class CompactionState : std::uint8_t { kUnknown, kPending, kReady, kFailed };

/// What the daemon says of a compact cache.
struct CompactionInfo {
  std::string handle;
  CompactionState state = CompactionState::kUnknown;
  std::string reason;  ///< why it failed or is not known
  std::uint32_t prompt_tokens = 0;
  std::uint32_t slots = 0;
  std::string method;  ///< canonical spec
  NamespaceId namespace_id;
  std::uint16_t group = 0;
  std::uint64_t stored_bytes = 0;
  std::uint64_t raw_bytes = 0;  ///< of the prompt's keys and values as the engine holds them
  /// ||O' - O|| / ||O|| of the attention outputs of the captured queries, over the layers; absent without queries,
  /// and until it is measured.
  std::optional<double> error_mean;
  std::optional<double> error_max;
  bool error_to_come = false;              ///< it is ready, and its error is being measured
  std::int64_t expires_at = 0;             ///< unix seconds
  std::string owner;                       ///< tenant and client
  double seconds = 0;                      ///< that the daemon worked on it
  std::vector<std::uint32_t> layer_slots;  ///< of a ragged cache that is ready: tokens of each layer
};

/// Slots of each layer of a compact cache, from its stored chunks, whoever made it; empty: all layers keep as many as
/// the handle says. block: of its first slots. kNotFound when they are not in DRAM: to be asked while a match holds
/// them.
Result<std::vector<std::uint32_t>> ask_layer_slots(const Session& session, const NamespaceId& namespace_id,
                                                   std::uint16_t group, const BlockHash& block,
                                                   std::chrono::milliseconds timeout);

/// Waits for at most `wait` while it is pending and, unless `early`, until its error is measured. kUnknown, with the
/// reason, when there is no such handle, it has expired, belongs to somebody else or no daemon answers. session may be
/// null.
CompactionInfo ask_compaction(const Session* session, const std::string& handle, std::chrono::milliseconds wait,
                              bool early, std::chrono::milliseconds call_timeout);
/// True when it was there; its chunks leave all tiers.
Result<bool> delete_compaction(const Session& session, const std::string& handle, std::chrono::milliseconds timeout);
/// Those of the client's tenant.
Result<std::vector<CompactionInfo>> list_compactions(const Session& session, std::chrono::milliseconds timeout);

}  // namespace kvern
