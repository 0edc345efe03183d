#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/selection.h"
#include "kernels/score_order.h"

namespace kvern::evict {
namespace {

using namespace cuda;

/// Threads of a head's block: a whole block walks the scores of one head, so as many as there can be.
constexpr unsigned kSelectThreads = 1024;
constexpr unsigned kSelectWarps = kSelectThreads / kWarp;
constexpr unsigned kDigitBits = 8;
constexpr unsigned kDigits = 1U << kDigitBits;
constexpr unsigned kGatherThreads = 256;

/// The rank of the wanted-th best score, digit by digit from the top, and how many of its equals are kept.
struct Threshold {
  std::uint32_t rank;
  std::uint32_t ties;
};

__device__ Threshold find_threshold(const float* scores, std::uint32_t tokens, std::uint32_t wanted) {
  __shared__ unsigned histogram[kDigits];
  __shared__ Threshold shared;
  if (threadIdx.x == 0) shared = {0, wanted};
  std::uint32_t mask = 0;
  for (unsigned shift = 32; shift > 0;) {
    shift -= kDigitBits;
    for (unsigned i = threadIdx.x; i < kDigits; i += kSelectThreads) histogram[i] = 0;
    __syncthreads();
    const std::uint32_t prefix = shared.rank;
    for (std::uint32_t i = threadIdx.x; i < tokens; i += kSelectThreads) {
      const std::uint32_t rank = score_rank(scores[i]);
      if ((rank & mask) == prefix) atomicAdd(&histogram[(rank >> shift) % kDigits], 1U);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned digit = kDigits - 1;
      for (; histogram[digit] < shared.ties; --digit) shared.ties -= histogram[digit];
      shared.rank |= digit << shift;
    }
    mask |= (kDigits - 1) << shift;
    __syncthreads();
  }
  return shared;
}

/// How many threads before this one have the flag set, and how many in all. All threads of the block call it.
__device__ std::uint32_t count_before(bool flag, unsigned* of_warp, std::uint32_t& all) {
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned votes = __ballot_sync(kEveryLane, flag);
  if (threadIdx.x % kWarp == 0) of_warp[warp] = static_cast<unsigned>(__popc(votes));
  __syncthreads();
  std::uint32_t before = static_cast<std::uint32_t>(__popc(votes & ((1U << threadIdx.x % kWarp) - 1)));
  all = 0;
  for (unsigned i = 0; i < kSelectWarps; ++i) {
    if (i < warp) before += of_warp[i];
    all += of_warp[i];
  }
  __syncthreads();
  return before;
}

/// One block per head.
__global__ void select_best_kernel(const float* all_scores, std::uint32_t tokens, std::uint32_t count,
                                   std::uint32_t tail, std::uint32_t* all_kept) {
  __shared__ unsigned of_warp[kSelectWarps];
  const float* scores = all_scores + std::size_t{blockIdx.x} * tokens;
  std::uint32_t* kept = all_kept + std::size_t{blockIdx.x} * (count + tail);
  for (std::uint32_t i = threadIdx.x; i < tail; i += kSelectThreads) kept[count + i] = tokens + i;
  if (count == 0) return;
  const Threshold threshold = find_threshold(scores, tokens, count);
  std::uint32_t written = 0;
  std::uint32_t ties_seen = 0;
  for (std::uint32_t first = 0; first < tokens; first += kSelectThreads) {
    const std::uint32_t token = first + threadIdx.x;
    const std::uint32_t rank = token < tokens ? score_rank(scores[token]) : 0;
    const bool ties = token < tokens && rank == threshold.rank;
    std::uint32_t ties_here = 0;
    const std::uint32_t ties_before = ties_seen + count_before(ties, of_warp, ties_here);
    const bool keep = token < tokens && (rank > threshold.rank || (ties && ties_before < threshold.ties));
    std::uint32_t kept_here = 0;
    const std::uint32_t at = written + count_before(keep, of_warp, kept_here);
    if (keep) kept[at] = token;
    written += kept_here;
    ties_seen += ties_here;
  }
}

/// One warp per row, `Unit` bytes per lane and step.
template <typename Unit>
__global__ void gather_kernel(HeadRows rows, const std::uint32_t* kept, std::uint32_t count, std::uint32_t units,
                              std::byte* out) {
  const std::uint32_t at = blockIdx.x * (kGatherThreads / kWarp) + threadIdx.x / kWarp;
  if (at >= count) return;
  const std::size_t to = std::size_t{blockIdx.y} * count + at;
  const auto* source = reinterpret_cast<const Unit*>(rows.row(blockIdx.y, kept[to]));
  auto* target = reinterpret_cast<Unit*>(out) + to * units;
  for (std::uint32_t i = threadIdx.x % kWarp; i < units; i += kWarp) target[i] = source[i];
}

}  // namespace

Status cuda_select_best(const float* scores, std::uint32_t heads, std::uint32_t tokens, std::uint32_t count,
                        std::uint32_t tail, std::uint32_t* kept, CUstream_st* stream) {
  if (heads > 65535) return {Code::kInvalid, "select: more than 65535 heads"};
  count = std::min(count, tokens);
  if (heads == 0 || count + tail == 0) return Status::ok();
  select_best_kernel<<<heads, kSelectThreads, 0, stream>>>(scores, tokens, count, tail, kept);
  return launched("selection");
}

Status cuda_gather_rows(const HeadRows& rows, const std::uint32_t* kept, std::uint32_t count, std::byte* out,
                        CUstream_st* stream) {
  if (rows.heads > 65535) return {Code::kInvalid, "gather: more than 65535 heads"};
  const std::size_t row_bytes = std::size_t{rows.dim} * dtype_bytes(rows.dtype);
  if (rows.heads == 0 || count == 0 || row_bytes == 0) return Status::ok();
  constexpr unsigned kWarps = kGatherThreads / kWarp;
  const dim3 grid((count + kWarps - 1) / kWarps, rows.heads);
  // Rows move in 16 bytes a lane where all addresses allow it.
  const std::size_t addresses = reinterpret_cast<std::size_t>(rows.data) | reinterpret_cast<std::size_t>(out) |
                                rows.head_stride_bytes | rows.token_stride_bytes | row_bytes;
  if (addresses % sizeof(uint4) == 0) {
    gather_kernel<uint4><<<grid, kGatherThreads, 0, stream>>>(
        rows, kept, count, static_cast<std::uint32_t>(row_bytes / sizeof(uint4)), out);
  } else {
    gather_kernel<std::uint8_t>
        <<<grid, kGatherThreads, 0, stream>>>(rows, kept, count, static_cast<std::uint32_t>(row_bytes), out);
  }
  return launched("gather");
}

}  // namespace kvern::evict
