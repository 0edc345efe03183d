#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/rope.h"

struct CUstream_st;

namespace kvern::rope {

/// kernels/rope.h on the GPU, with the same results bit by bit. Calls queue their work on the stream and return; the
/// caller keeps all memory alive until the stream has got there. They neither allocate nor synchronise. Pointers are to
/// memory that the device can reach.

/// Fills the turns of rows: row i stands at positions[i], or at first + i where positions is null. cosines and sines:
/// [rows][pairs].
Status cuda_turns(const double* inverse_frequencies, std::uint32_t pairs, const std::int64_t* positions,
                  std::int64_t first, std::uint32_t rows, float* cosines, float* sines, CUstream_st* stream);

/// rotate() of rows, their data in device memory as turns and out are. No finite value is made infinite.
Status cuda_rotate(const HeadRows& rows, TurnsView turns, Style style, Direction direction, DType out_dtype,
                   std::byte* out, CUstream_st* stream);

}  // namespace kvern::rope
