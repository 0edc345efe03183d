#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/observation.h"
#include "kernels/token_scores.h"
#include "kernels/window_scores.h"

struct CUstream_st;

namespace kvern::evict {

/// Scoring on the GPU, as kernels/observation.h, token_scores.h and window_scores.h define it; sums are added in
/// another order than on the CPU, and in the same order in every run. Calls queue their work on the stream and return;
/// the caller keeps all memory alive until the stream has got there. They neither allocate nor synchronise. All
/// pointers, those of the views too, are to memory that the device can reach.

/// Most rows of one query head: their attention to a tile of columns has to fit in shared memory.
constexpr std::uint32_t kMaxCudaRows = 256;
/// Largest head dimension.
constexpr std::uint32_t kMaxCudaDim = 256;

/// Where the results go. Shapes as in Observation.
struct CudaObservation {
  float* lse = nullptr;                 ///< [query head][row]
  float* mean = nullptr;                ///< [query head][column]
  float* variance = nullptr;            ///< [query head][column]; null: no dispersion and no shift either
  double* dispersion = nullptr;         ///< H then V, two numbers; null without variance
  std::uint64_t* not_finite = nullptr;  ///< logits that were not finite
};

/// Bytes of scratch that cuda_observe() needs, at an address divisible by 16.
std::size_t cuda_observation_bytes(const HeadRows& queries, const HeadRows& keys);

/// observe() with `columns` columns. kInvalid for arguments that do not fit or are beyond the limits above, kInternal
/// when a launch fails.
Status cuda_observe(const HeadRows& queries, const HeadRows& keys, std::uint32_t columns, float scale,
                    std::byte* scratch, const CudaObservation& out, CUstream_st* stream);

/// cake_scores(), from means and variances [query head][column] (variances may be null with a gamma of 0) to scores
/// [KV head][column].
Status cuda_cake_scores(const float* means, const float* variances, std::uint32_t query_heads, std::uint32_t kv_heads,
                        std::uint32_t columns, float gamma, const Pooling& pooling, float* scores, CUstream_st* stream);

/// window_scores(), from means [query head][column] of `rows` rows to rule.count(columns) scores.
Status cuda_window_scores(const float* means, std::uint32_t query_heads, std::uint32_t columns, std::uint32_t rows,
                          const WindowRule& rule, float* scores, CUstream_st* stream);

}  // namespace kvern::evict
