#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "kernels/head_rows.h"

struct CUstream_st;

namespace kvern::evict {

/// Scores that need no query on the GPU, as kernels/key_scores.h defines them, to scores [KV head][token]. Calls queue
/// their work on the stream and return; they neither allocate nor synchronise. Pointers are to memory that the device
/// can reach. kInvalid for no float type, no dim, or more than 65535 heads; kInternal when a launch fails.
Status cuda_knorm_scores(const HeadRows& keys, float* scores, CUstream_st* stream);

/// Bytes of scratch that cuda_keydiff_scores() needs, at an address divisible by 4.
std::size_t cuda_keydiff_bytes(const HeadRows& keys);
Status cuda_keydiff_scores(const HeadRows& keys, std::byte* scratch, float* scores, CUstream_st* stream);

}  // namespace kvern::evict
