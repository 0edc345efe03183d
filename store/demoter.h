#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string_view>
#include <thread>
#include <vector>

#include "base/status.h"
#include "store/chunk_store.h"
#include "store/transcode.h"

namespace kvern {

/// Why a step down a ladder came to nothing.
enum class DemotionRefusal {
  kInUse,    ///< somebody holds the chunk
  kNoRoom,   ///< for the new form beside the old one
  kCodec,    ///< the form cannot carry these values or this shape
  kError,    ///< the form came out weaker than allowed
  kCorrupt,  ///< the old form is damaged
  kGone,     ///< evicted, superseded or flushed meanwhile
  kCount
};
std::string_view refusal_name(DemotionRefusal why);

/// Told of every step. Must not block or throw.
class DemotionObserver {
 public:
  virtual ~DemotionObserver() = default;
  virtual void demoted(std::string_view codec_spec, std::uint64_t bytes_before, std::uint64_t bytes_after, double error,
                       double seconds) = 0;
  virtual void refused(DemotionRefusal why) = 0;
};

struct DemoterConfig {
  /// 0: none of its own; somebody calls step().
  std::size_t threads = 1;
  /// While others have work a thread waits before each chunk, at most so long: it must get on under steady load, too,
  /// or everything would be dropped instead.
  std::int64_t patience_ns = 20'000'000;
};

/// Carries out what ChunkStore::next_demotion() names, whenever the DRAM tier is short of room. Its threads have the
/// lowest priority that there is.
class Demoter {
 public:
  /// store, clock and observer outlive it. others_have_work: whether stores or loads wait for a processor.
  /// usable_bytes: how much of the slab can be written yet; null: all.
  Demoter(ChunkStore& store, const DemoterConfig& config, const Clock& clock, DemotionObserver& observer,
          std::function<bool()> others_have_work, std::function<std::uint64_t()> usable_bytes = nullptr);
  ~Demoter() { stop(); }
  Demoter(const Demoter&) = delete;
  Demoter& operator=(const Demoter&) = delete;

  /// There may be something to do. Never blocks.
  void wake();
  /// Finishes the chunks in hand and ends the threads.
  void stop();
  /// One chunk, on the caller's thread. False when nothing is to be done for now.
  bool step(Transcoder& transcoder);

 private:
  void run();
  void yield_to_others();
  Status carry_out(const DemotionOrder& order, Transcoder& transcoder);
  Result<WriteTicket> make_room(std::uint64_t bytes);

  ChunkStore& store_;
  const DemoterConfig config_;
  const Clock& clock_;
  DemotionObserver& observer_;
  const std::function<bool()> others_have_work_;
  const std::function<std::uint64_t()> usable_bytes_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t wakes_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvern
