#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/status.h"
#include "kernels/score_reduction.h"

struct CUstream_st;

namespace kvern {

/// What the ranks of a group have in common: made by one of them and told to the others.
using NcclId = std::array<std::byte, 128>;

/// kUnavailable, with the reason, where libnccl.so.2 is not installed or not usable. It is opened at the first call.
Result<NcclId> make_nccl_id();

/// Ranks of one or more processes, each with a device of its own: that which is current. Waits until all have come.
/// Values lie in device memory; calls queue their work on the stream and return, so a rank that never comes is seen by
/// the stream alone. kUnavailable as make_nccl_id(); kInvalid for a rank that there is not; kInternal when NCCL fails.
Result<std::unique_ptr<ScoreReduction>> make_nccl_reduction(const NcclId& id, std::uint32_t rank, std::uint32_t ranks,
                                                            CUstream_st* stream);

}  // namespace kvern
