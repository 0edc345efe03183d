#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/quantise_arithmetic.h"

namespace kvern::quantise {

/// Planes up to this many elements per row: what the kernels keep on the stack.
constexpr std::uint32_t kMaxDim = 1024;

/// Encodes the plane (form.tokens rows of form.dim elements of form.dtype) into form.section_bytes() bytes, aligned to
/// 64. The gaps between the parts of the section are left alone. False, with the section in any state, when an element
/// is not finite.
bool encode_plane(const Form& form, const std::byte* plane, std::byte* section);

/// Decodes rows [begin, end) of a section (form.section_bytes() bytes, aligned to 64) to rows of the dtype. False, with
/// the rows in any state, when a scale or code that it needs is one that encoding cannot have made.
bool decode_rows(const Form& form, const std::byte* section, std::uint32_t begin, std::uint32_t end, std::byte* rows);

}  // namespace kvern::quantise
