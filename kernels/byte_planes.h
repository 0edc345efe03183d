#pragma once

#include <cstddef>
#include <span>

namespace kvern {

/// Bytes of equal meaning side by side. Every element of element_bytes (1, 2 or 4; little-endian) is first turned left
/// by one bit, so that the sign leaves the top and the exponent of bfloat16 and float32 fills one byte: plane 0 of out
/// holds the lowest bytes, the last one the exponents. One-byte elements stay as they are. Both spans have the same
/// size, a multiple of element_bytes, and do not overlap.
void split_byte_planes(std::span<const std::byte> elements, std::size_t element_bytes, std::span<std::byte> planes);
/// The inverse.
void join_byte_planes(std::span<const std::byte> planes, std::size_t element_bytes, std::span<std::byte> elements);

}  // namespace kvern
