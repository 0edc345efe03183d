#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "kernels/head_rows.h"
#include "kernels/merge.h"

/// Work on a few rows of one head, on one thread, with the best instruction set of the machine.
namespace kvern::merge {

/// Rows of one head.
struct Rows {
  DType dtype = DType::kFloat32;
  const std::byte* data = nullptr;
  std::size_t stride_bytes = 0;
  std::uint32_t count = 0;
  std::uint32_t dim = 0;

  static Rows of(const HeadRows& rows, std::size_t head, std::size_t token, std::uint32_t count) {
    return {rows.dtype, rows.row(head, token), rows.token_stride_bytes, count, rows.dim};
  }
};

void measure_rows(const Rows& x, const Rows& y, float* angles);
/// out: pointers to the first row's parts.
void merge_rows(const Rows& x, const Rows& y, float weight, const MergedRows& out);
void scale_rows(const Rows& directions, const float* lengths, std::byte* out);
void row_lengths(const Rows& rows, float* lengths);

}  // namespace kvern::merge
