#pragma once

#include <cstddef>

#include "base/status.h"
#include "kernels/attend.h"

struct CUstream_st;

namespace kvern {

/// attend() on the GPU. The problem's spans and segments are read during the call; all that they point to (queries,
/// rows, indices, lengths, biases, positions) lies in memory that the device can reach, and stays there until the
/// stream has got so far. Queues its work and returns; neither allocates nor synchronises nor copies.
///
/// Equal to the CPU within rounding, not bit for bit; the same bits from run to run on one kind of device.
/// kRefused for segments with a reader: decode them on the device first. Else as attend(); kInternal when a launch
/// fails.
Status cuda_attend(const AttendProblem& problem, float* workspace, std::size_t workspace_floats, float* output,
                   float* lse, CUstream_st* stream);

/// Floats of device memory that cuda_attend() needs for a valid problem, on any device.
std::size_t cuda_attend_workspace_floats(const AttendProblem& problem);

}  // namespace kvern
