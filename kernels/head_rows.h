#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace kvern {

/// The K, V or Q rows of one layer, [head][token][dim], with any strides between heads and tokens; the elements of a
/// row lie side by side. Borrows the memory. No alignment beyond the element's own is assumed.
struct HeadRows {
  const std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  std::uint32_t heads = 0;
  std::uint32_t tokens = 0;
  std::uint32_t dim = 0;
  std::size_t head_stride_bytes = 0;
  std::size_t token_stride_bytes = 0;

  constexpr const std::byte* row(std::size_t head, std::size_t token) const {
    return data + head * head_stride_bytes + token * token_stride_bytes;
  }

  /// Rows without gaps.
  static HeadRows contiguous(const std::byte* data, DType dtype, std::uint32_t heads, std::uint32_t tokens,
                             std::uint32_t dim) {
    const std::size_t row_bytes = std::size_t{dim} * dtype_bytes(dtype);
    return {data, dtype, heads, tokens, dim, row_bytes * tokens, row_bytes};
  }
};

}  // namespace kvern
