#pragma once

#include <cstddef>

namespace kvern {

/// destination[column][row] = source[row][column] for rows x columns elements of element_bytes each. Strides are the
/// distance between rows in bytes, of any value and alignment; areas do not overlap. Fast for elements of 2 and 4 bytes
/// and for row and column counts that are multiples of 8; every other case is right and slower.
void transpose(void* destination, std::size_t destination_stride_bytes, const void* source,
               std::size_t source_stride_bytes, std::size_t rows, std::size_t columns, std::size_t element_bytes);

}  // namespace kvern
