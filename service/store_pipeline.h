#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/executor.h"
#include "base/status.h"
#include "service/metrics.h"
#include "service/session.h"
#include "store/chunk_store.h"
#include "store/tiered_store.h"

namespace kvern {

/// From staging into the store: room in the slab, encoding and verifying in one pass, publication. Each chunk is a task
/// of its own on the executor; the failure of one affects no other.
class StorePipeline {
 public:
  using Done = std::function<void(Status status)>;

  /// usable_bytes: how much of the slab may be written at this moment (SlabFile).
  StorePipeline(ChunkStore& store, TieredStore& tiers, Executor& executor, Metrics& metrics, const Clock& clock,
                std::function<std::uint64_t()> usable_bytes)
      : store_(store),
        tiers_(tiers),
        executor_(executor),
        metrics_(metrics),
        clock_(clock),
        usable_bytes_(std::move(usable_bytes)) {}

  /// Takes the reservation; its staging is free again before done is called, on the executor's thread. plane_checksums:
  /// one per plane. kBusy, and nothing is called, when the queue is full.
  Status submit(std::shared_ptr<Reservation> reservation, std::vector<std::uint64_t> plane_checksums, Done done);
  /// Puts what encode makes of the reservation into the store, on this thread. encode gets room for the largest
  /// container there can be and returns how long it is.
  using Encode = std::function<Result<std::size_t>(std::span<std::byte> out)>;
  Status store(const Reservation& reservation, const Encode& encode);
  /// A reader says that this chunk is corrupt: look, and quarantine it if it is. Dropped when the queue is full.
  void verify(std::shared_ptr<Lease> lease);

  /// Work that wait_idle() waits for while this lives. Move-only; the pipeline must outlive it.
  class Work {
   public:
    explicit Work(StorePipeline& pipeline) : pipeline_(&pipeline) { pipeline.begin_work(); }
    Work(Work&& other) noexcept : pipeline_(std::exchange(other.pipeline_, nullptr)) {}
    Work& operator=(Work&&) = delete;
    ~Work() {
      if (pipeline_ != nullptr) pipeline_->end_work();
    }

   private:
    StorePipeline* pipeline_;
  };
  /// Waits until there is no work. False after the time-out.
  bool wait_idle(std::chrono::milliseconds timeout);
  /// Everything that has not begun ends with kUnavailable from here on.
  void cancel() { cancelled_.store(true); }

  std::uint64_t stored() const { return stored_.load(std::memory_order_relaxed); }
  std::uint64_t failed() const { return failed_.load(std::memory_order_relaxed); }

 private:
  void begin_work();
  void end_work();
  Status encode_and_publish(const Reservation& reservation, const Encode& encode, const SpanPtr& span);

  ChunkStore& store_;
  TieredStore& tiers_;
  Executor& executor_;
  Metrics& metrics_;
  const Clock& clock_;
  const std::function<std::uint64_t()> usable_bytes_;
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable idle_;
  std::size_t unfinished_ = 0;
  std::atomic<std::uint64_t> stored_{0};
  std::atomic<std::uint64_t> failed_{0};
};

}  // namespace kvern
