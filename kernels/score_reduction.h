#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"

namespace kvern {

/// Scores of a layer whose heads are spread over tensor-parallel ranks. What ranks decide alike they must know alike:
/// CAKE's budgets follow from dispersion and shift summed over all heads (Observation::dispersion, shift), WindowKV's
/// windows from the mean over all heads of the windows' scores (window_scores()). Scores of tokens that each head keeps
/// for itself need no reduction.
///
/// Calls are collective: every rank makes the same calls with as many values, in the same order. All get the same bits.
/// For one thread at a time. Where values lie is the implementation's: host or device memory.
class ScoreReduction {
 public:
  virtual ~ScoreReduction() = default;

  virtual std::uint32_t ranks() const = 0;
  /// Replaces values by their sum over the ranks.
  virtual Status sum(std::span<double> values) = 0;
  /// Replaces values by their mean over the ranks, which is that over all heads when ranks have equally many.
  virtual Status mean(std::span<float> values) = 0;
};

/// Ranks that are threads of one process, with values in host memory; sums are in the order of the ranks. A call waits
/// until all ranks have made theirs: kInvalid, for all of them, when they differ; kUnavailable when a rank is
/// destroyed. kInvalid for no ranks.
Result<std::vector<std::unique_ptr<ScoreReduction>>> make_thread_reductions(std::uint32_t ranks);

}  // namespace kvern
