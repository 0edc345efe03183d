#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvern {

/// How often something was used of late, by fingerprint: a count-min sketch of four-bit counters that are halved now
/// and then (TinyLFU). Estimates are too high where fingerprints collide, never too low.
class FrequencySketch {
 public:
  static constexpr std::uint32_t kMost = 15;

  /// Room for about so many different fingerprints; counts stay.
  void grow(std::size_t fingerprints);
  /// Counts one use and returns how many there were before, up to kMost.
  std::uint32_t add(std::uint64_t fingerprint);
  std::uint32_t estimate(std::uint64_t fingerprint) const;
  std::size_t size_bytes() const { return counters_.size(); }

 private:
  // Four counters per fingerprint, each in a row of its own; two counters to the byte.
  static constexpr std::size_t kRows = 4;
  // Uses per fingerprint of room after which all counts are halved: what is older than that says little.
  static constexpr std::uint64_t kUsesPerFingerprint = 1;

  std::size_t slot(std::uint64_t fingerprint, std::size_t row) const;
  std::uint32_t counter(std::size_t slot) const;

  std::vector<std::uint8_t> counters_ = std::vector<std::uint8_t>(256);
  std::uint64_t uses_ = 0;
};

}  // namespace kvern
