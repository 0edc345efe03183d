#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "store/eviction_policy.h"
#include "store/ladder.h"

namespace kvern {

struct DemotionConfig {
  /// What a relative error of 1 costs in units of a hit that is lost: at 2, a hit with an error of 0.15 is worth 0.7.
  /// 0: only hits count; 4: rungs below int4 do not pay on the traces of docs/planner.md.
  double error_price = 1;
  /// How many chunks of each rung are compared for the one with the least expected use.
  std::uint32_t sample_chunks = 16;
  Status validate() const;
};

/// Which chunks of a tier step down their ladders, and which leave, when bytes are needed.
///
/// What a chunk is worth is its expected use, less the share that its error takes away. Of all steps that are open the
/// one is taken that loses least worth per byte freed; leaving is one of them. How far down a chunk steps at once
/// follows the going price of a byte, which is what the latest steps have lost per byte: under light pressure one rung,
/// under heavy pressure past rungs that would be left again soon, and from which the strongest ones must not be made.
///
/// Pure bookkeeping: whoever asks carries the steps out, and says so. Deterministic. Not thread-safe.
class Demotion {
 public:
  struct Step {
    std::uint32_t chunk = kNoChunk;
    std::optional<StoredForm> to;  ///< nullopt: it leaves
    double freed_bytes = 0;
    double loss_per_byte = 0;
  };
  struct RungFigures {
    std::uint64_t chunks = 0;
    double bytes = 0;
    std::uint64_t steps_to = 0;  ///< ever taken to this rung
  };

  /// Throws std::invalid_argument when the configuration is not valid.
  explicit Demotion(const DemotionConfig& config);

  /// Returns the ladder's number here. A ladder of one rung is one whose chunks only leave.
  std::size_t add_ladder(Ladder ladder);
  const Ladder& ladder(std::size_t number) const { return ladders_[number].ladder; }

  void entered(std::uint32_t chunk, std::size_t ladder, StoredForm form, double raw_bytes);
  void left(std::uint32_t chunk);
  /// The step was taken.
  void stepped(std::uint32_t chunk, StoredForm to);
  StoredForm form(std::uint32_t chunk) const { return chunks_[chunk].form; }
  /// Of a chunk that is known.
  double bytes(std::uint32_t chunk) const;

  /// The step to take next; nullopt when the tier is empty. Without a step taken, the next call may name another.
  std::optional<Step> next(EvictionPolicy& policy);

  RungFigures figures(std::size_t ladder, std::size_t rung) const;

 private:
  struct Chunk {
    double raw_bytes = 0;
    std::uint32_t place = kNoChunk;  ///< among the members of its rung
    std::uint16_t ladder = 0;
    StoredForm form;
  };
  struct OfRung {
    std::vector<std::uint32_t> members;
    double raw_bytes = 0;
    std::uint64_t steps_to = 0;
  };
  struct OfLadder {
    Ladder ladder;
    std::vector<OfRung> rungs;
  };

  bool contains(std::uint32_t chunk) const { return chunk < chunks_.size() && chunks_[chunk].place != kNoChunk; }
  OfRung& rung_of(const Chunk& chunk) { return ladders_[chunk.ladder].rungs[chunk.form.rung]; }
  void join(std::uint32_t chunk);
  void leave(std::uint32_t chunk);
  Step drop(std::uint32_t chunk, const EvictionPolicy& policy) const;
  std::optional<Step> step_down(const OfLadder& ladder, std::size_t rung, const EvictionPolicy& policy);
  double worth_left(double error) const;

  const DemotionConfig config_;
  std::vector<OfLadder> ladders_;
  std::vector<Chunk> chunks_;
  double price_ = 0;  // of a byte
  std::uint64_t random_ = 0;
};

}  // namespace kvern
