#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "kernels/head_rows.h"

struct CUstream_st;

namespace kvern::evict {

/// Selection and compaction on the GPU, as kernels/selection.h defines them, index for index and byte for byte. Calls
/// queue their work on the stream and return; they neither allocate nor synchronise, and no index passes through the
/// host. Pointers are to memory that the device can reach.

/// Bytes of scratch that cuda_select_best() needs, at an address divisible by 8.
std::size_t cuda_selection_bytes(std::uint32_t heads, std::uint32_t tokens);

/// Of scores [head][tokens] per head the `count` best, ascending, then the `tail` tokens after the scored ones: kept is
/// [head][min(count, tokens) + tail]. kInvalid for more than 65535 heads, kInternal when the launch fails.
Status cuda_select_best(const float* scores, std::uint32_t heads, std::uint32_t tokens, std::uint32_t count,
                        std::uint32_t tail, std::byte* scratch, std::uint32_t* kept, CUstream_st* stream);

/// Copies rows kept[head][0 … count) of each head to out, [head][count][dim]. Tokens must be among the rows.
Status cuda_gather_rows(const HeadRows& rows, const std::uint32_t* kept, std::uint32_t count, std::byte* out,
                        CUstream_st* stream);

}  // namespace kvern::evict
