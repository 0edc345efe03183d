#pragma once

#include <cstddef>

namespace kvern {

/// How rows get into pages, apart from transposes.

/// The inner packing of values in vLLM's AMX pages: 16 columns of 2 tokens become 16 pairs. All rows hold 16 elements
/// of 2 bytes; pairs tells how many units of 64 packed bytes there are.

/// packed[p] = (rows[2p][0], rows[2p+1][0], rows[2p][1], …); rows lie row_stride_bytes apart.
void interleave_pairs(void* packed, const void* rows, std::size_t row_stride_bytes, std::size_t pairs);
/// The inverse.
void deinterleave_pairs(void* rows, std::size_t row_stride_bytes, const void* packed, std::size_t pairs);

/// Copies rows of row_bytes each to places that lie destination_stride_bytes apart, past the cache where rows are whole
/// aligned lines of 64 bytes. stream_fence() makes the stores visible to other threads.
void stream_rows(void* destination, std::size_t destination_stride_bytes, const void* rows, std::size_t row_bytes,
                 std::size_t count);

/// The inverse: rows that lie source_stride_bytes apart, put together without gaps.
void gather_rows(void* rows, std::size_t row_bytes, const void* source, std::size_t source_stride_bytes,
                 std::size_t count);

}  // namespace kvern
