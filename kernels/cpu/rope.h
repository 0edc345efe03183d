#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "kernels/rope.h"

namespace kvern::rope {

/// Turns one row of dim elements by pairs cosines and sines. The signs of the sines are flipped by direction.
struct RowTurn {
  const float* cosines;
  const float* sines;
  std::uint32_t pairs;
  Style style;
  Direction direction;
};

/// count rows of a head; turn_stride floats lie between the turns of two rows (0: one for all).
void rotate_head(const std::byte* rows, std::size_t row_stride_bytes, DType dtype, std::uint32_t count,
                 std::uint32_t dim, RowTurn turn, std::size_t turn_stride, DType out_dtype, std::byte* out);

}  // namespace kvern::rope
