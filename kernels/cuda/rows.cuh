#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstddef>
#include <cstdint>

#include "kernels/paged_cache.h"

/// Where the kernels that encode read rows: in planes, or in the engine's pages. A kernel takes either as a parameter
/// Rows, asks it once for its plane and then for rows of it, or for the packs of a run through all rows.
namespace kvern::cuda {

/// Divides numbers below 2^31 by one from 1 to 2^31, with a product in place of the division (Granlund and Montgomery,
/// Division by invariant integers using multiplication, PLDI 1994).
class Divisor {
 public:
  static constexpr std::uint64_t kEnd = 1ULL << 31;  ///< of what it divides

  explicit constexpr Divisor(std::uint32_t value)
      : value_(value),
        shift_(static_cast<std::uint32_t>(std::bit_width(value - 1))),
        multiplier_(static_cast<std::uint32_t>((((1ULL << shift_) - value) << 32) / value + 1)) {}

  struct Parts {
    std::uint32_t quotient;
    std::uint32_t remainder;
  };
  __device__ Parts divide(std::uint32_t dividend) const {
    const std::uint32_t quotient = (__umulhi(dividend, multiplier_) + dividend) >> shift_;
    return {quotient, dividend - quotient * value_};
  }

 private:
  std::uint32_t value_;
  std::uint32_t shift_;
  std::uint32_t multiplier_;
};

/// Planes of rows without gaps, plane_stride bytes apart.
struct PlanarRows {
  const std::byte* first;
  std::size_t plane_stride;
  std::uint32_t row_bytes;

  struct Plane {
    const std::byte* first;
    std::uint32_t row_bytes;

    __device__ const std::byte* row(std::uint32_t token) const { return first + std::size_t{token} * row_bytes; }
    /// Packs are numbered row by row.
    template <std::uint32_t kPackBytes>
    __device__ const std::byte* pack(std::size_t index, const Divisor&) const {
      return first + index * kPackBytes;
    }
  };
  /// Rows begin at this byte of them.
  __device__ Plane plane(std::uint32_t index, std::size_t byte) const {
    return {first + index * plane_stride + byte, row_bytes};
  }
};

/// The rows of one part, K or V, of a chunk in pages of a cache: planes [layer][head], those of the cache, with fewer
/// than Divisor::kEnd packs each. Addresses are multiples of 16. Owns nothing.
struct PagedRows {
  const PagedLayer* layers;    ///< device memory: those of the cache
  const std::uint32_t* pages;  ///< device memory: the chunk's, each of which the cache has
  Divisor page_tokens;
  Divisor heads;
  bool value;

  struct Plane {
    const std::byte* first;  ///< of page 0
    std::uint64_t page_stride;
    std::uint64_t token_stride;
    const std::uint32_t* pages;
    Divisor page_tokens;

    __device__ const std::byte* row(std::uint32_t token) const {
      const Divisor::Parts at = page_tokens.divide(token);
      const std::byte* row = first + pages[at.quotient] * page_stride + at.remainder * token_stride;
      // Which the compiler cannot know of an address out of memory; generic loads take more instructions.
      __builtin_assume(__isGlobal(row));
      return row;
    }
    /// Packs are numbered row by row, row_packs in each.
    template <std::uint32_t kPackBytes>
    __device__ const std::byte* pack(std::size_t index, const Divisor& row_packs) const {
      const Divisor::Parts at = row_packs.divide(static_cast<std::uint32_t>(index));
      return row(at.quotient) + std::size_t{at.remainder} * kPackBytes;
    }
  };
  /// Rows begin at this byte of them.
  __device__ Plane plane(std::uint32_t index, std::size_t byte) const {
    const Divisor::Parts at = heads.divide(index);
    const PagedLayer& layer = layers[at.quotient];
    return {layer.base + at.remainder * layer.head_stride_bytes + (value ? layer.value_offset_bytes : 0) + byte,
            layer.page_stride_bytes, layer.token_stride_bytes, pages, page_tokens};
  }
};

}  // namespace kvern::cuda
