#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/selection.h"
#include "kernels/score_order.h"

namespace kvern::evict {
namespace {

using namespace cuda;

/// A block works on a part of a head's scores, in rounds of one score per thread.
constexpr unsigned kSelectThreads = 512;
constexpr unsigned kSelectWarps = kSelectThreads / kWarp;
/// Blocks that a multiprocessor has registers for, with a part's ranks in them.
constexpr unsigned kResidentBlocks = 2;
constexpr unsigned kRounds = 8;
constexpr std::uint32_t kPartTokens = kRounds * kSelectThreads;
/// Ranks are sorted by so many digits, from the top.
constexpr unsigned kPasses = 3;
constexpr unsigned kDigitBits = 11;
constexpr unsigned kDigits = 1U << kDigitBits;
constexpr unsigned kGatherThreads = 256;

/// What is known of the rank of the last score that is kept after some passes: the digits found, and how many of those
/// ranks that agree in them are kept. In the end the rank itself, and how many of its equals are kept.
struct Threshold {
  std::uint32_t rank;
  std::uint32_t wanted;
};

/// Scores of a part above the threshold, and at it.
struct Counts {
  std::uint32_t above;
  std::uint32_t ties;
};

/// What the kernels share. Histograms are zeros at first.
struct Selection {
  const float* scores;  ///< [head][token]
  std::uint32_t tokens;
  std::uint32_t count;
  std::uint32_t tail;
  std::uint32_t* kept;    ///< [head][count + tail]
  unsigned* histograms;   ///< [head][pass][digit]
  Threshold* thresholds;  ///< [head][pass], after it
  Counts* counts;         ///< [head][part]
};

/// The lowest bit of a pass's digit.
constexpr unsigned shift_of(unsigned pass) { return pass + 1 < kPasses ? 32 - (pass + 1) * kDigitBits : 0; }

/// The block's head and part, and the ranks of its scores.
struct Part {
  __device__ explicit Part(const Selection& selection) : selection(selection) {}

  __device__ std::uint32_t token(unsigned round) const {
    return blockIdx.x * kPartTokens + round * kSelectThreads + threadIdx.x;
  }
  __device__ bool has(unsigned round) const { return token(round) < selection.tokens; }
  __device__ void load(std::uint32_t (&ranks)[kRounds]) const {
    const float* scores = selection.scores + std::size_t{blockIdx.y} * selection.tokens;
    for (unsigned round = 0; round < kRounds; ++round) {
      ranks[round] = has(round) ? score_rank(scores[token(round)]) : 0;
    }
  }

  const Selection& selection;
};

/// The sum of the values of the threads before this one. All threads of the block call it.
__device__ std::uint32_t sum_before(std::uint32_t value) {
  __shared__ std::uint32_t of_warp[kSelectWarps];
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  std::uint32_t sum = value;
  for (unsigned offset = 1; offset < kWarp; offset *= 2) {
    const std::uint32_t before = __shfl_up_sync(kEveryLane, sum, offset);
    if (lane >= offset) sum += before;
  }
  if (lane == kWarp - 1) of_warp[warp] = sum;
  __syncthreads();
  const std::uint32_t earlier = sum_of_warp(lane < warp ? of_warp[lane] : 0U);
  __syncthreads();
  return earlier + sum - value;
}
static_assert(kSelectWarps <= kWarp && kRounds * kSelectWarps <= kSelectThreads);

/// The threshold after so many passes, from the histogram of the last. The head's first block keeps it for the kernels
/// that follow. All threads of the block call it.
__device__ Threshold threshold_after(const Selection& selection, unsigned passes) {
  __shared__ Threshold found;
  if (passes == 0) return {0, selection.count};
  const unsigned pass = passes - 1;
  Threshold* of_head = selection.thresholds + std::size_t{blockIdx.y} * kPasses;
  const Threshold before = pass == 0 ? Threshold{0, selection.count} : of_head[pass - 1];
  // Threads have neighbouring digits, the highest first.
  constexpr unsigned kEach = kDigits / kSelectThreads;
  const unsigned* histogram = selection.histograms + (std::size_t{blockIdx.y} * kPasses + pass) * kDigits;
  std::uint32_t sizes[kEach];
  std::uint32_t size = 0;
  for (unsigned i = 0; i < kEach; ++i) {
    sizes[i] = histogram[kDigits - 1 - (threadIdx.x * kEach + i)];
    size += sizes[i];
  }
  std::uint32_t higher = sum_before(size);
  for (unsigned i = 0; i < kEach; ++i) {
    if (higher < before.wanted && before.wanted <= higher + sizes[i]) {
      const std::uint32_t digit = kDigits - 1 - (threadIdx.x * kEach + i);
      found = {before.rank | digit << shift_of(pass), before.wanted - higher};
    }
    higher += sizes[i];
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) of_head[pass] = found;
  return found;
}

/// Counts the digits of a pass, of the ranks that agree with the threshold so far. One block per part and head.
__global__ void __launch_bounds__(kSelectThreads, kResidentBlocks) count_digits(Selection selection, unsigned pass) {
  __shared__ unsigned histogram[kDigits];
  const Part part(selection);
  std::uint32_t ranks[kRounds];
  part.load(ranks);
  for (unsigned i = threadIdx.x; i < kDigits; i += kSelectThreads) histogram[i] = 0;
  __syncthreads();
  const Threshold threshold = threshold_after(selection, pass);
  const unsigned shift = shift_of(pass);
  // The bits of the digits found.
  const std::uint32_t mask = pass == 0 ? 0 : ~0U << shift_of(pass - 1);
  for (unsigned round = 0; round < kRounds; ++round) {
    const bool agrees = part.has(round) && (ranks[round] & mask) == threshold.rank;
    const unsigned digit = agrees ? (ranks[round] & ~mask) >> shift : kDigits;
    // Many scores may be alike: one lane adds for all that are.
    const unsigned alike = __match_any_sync(kEveryLane, digit);
    const bool first = (alike & ((1U << threadIdx.x % kWarp) - 1)) == 0;
    if (agrees && first) atomicAdd(&histogram[digit], static_cast<unsigned>(__popc(alike)));
  }
  __syncthreads();
  unsigned* of_head = selection.histograms + (std::size_t{blockIdx.y} * kPasses + pass) * kDigits;
  for (unsigned i = threadIdx.x; i < kDigits; i += kSelectThreads) {
    if (histogram[i] > 0) atomicAdd(&of_head[i], histogram[i]);
  }
}

/// One block per part and head.
__global__ void __launch_bounds__(kSelectThreads, kResidentBlocks) count_kept(Selection selection) {
  const Part part(selection);
  std::uint32_t ranks[kRounds];
  part.load(ranks);
  const Threshold threshold = threshold_after(selection, kPasses);
  std::uint32_t above = 0;
  std::uint32_t ties = 0;
  for (unsigned round = 0; round < kRounds; ++round) {
    if (part.has(round) && ranks[round] > threshold.rank) ++above;
    if (part.has(round) && ranks[round] == threshold.rank) ++ties;
  }
  const std::uint32_t above_before = sum_before(above);
  const std::uint32_t ties_before = sum_before(ties);
  if (threadIdx.x != kSelectThreads - 1) return;
  selection.counts[std::size_t{blockIdx.y} * gridDim.x + blockIdx.x] = {above_before + above, ties_before + ties};
}

/// The counts of the head's earlier parts together, in every thread.
__device__ Counts counts_before(const Selection& selection) {
  const Counts* of_head = selection.counts + std::size_t{blockIdx.y} * gridDim.x;
  Counts sum{0, 0};
  for (std::uint32_t part = threadIdx.x % kWarp; part < blockIdx.x; part += kWarp) {
    sum.above += of_head[part].above;
    sum.ties += of_head[part].ties;
  }
  return {sum_of_warp(sum.above), sum_of_warp(sum.ties)};
}

/// One block per part and head. The head's first block appends the tail.
__global__ void __launch_bounds__(kSelectThreads, kResidentBlocks) write_kept(Selection selection) {
  // Before a warp's scores of a round: those above the threshold in the lower half, ties in the upper.
  __shared__ std::uint32_t before_warp[kRounds * kSelectWarps];
  std::uint32_t* kept = selection.kept + std::size_t{blockIdx.y} * (selection.count + selection.tail);
  if (blockIdx.x == 0) {
    for (std::uint32_t i = threadIdx.x; i < selection.tail; i += kSelectThreads) {
      kept[selection.count + i] = selection.tokens + i;
    }
  }
  if (selection.count == 0) return;
  const Part part(selection);
  std::uint32_t ranks[kRounds];
  part.load(ranks);
  const Threshold threshold = selection.thresholds[std::size_t{blockIdx.y} * kPasses + kPasses - 1];
  const unsigned warp = threadIdx.x / kWarp;
  unsigned above[kRounds];
  unsigned ties[kRounds];
  for (unsigned round = 0; round < kRounds; ++round) {
    above[round] = __ballot_sync(kEveryLane, part.has(round) && ranks[round] > threshold.rank);
    ties[round] = __ballot_sync(kEveryLane, part.has(round) && ranks[round] == threshold.rank);
    if (threadIdx.x % kWarp == 0) {
      before_warp[round * kSelectWarps + warp] =
          static_cast<std::uint32_t>(__popc(above[round]) | __popc(ties[round]) << 16);
    }
  }
  __syncthreads();
  const bool has_entry = threadIdx.x < kRounds * kSelectWarps;
  const std::uint32_t before = sum_before(has_entry ? before_warp[threadIdx.x] : 0U);
  if (has_entry) before_warp[threadIdx.x] = before;
  __syncthreads();
  const Counts earlier = counts_before(selection);
  const unsigned lanes_before = (1U << threadIdx.x % kWarp) - 1;
  const unsigned own = 1U << threadIdx.x % kWarp;
  for (unsigned round = 0; round < kRounds; ++round) {
    const std::uint32_t of_block = before_warp[round * kSelectWarps + warp];
    const std::uint32_t above_before =
        earlier.above + of_block % (1U << 16) + static_cast<std::uint32_t>(__popc(above[round] & lanes_before));
    const std::uint32_t ties_before =
        earlier.ties + (of_block >> 16) + static_cast<std::uint32_t>(__popc(ties[round] & lanes_before));
    const bool keep = (above[round] & own) != 0 || ((ties[round] & own) != 0 && ties_before < threshold.wanted);
    if (keep) kept[above_before + min(ties_before, threshold.wanted)] = part.token(round);
  }
}
static_assert(kPartTokens < 1U << 16);

std::uint32_t parts_of(std::uint32_t tokens) {
  return std::max<std::uint32_t>(1, (tokens + kPartTokens - 1) / kPartTokens);
}

/// Bytes of a head's histograms, and of all that it needs.
constexpr std::size_t kHistogramBytes = kPasses * kDigits * sizeof(unsigned);
std::size_t scratch_bytes(std::uint32_t tokens) {
  return kHistogramBytes + kPasses * sizeof(Threshold) + parts_of(tokens) * sizeof(Counts);
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

std::size_t cuda_selection_bytes(std::uint32_t heads, std::uint32_t tokens) { return heads * scratch_bytes(tokens); }

Status cuda_select_best(const float* scores, std::uint32_t heads, std::uint32_t tokens, std::uint32_t count,
                        std::uint32_t tail, std::byte* scratch, std::uint32_t* kept, CUstream_st* stream) {
  if (heads > 65535) return {Code::kInvalid, "select: more than 65535 heads"};
  count = std::min(count, tokens);
  if (heads == 0 || count + tail == 0) return Status::ok();
  Selection selection{scores, tokens, count, tail, kept, nullptr, nullptr, nullptr};
  selection.histograms = reinterpret_cast<unsigned*>(scratch);
  selection.thresholds = reinterpret_cast<Threshold*>(scratch + heads * kHistogramBytes);
  selection.counts = reinterpret_cast<Counts*>(selection.thresholds + std::size_t{heads} * kPasses);
  const dim3 grid(parts_of(tokens), heads);
  if (count > 0) {
    cudaMemsetAsync(scratch, 0, heads * kHistogramBytes, stream);
    for (unsigned pass = 0; pass < kPasses; ++pass) {
      count_digits<<<grid, kSelectThreads, 0, stream>>>(selection, pass);
    }
    count_kept<<<grid, kSelectThreads, 0, stream>>>(selection);
  }
  write_kept<<<grid, kSelectThreads, 0, stream>>>(selection);
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
