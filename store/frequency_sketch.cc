#include "store/frequency_sketch.h"

#include <algorithm>
#include <array>
#include <bit>

#include "store/fingerprint_mix.h"

namespace kvern {

void FrequencySketch::grow(std::size_t fingerprints) {
  // Four counters per fingerprint: when as many were used once as there is room for, one in six of the others is taken
  // for used, and on average over the time between two halvings one in fifty.
  const std::size_t bytes = std::bit_ceil(fingerprints * 2);
  while (counters_.size() < bytes) {
    // A slot is the low bits of a hash: with one bit more, each half looks like the old table.
    const std::size_t half = counters_.size();
    counters_.resize(2 * half);
    std::copy_n(counters_.begin(), half, counters_.begin() + static_cast<std::ptrdiff_t>(half));
  }
}

std::uint32_t FrequencySketch::add(std::uint64_t fingerprint) {
  std::array<std::size_t, kRows> slots;
  std::uint32_t least = kMost;
  for (std::size_t row = 0; row < kRows; ++row) {
    slots[row] = slot(fingerprint, row);
    least = std::min(least, counter(slots[row]));
  }
  if (least < kMost) {
    for (const std::size_t each : slots) {
      if (counter(each) != least) continue;
      counters_[each / 2] = static_cast<std::uint8_t>(counters_[each / 2] + (each % 2 == 0 ? 1 : 16));
    }
  }
  if (++uses_ >= counters_.size() / 2 * kUsesPerFingerprint) {
    uses_ = 0;
    for (auto& two : counters_) two = static_cast<std::uint8_t>((two >> 1U) & 0x77U);
  }
  return least;
}

std::uint32_t FrequencySketch::estimate(std::uint64_t fingerprint) const {
  std::uint32_t least = kMost;
  for (std::size_t row = 0; row < kRows; ++row) least = std::min(least, counter(slot(fingerprint, row)));
  return least;
}

std::size_t FrequencySketch::slot(std::uint64_t fingerprint, std::size_t row) const {
  return static_cast<std::size_t>(mix_fingerprint(fingerprint, row + 1)) & (2 * counters_.size() - 1);
}

std::uint32_t FrequencySketch::counter(std::size_t slot) const {
  return slot % 2 == 0 ? counters_[slot / 2] & 15U : counters_[slot / 2] >> 4U;
}

}  // namespace kvern
