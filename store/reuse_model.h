#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "store/frequency_sketch.h"

namespace kvern {

/// Learns when chunks are used again, and says what keeping one is worth.
///
/// Time is the number of uses of all chunks. A chunk's *class* is how often it was used before (kClasses - 1: that
/// often or more), its *age* the time since its last use, on a scale of steps that grow by the square root of two. For
/// each class the model estimates the hazard, the probability that a chunk which reached an age is used before the next
/// one, from a sample of all chunks that it follows whether they are stored or not. From that comes the worth of
/// keeping: the best ratio, over all times that one may wait, of the probability of a use to the expected time until it
/// or until one stops waiting (the Gittins index). Where reuse becomes less likely with age, this orders chunks as LRU
/// does; where chunks come back after a typical pause that is too long for the store, those that are half-way are worth
/// more than new ones, and a part of them is kept long enough instead of none.
///
/// Memory: 1.5 MiB for the sample, 32 to 64 bytes per chunk for the counts.
class ReuseModel {
 public:
  static constexpr std::size_t kClasses = 4;
  static constexpr std::size_t kAges = 56;  // the last one begins at 2^30 uses
  /// Times need no more bits: a use each nanosecond for two years.
  static constexpr unsigned kTimeBits = 56;
  static constexpr std::uint64_t kTimeMask = (std::uint64_t{1} << kTimeBits) - 1;
  static std::size_t age_step(std::uint64_t age);

  ReuseModel();

  /// The store holds so many chunks now: how far back the model looks follows the most that it ever held.
  void set_stored(std::size_t chunks);
  /// The chunk is used now; returns its class from now on.
  std::size_t use(std::uint64_t fingerprint);
  std::uint64_t now() const { return now_; }
  /// Expected uses per use of any chunk, of one in that class and of that age step.
  double worth(std::size_t chunk_class, std::size_t step) const { return worth_[chunk_class][step]; }

 private:
  struct Sampled {
    std::uint64_t fingerprint = 0;
    std::uint64_t used_at : kTimeBits = 0;
    std::uint64_t chunk_class : 2 = 0;
    bool is_last_use : 1 = false;
  };
  static_assert(sizeof(Sampled) == 16 && kClasses <= 4);
  using PerAge = std::array<double, kAges>;

  std::uint64_t horizon() const;
  void sample_less();
  void halve_counts();
  void let_age();
  void forget_oldest();
  std::size_t find(std::uint64_t fingerprint) const;
  void unlink(std::size_t slot);
  void estimate();

  std::uint64_t now_ = 0;
  std::size_t most_stored_ = 0;
  FrequencySketch counts_{kClasses - 1};

  // The sample: a ring of uses in order, and an open hash table of those that are the last of their chunk.
  std::vector<Sampled> ring_;
  std::vector<std::uint32_t> table_;
  std::uint64_t oldest_ = 0;
  std::uint64_t next_ = 0;
  unsigned sampling_bits_ = 0;                  // one chunk in 2^bits is followed
  std::array<std::uint64_t, kAges> reached_{};  // by age step: the first use in the ring that has not come to it

  std::array<PerAge, kClasses> at_risk_{};
  std::array<PerAge, kClasses> used_{};
  std::array<PerAge, kClasses> worth_{};
  std::uint64_t estimate_at_ = 0;
  std::uint64_t forget_at_ = 0;
};

}  // namespace kvern
