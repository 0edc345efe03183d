#pragma once

#include <cstdint>

namespace kvern::align {

/// out[token] = rows[token] times matrix [n][n], rows of n floats without gaps; n a multiple of 16.
void multiply(const float* rows, std::uint32_t tokens, const float* matrix, std::uint32_t n, float* out);

}  // namespace kvern::align
