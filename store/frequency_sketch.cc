#include "store/frequency_sketch.h"

#include <algorithm>
#include <array>
#include <bit>

#include "store/fingerprint_mix.h"

namespace kvern {
namespace {

// Twice the counters of a fingerprint. When as many were used once as there is room for, one in forty of the others is
// taken for used, and one in several hundred half-way to there; with half of the room, recognising chunks so badly cost
// a tenth of the gain over LRU on the conversation trace.
constexpr std::size_t kSlotsPerFingerprint = 8;

}  // namespace

void FrequencySketch::grow(std::size_t fingerprints) {
  const std::size_t bytes = std::bit_ceil(fingerprints * kSlotsPerFingerprint * bits_ / 8);
  while (bytes_.size() < bytes) {
    // A slot is the low bits of a hash: with one bit more, each half looks like the old table.
    const std::size_t half = bytes_.size();
    bytes_.resize(2 * half);
    std::copy_n(bytes_.begin(), half, bytes_.begin() + static_cast<std::ptrdiff_t>(half));
  }
}

std::uint32_t FrequencySketch::add(std::uint64_t fingerprint) {
  std::array<std::size_t, kRows> slots_of;
  std::uint32_t least = most_;
  for (std::size_t row = 0; row < kRows; ++row) {
    slots_of[row] = slot(fingerprint, row);
    least = std::min(least, counter(slots_of[row]));
  }
  if (least < most_) {
    for (const std::size_t each : slots_of) {
      if (counter(each) == least) increment(each);
    }
  }
  if (++uses_ >= slots() / kSlotsPerFingerprint) {
    uses_ = 0;
    const std::uint32_t kept = bits_ == 4 ? 0x77U : 0x55U;
    for (auto& several : bytes_) several = static_cast<std::uint8_t>((several >> 1U) & kept);
  }
  return least;
}

std::uint32_t FrequencySketch::estimate(std::uint64_t fingerprint) const {
  std::uint32_t least = most_;
  for (std::size_t row = 0; row < kRows; ++row) least = std::min(least, counter(slot(fingerprint, row)));
  return least;
}

std::size_t FrequencySketch::slot(std::uint64_t fingerprint, std::size_t row) const {
  return static_cast<std::size_t>(mix_fingerprint(fingerprint, row + 1)) & (slots() - 1);
}

std::uint32_t FrequencySketch::counter(std::size_t slot) const {
  return (std::uint32_t{bytes_[slot * bits_ / 8]} >> (slot * bits_ % 8)) & most_;
}

void FrequencySketch::increment(std::size_t slot) {
  std::uint8_t& several = bytes_[slot * bits_ / 8];
  several = static_cast<std::uint8_t>(several + (1U << (slot * bits_ % 8)));
}

}  // namespace kvern
