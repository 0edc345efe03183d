#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/int8_arithmetic.h"

namespace kvern::int8 {

/// Planes up to this many elements per row: what the kernels keep on the stack.
constexpr std::uint32_t kMaxDim = 1024;

/// Encodes the plane (form.tokens rows of form.dim elements of form.dtype) into form.scales() scales and one code per
/// element. False, with the output in any state, when an element is not finite.
bool encode_plane(const Form& form, const std::byte* plane, std::uint16_t* scales, std::int8_t* codes);

/// Decodes rows [begin, end) of the plane to rows of the dtype. False, with the rows in any state, when a scale that it
/// needs is one that encoding cannot have made.
bool decode_rows(const Form& form, const std::uint16_t* scales, const std::int8_t* codes, std::uint32_t begin,
                 std::uint32_t end, std::byte* rows);

}  // namespace kvern::int8
