#pragma once

#include "base/status.h"
#include "kernels/merge.h"

struct CUstream_st;

namespace kvern::merge {

/// merge_layers() on the GPU, bit for bit the same; all pointers are to memory that the device can reach. Queues its
/// work on the stream and returns; neither allocates nor synchronises. kInvalid as there, and for directions that are
/// neither of the layers' dtype nor fp32; kInternal when the launch fails.
Status cuda_merge_layers(const HeadRows& x, const HeadRows& y, float weight, const MergedRows& out,
                         CUstream_st* stream);

/// restore_rows() on the GPU, bit for bit the same. directions [head][token][dim] without gaps, lengths [head][token].
Status cuda_restore_rows(const HeadRows& directions, const float* lengths, std::byte* out, CUstream_st* stream);

}  // namespace kvern::merge
