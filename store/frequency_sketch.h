#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvern {

/// How often something was used of late, by fingerprint: a count-min sketch (TinyLFU) whose counters are all halved
/// once as many uses were counted as there is room for fingerprints. Estimates are too high where fingerprints collide,
/// never too low.
class FrequencySketch {
 public:
  /// Counts go up to most: 3 (two bits per counter) or 15 (four bits).
  explicit FrequencySketch(std::uint32_t most) : bits_(most > 3 ? 4 : 2), most_((1U << bits_) - 1) {}

  /// Room for about so many different fingerprints; counts stay.
  void grow(std::size_t fingerprints);
  /// Counts one use and returns how many there were before.
  std::uint32_t add(std::uint64_t fingerprint);
  std::uint32_t estimate(std::uint64_t fingerprint) const;

 private:
  static constexpr std::size_t kRows = 4;  // counters per fingerprint

  std::size_t slots() const { return bytes_.size() * 8 / bits_; }
  std::size_t slot(std::uint64_t fingerprint, std::size_t row) const;
  std::uint32_t counter(std::size_t slot) const;
  void increment(std::size_t slot);

  const std::uint32_t bits_;  // per counter
  const std::uint32_t most_;
  std::vector<std::uint8_t> bytes_ = std::vector<std::uint8_t>(512);
  std::uint64_t uses_ = 0;
};

}  // namespace kvern
