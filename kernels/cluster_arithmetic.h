#pragma once

#include <bit>
#include <cstdint>

#include "kernels/element.h"

/// How entries are cut into pieces and ordered, shared by CPU and GPU.
namespace kvern::cluster {

/// Entries [begin, begin + count) of a head, of which at most `merges` join others.
struct Span {
  std::uint32_t begin = 0;
  std::uint32_t count = 0;
  std::uint32_t merges = 0;
};

/// How the entries of a head are cut: sinks, the body in chunks, recent ones. Sinks and recent entries are cut into
/// chunks too, in which nothing merges.
struct Cut {
  std::uint32_t chunk = 0;
  std::uint32_t merges = 0;  ///< in a full chunk of the body
  std::uint32_t sinks_end = 0;
  std::uint32_t body_end = 0;
  std::uint32_t entries = 0;

  KVERN_HOST_DEVICE static constexpr Cut of(std::uint32_t entries, std::uint32_t sinks, std::uint32_t recent,
                                            std::uint32_t chunk, std::uint32_t merges) {
    const std::uint32_t sinks_end = sinks < entries ? sinks : entries;
    const std::uint32_t before_recent = recent < entries ? entries - recent : 0;
    return {chunk, merges, sinks_end, before_recent > sinks_end ? before_recent : sinks_end, entries};
  }
  KVERN_HOST_DEVICE constexpr std::uint32_t chunks(std::uint32_t count) const { return (count + chunk - 1) / chunk; }
  KVERN_HOST_DEVICE constexpr std::uint32_t pieces() const {
    return chunks(sinks_end) + chunks(body_end - sinks_end) + chunks(entries - body_end);
  }
  KVERN_HOST_DEVICE constexpr Span piece(std::uint32_t number) const {
    if (number < chunks(sinks_end)) return within(0, sinks_end, number, 0);
    number -= chunks(sinks_end);
    if (number < chunks(body_end - sinks_end)) return within(sinks_end, body_end, number, merges);
    return within(body_end, entries, number - chunks(body_end - sinks_end), 0);
  }
  /// r of a chunk of so many entries.
  KVERN_HOST_DEVICE static constexpr std::uint32_t merges_of(std::uint32_t count, std::uint32_t merges_per_chunk,
                                                             std::uint32_t chunk) {
    const std::uint32_t share = count * merges_per_chunk / chunk;
    return share < count / 2 ? share : count / 2;
  }

 private:
  KVERN_HOST_DEVICE constexpr Span within(std::uint32_t first, std::uint32_t end, std::uint32_t number,
                                          std::uint32_t merges_per_chunk) const {
    const std::uint32_t begin = first + number * chunk;
    const std::uint32_t count = end - begin < chunk ? end - begin : chunk;
    return {begin, count, merges_of(count, merges_per_chunk, chunk)};
  }
};

/// Larger for a higher similarity; of equal ones for the lower index. Of similarities that are not NaN.
KVERN_HOST_DEVICE inline std::uint64_t rank(float similarity, std::uint32_t index) {
  const auto bits = std::bit_cast<std::uint32_t>(similarity + 0.0F);
  const std::uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  return (std::uint64_t{ordered} << 32) | ~index;
}

}  // namespace kvern::cluster
