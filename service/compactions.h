#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/executor.h"
#include "base/status.h"
#include "base/trace.h"
#include "service/compact_manifests.h"
#include "service/compaction_task.h"
#include "service/metrics.h"
#include "service/namespaces.h"
#include "transport/wire.h"

namespace kvern {

struct CompactionLimits {
  std::size_t max_pending = 64;          ///< handles that wait for parts, for a thread or are being made
  std::uint64_t job_bytes = 4ULL << 30;  ///< of memory for one; and for the queries of all that are pending
  std::size_t max_handles = 4096;
  std::int64_t max_ttl_seconds = std::int64_t{7} * 86'400;
  std::int64_t collect_ns = 60'000'000'000;  ///< parts of other ranks, and queries, must come within this time
};

/// Who asks. A tenant sees its own handles; operators of this host see all.
struct CompactionAsker {
  std::uint64_t session = 0;
  std::string tenant;
  std::string client_name;
  bool sees_all = false;
  SpanPtr span = nullptr;  ///< of the request; null: not recorded
};

/// Compact caches from the first part of a request to their expiry: which there are, who owns them, what became of
/// them. They are made on the executor; their chunks are ordinary ones. A restart finds those that were ready, and
/// knows why the others failed. Thread-safe; begin() and erase() write files, the rest is quick.
class Compactions {
 public:
  struct Parts {
    ChunkStore& store;
    TieredStore& tiers;
    StorePipeline& pipeline;
    InFlight& in_flight;
    Metrics& metrics;
    const Clock& clock;                          ///< for time-outs
    std::function<std::int64_t()> unix_seconds;  ///< for expiry
    Executor& executor;
    Executor* helpers = nullptr;  ///< other threads than the executor's, for parts of one cache; null: none
    /// Threads that get what processors nobody else wants (SCHED_IDLE), for errors that are measured after a cache is
    /// ready. Null or full: the executor's threads do it. Its queue bounds how many prompts are held for it.
    Executor* measurers = nullptr;
  };
  using Found = std::function<void(Result<std::vector<wire::CompactionReport>> reports)>;

  /// Reads the manifests in the folder; throws std::runtime_error when it cannot be made.
  Compactions(const Parts& parts, const CompactionLimits& limits, std::filesystem::path folder);

  /// Takes one rank's part. kInvalid, kRefused or kBusy with the reason, which is kept for those who ask for the
  /// handle; the prompt's chunks are dropped then.
  Status begin(const CompactionAsker& asker, const std::shared_ptr<const Namespace>& space,
               const wire::Compact& request);
  Status add_queries(const CompactionAsker& asker, const wire::CompactQueries& request);
  /// Calls found once: now or, for one that is pending, when it is no longer or the time is over. Who does not ask
  /// early also waits until its error is measured. kNotFound: there is no such handle for this asker.
  void find(const CompactionAsker& asker, const wire::CompactionQuery& query, Found found);
  /// Its chunks leave all tiers. kNotFound as above.
  Status erase(const CompactionAsker& asker, const std::string& handle);
  /// Ends what is over: handles, waits, parts that never came. Called now and then.
  void tick();
  /// Takes nothing new, ends what is being made soon; the executor is drained after it.
  void stop();

  struct Figures {
    std::uint64_t pending = 0, ready = 0, failed = 0;
    std::uint64_t stored_bytes = 0;  ///< of those that are ready
  };
  Figures figures() const;

 private:
  /// What one rank has asked for.
  struct RankPart {
    std::uint64_t session = 0;
    std::uint32_t layer_begin = 0, layers = 0, head_begin = 0, heads = 0;  ///< KV heads
    std::uint64_t query_bytes = 0;                                         ///< of all its queries
    QueryPart queries;

    bool whole() const { return queries.bytes.size() == query_bytes; }
  };
  struct Entry {
    CompactHandle handle;
    wire::CompactManifest manifest;
    // While it is pending:
    std::shared_ptr<CompactionOrder> order;
    std::vector<RankPart> parts;
    std::int64_t began_ns = 0;
    std::uint64_t query_bytes = 0;
    SpanPtr span;              ///< of the first request that is recorded
    bool handed_over = false;  ///< to the executor, which cleans up after it
    bool measuring = false;    ///< it is ready, its error is still to come
    std::atomic<bool> cancelled{false};

    wire::CompactionReport& report() { return *manifest.mutable_report(); }
    bool pending() const { return manifest.report().state() == wire::COMPACTION_PENDING; }
    std::vector<ChunkKey> keys_of(const std::vector<BlockHash>& hashes) const;
    std::vector<ChunkKey> source_keys() const;
    std::vector<ChunkKey> slot_keys() const;
  };
  struct Waiter {
    std::string handle;
    std::int64_t until_ns = 0;
    bool early = false;
    Found found;
  };
  using Answers = std::vector<std::pair<Found, wire::CompactionReport>>;

  void take_over(wire::CompactManifest manifest);
  /// Writes the manifest; when that fails, the log says what it costs.
  void keep(const std::string& digits, const wire::CompactManifest& manifest);
  Status admit_locked(const CompactionOrder& order, std::uint64_t query_bytes, bool is_new);
  /// False when there is none.
  bool make_room_locked();
  Status consider(const CompactionAsker& asker, const Namespace& space, const wire::Compact& request,
                  CompactHandle handle);
  void turn_away(const CompactionAsker& asker, const Namespace& space, const wire::Compact& request,
                 const CompactHandle& handle, const Status& why);
  std::shared_ptr<Entry> make_entry(const CompactionAsker& asker, const Namespace& space, const CompactHandle& handle,
                                    const std::string& spec, std::uint32_t group, std::uint32_t hash_bytes) const;
  Status take_part(const CompactionAsker& asker, const Namespace& space, std::shared_ptr<CompactionOrder> order,
                   RankPart part);
  void start_if_whole_locked(const std::shared_ptr<Entry>& entry);
  void run(const std::shared_ptr<Entry>& entry);
  /// False when it is not known any more, or nothing is to be measured.
  bool finish(const std::shared_ptr<Entry>& entry, const Result<CompactionTask::Outcome>& outcome, double seconds);
  void measured(const std::shared_ptr<Entry>& entry, const Result<CompactionError>& error, double seconds);
  /// Takes the entry out; returns the chunks that it leaves behind.
  std::vector<ChunkKey> remove_locked(const std::shared_ptr<Entry>& entry);
  void end(const std::string& handle, const std::string& why);
  void give_up(const std::string& handle);
  Answers take_waiters_locked(const std::string& handle, const wire::CompactionReport& report, bool early_only = false);
  void erase_chunks(const std::vector<ChunkKey>& keys);
  wire::CompactionReport report_of(const Entry& entry) const;
  std::shared_ptr<Entry> find_locked(const CompactionAsker& asker, const std::string& handle) const;

  const Parts parts_;
  const CompactionLimits limits_;
  const std::unique_ptr<Executor> helpers_;
  const CompactionTask task_;
  const CompactManifests manifests_;
  /// A handle's file and its entry change together under it. Taken before mutex_.
  std::mutex files_mutex_;
  mutable std::mutex mutex_;
  bool stopping_ = false;
  std::uint64_t query_bytes_ = 0;  ///< of all that are pending
  std::unordered_map<std::string, std::shared_ptr<Entry>> entries_;
  /// Handles that were deleted before all ranks had asked for them, and when.
  std::unordered_map<std::string, std::int64_t> deleted_ns_;
  std::vector<Waiter> waiters_;
};

}  // namespace kvern
