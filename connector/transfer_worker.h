#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/keys.h"
#include "base/status.h"
#include "connector/cache_layout.h"
#include "connector/client.h"
#include "connector/compaction.h"

namespace kvern {

struct WorkerConfig {
  std::uint32_t threads = 1;               ///< job threads; loads go before stores
  std::uint32_t max_queued_jobs = 4096;    ///< more are refused at once (result: dropped)
  std::uint32_t load_timeout_ms = 30'000;  ///< then the load ends as failed
  std::uint32_t store_timeout_ms = 30'000;
  Status validate() const;
};

/// One chunk of a store: whole blocks, all layers and heads of this rank.
struct StoreChunk {
  std::vector<BlockHash> hashes;
  std::vector<std::uint32_t> block_ids;    ///< same length
  std::uint64_t position = 0;              ///< of the first token
  std::optional<BlockHash> previous = {};  ///< the block before it in the prompt
};
struct StoreJob {
  std::uint64_t id = 0;  ///< caller's, unique
  int namespace_handle = 0;
  std::uint16_t group = 0;
  std::string codec_spec;  ///< empty: the namespace's
  std::vector<StoreChunk> chunks;
  /// Pages on a device: an event (CUevent) after which they hold what is to be stored; it lives until kGathered. 0:
  /// now.
  std::uintptr_t ready_event = 0;
  std::string traceparent = {};  ///< of the work that asks (HotRequest in wire.proto); empty: none
};

/// Blocks of one grid cell to load: hashes[i] goes to block_ids[i] (0: skip). blocks_before: blocks of the cell that
/// lie before hashes[0].
struct LoadPiece {
  std::uint16_t group = 0;
  std::uint32_t blocks_before = 0;
  std::vector<BlockHash> hashes;
  std::vector<std::uint32_t> block_ids;
};
struct LoadJob {
  std::uint64_t id = 0;
  int namespace_handle = 0;
  std::vector<LoadPiece> pieces;
  /// Pages on a device: an event after which nobody else reads or writes them; it lives until the load's end. 0: now.
  std::uintptr_t ready_event = 0;
  std::string traceparent = {};  ///< as in StoreJob
};

enum class JobEvent : std::uint8_t {
  kGathered,          ///< store: the pages are not read any more (always exactly once per store job, also on failure)
  kStored,            ///< store: finished; stored_chunks tells which chunks others can read now (after kGathered)
  kLoaded,            ///< load: all bytes are verified and in the pages
  kLoadFailed,        ///< load: pages that had been written are zeroed again; reason says why
  kCompacting,        ///< compaction: the daemon has taken this rank's part
  kCompactionFailed,  ///< compaction: it has not; reason says why
};
struct JobResult {
  std::uint64_t id = 0;
  JobEvent event = JobEvent::kGathered;
  std::vector<std::uint32_t> stored_chunks;  ///< indices into StoreJob::chunks that are stored (now or before)
  std::string reason;
  double seconds = 0;  ///< of the job so far
  std::uint64_t raw_bytes = 0;
  std::uint64_t encoded_bytes = 0;
};

/// Worker side: stores and loads on threads of its own. submit_* and poll never block and need no GIL. A load is cut
/// into batches that the threads share; a store is done batch by batch, so that loads get in between, and its commits
/// overlap the gathering of what follows. Thread-safe.
class TransferWorker {
 public:
  TransferWorker(std::shared_ptr<Client> client, WorkerConfig config);
  /// Stops taking jobs, finishes what runs, fails what waits.
  ~TransferWorker();

  /// Before any job. kInvalid with the group's sentence when the layout does not validate.
  Status register_group(GroupPages pages);

  /// Always followed by its events, also when the daemon is away (then at once: kGathered + kStored with no chunks, or
  /// kLoadFailed).
  void submit_store(StoreJob job);
  void submit_load(LoadJob job);
  /// The blocks of the prompt are stored. Always followed by kCompacting or kCompactionFailed.
  void submit_compaction(CompactionJob job);
  /// Takes the events that are there; cheap when there are none (one atomic load).
  std::vector<JobResult> poll();
  /// Waits until the pages of these stores are not read any more; for preemption fences. False after the time-out.
  bool wait_gathered(const std::vector<std::uint64_t>& store_ids, std::uint32_t timeout_ms);
  /// The load's target pages will be reused: it ends (kLoadFailed) as soon as possible.
  void cancel_load(std::uint64_t id);
  /// Waits until nothing runs; for shut-down and tests.
  bool drain(std::uint32_t timeout_ms);
  std::size_t in_flight() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kvern
