#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "kernels/quantise_arithmetic.h"

struct CUstream_st;
namespace kvern::cuda {
struct PagedRows;
}

namespace kvern::quantise {

/// The forms fp8, int4, int3, int2 and int8r on the GPU, byte for byte as kernels/cpu/quantise.h makes them, gaps
/// between the parts of a section included (zeros). Calls queue their work on the stream and return; the caller keeps
/// all memory alive until the stream has got there. They neither allocate nor synchronise. Pointers are to memory that
/// the device can reach, aligned to 64 bytes (sections) or 16 (planes, rows), as are the strides.

/// Encodes planes (form.tokens rows of form.dim elements) that lie plane_stride bytes apart into sections of
/// form.section_bytes() that lie section_stride bytes apart. *not_finite, zero before, becomes 1 when an element is not
/// finite: then the sections are worthless. kInvalid for arguments that do not fit, kInternal when the launch fails.
Status cuda_encode_planes(const Form& form, const std::byte* planes, std::size_t plane_stride, std::uint32_t count,
                          std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite,
                          CUstream_st* stream);

/// The same of planes whose rows lie in pages (kernels/cuda/rows.cuh): the first form.tokens of count planes.
Status cuda_encode_pages(const Form& form, const cuda::PagedRows& rows, std::uint32_t count, std::byte* sections,
                         std::size_t section_stride, std::uint32_t* not_finite, CUstream_st* stream);

/// Decodes tokens [begin, end) of sections to rows of the dtype without gaps, those of different sections rows_stride
/// bytes apart. *invalid, zero before, becomes 1 when a scale or code is one that encoding cannot have made.
Status cuda_decode_rows(const Form& form, const std::byte* sections, std::size_t section_stride, std::uint32_t count,
                        std::uint32_t begin, std::uint32_t end, std::byte* rows, std::size_t rows_stride,
                        std::uint32_t* invalid, CUstream_st* stream);

}  // namespace kvern::quantise
