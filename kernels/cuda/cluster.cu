#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "kernels/cluster_arithmetic.h"
#include "kernels/cuda/cluster.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/merge_arithmetic.h"

namespace kvern::cluster {
namespace {

using cuda::kEveryLane;
using cuda::kWarp;
using cuda::launched;
using cuda::with_element;

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarp;
constexpr unsigned kMaxSources = kMaxChunk / 2;
/// A row of keys in shared memory is one float longer, so that the lanes of a warp find theirs in different banks.
constexpr std::uint32_t kPadding = 1;

/// Entries as a pass finds them: rows of tokens, or those that the pass before has left.
struct Source {
  HeadRows keys;
  HeadRows values;
  const Members* members;        ///< [head][token]; null: entry i is token i
  const std::uint32_t* entries;  ///< [head]; null: one per token

  __device__ std::uint32_t count(std::uint32_t head) const { return entries != nullptr ? entries[head] : keys.tokens; }
  __device__ Members member(std::uint32_t head, std::uint32_t entry) const {
    if (members == nullptr) return {1, entry, entry, entry};
    return members[static_cast<std::size_t>(head) * keys.tokens + entry];
  }
};

struct Pass {
  std::uint32_t chunk;
  std::uint32_t sinks;
  std::uint32_t recent;
  std::uint32_t merges;
  float min_similarity;
  std::uint32_t pieces;      ///< room per head
  std::uint32_t* into;       ///< [head][token], within the piece
  std::uint32_t* survivors;  ///< [head][piece], afterwards the number of the piece's first survivor
  std::uint32_t* numbers;    ///< [head][token]

  __device__ Cut cut(std::uint32_t entries) const { return Cut::of(entries, sinks, recent, chunk, merges); }
};

__device__ float inverse_length(const float* row, std::uint32_t dim) {
  float squares = 0;
  for (std::uint32_t i = 0; i < dim; ++i) squares = squares + row[i] * row[i];
  return merge::usable(squares) ? 1.0F / sqrtf(squares) : NAN;
}

/// A block per piece and head: which entries of it go where.
template <class E>
__global__ void match_kernel(Source source, Pass pass) {
  extern __shared__ float rows[];
  __shared__ float inverses[kMaxChunk];
  __shared__ std::uint64_t ranks[kMaxSources];
  __shared__ std::uint32_t partners[kMaxSources];
  const std::uint32_t head = blockIdx.y;
  const Cut cut = pass.cut(source.count(head));
  if (blockIdx.x >= cut.pieces()) return;
  const Span piece = cut.piece(blockIdx.x);
  std::uint32_t* into = pass.into + static_cast<std::size_t>(head) * source.keys.tokens + piece.begin;
  std::uint32_t* survivors = pass.survivors + static_cast<std::size_t>(head) * pass.pieces + blockIdx.x;
  for (std::uint32_t i = threadIdx.x; i < piece.count; i += kThreads) into[i] = i;
  if (piece.merges == 0) {
    if (threadIdx.x == 0) *survivors = piece.count;
    return;
  }
  const std::uint32_t dim = source.keys.dim;
  const std::uint32_t stride = dim + kPadding;
  for (std::uint32_t at = threadIdx.x; at < piece.count * dim; at += kThreads) {
    const auto* row = reinterpret_cast<const typename E::Raw*>(source.keys.row(head, piece.begin + at / dim));
    rows[at / dim * stride + at % dim] = E::to_float(row[at % dim]);
  }
  __syncthreads();
  for (std::uint32_t i = threadIdx.x; i < piece.count; i += kThreads) {
    inverses[i] = inverse_length(rows + i * stride, dim);
  }
  __syncthreads();

  const std::uint32_t sources = (piece.count + 1) / 2;
  const std::uint32_t targets = piece.count / 2;
  const unsigned lane = threadIdx.x % kWarp;
  for (std::uint32_t a = threadIdx.x / kWarp; a < sources; a += kWarps) {
    const float* from = rows + 2 * a * stride;
    float best = -INFINITY;
    std::uint32_t partner = 0;
    for (std::uint32_t b = lane; b < targets; b += kWarp) {
      const float* to = rows + (2 * b + 1) * stride;
      float product = 0;
      for (std::uint32_t i = 0; i < dim; ++i) product = product + from[i] * to[i];
      const float similarity = product * inverses[2 * b + 1];
      if (similarity > best) {
        best = similarity;
        partner = b;
      }
    }
    for (unsigned offset = kWarp / 2; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(kEveryLane, best, offset);
      const std::uint32_t others = __shfl_xor_sync(kEveryLane, partner, offset);
      if (other > best || (other == best && others < partner)) {
        best = other;
        partner = others;
      }
    }
    if (lane == 0) {
      const float similarity = best * inverses[2 * a];
      const bool none = !(similarity > -INFINITY) || similarity < pass.min_similarity;
      partners[a] = partner;
      ranks[a] = none ? 0 : rank(similarity, a);
    }
  }
  __syncthreads();
  std::uint32_t merged = 0;
  for (std::uint32_t a = threadIdx.x; a < sources; a += kThreads) {
    if (ranks[a] == 0) continue;
    std::uint32_t before = 0;
    for (std::uint32_t other = 0; other < sources; ++other) before += ranks[other] > ranks[a] ? 1 : 0;
    if (before >= piece.merges) continue;
    into[2 * a] = 2 * partners[a] + 1;
    ++merged;
  }
  merged = static_cast<std::uint32_t>(__syncthreads_count(merged != 0));  // a thread has one source at most
  if (threadIdx.x == 0) *survivors = piece.count - merged;
}

/// A thread per head: where the survivors of each piece begin, and how many there are in all.
__global__ void place_kernel(Source source, Pass pass, std::uint32_t* entries) {
  const std::uint32_t head = blockIdx.x * blockDim.x + threadIdx.x;
  if (head >= source.keys.heads) return;
  const std::uint32_t pieces = pass.cut(source.count(head)).pieces();
  std::uint32_t next = 0;
  for (std::uint32_t i = 0; i < pieces; ++i) {
    std::uint32_t* survivors = pass.survivors + static_cast<std::size_t>(head) * pass.pieces + i;
    const std::uint32_t count = *survivors;
    *survivors = next;
    next += count;
  }
  entries[head] = next;
}

/// The mean of one survivor's members, by the lanes of a warp, in the order of the entries.
template <class E>
__device__ void average(const HeadRows& rows, std::uint32_t head, const Span& piece, const std::uint32_t* into,
                        const std::uint32_t* counts, std::uint32_t survivor, bool alone, float inverse, float* out) {
  const auto at = [&](std::uint32_t entry, std::uint32_t column) {
    return E::to_float(reinterpret_cast<const typename E::Raw*>(rows.row(head, piece.begin + entry))[column]);
  };
  for (std::uint32_t column = threadIdx.x % kWarp; column < rows.dim; column += kWarp) {
    float sum = at(survivor, column);
    if (!alone) {
      sum = sum * static_cast<float>(counts[survivor]);
      for (std::uint32_t i = 0; i < piece.count; ++i) {
        if (i != survivor && into[i] == survivor) sum = sum + at(i, column) * static_cast<float>(counts[i]);
      }
      sum = sum * inverse;
    }
    out[column] = sum;
  }
}

/// A block per piece and head, a warp per survivor.
template <class E>
__global__ void merge_kernel(Source source, Pass pass, DeviceClusters out) {
  __shared__ std::uint32_t into[kMaxChunk];
  __shared__ std::uint32_t counts[kMaxChunk];
  __shared__ std::uint32_t numbers[kMaxChunk];
  const std::uint32_t head = blockIdx.y;
  const Cut cut = pass.cut(source.count(head));
  if (blockIdx.x >= cut.pieces()) return;
  const Span piece = cut.piece(blockIdx.x);
  const std::size_t first = static_cast<std::size_t>(head) * source.keys.tokens;
  for (std::uint32_t i = threadIdx.x; i < piece.count; i += kThreads) {
    into[i] = pass.into[first + piece.begin + i];
    counts[i] = source.member(head, piece.begin + i).count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    std::uint32_t next = pass.survivors[static_cast<std::size_t>(head) * pass.pieces + blockIdx.x];
    for (std::uint32_t i = 0; i < piece.count; ++i) {
      if (into[i] == i) numbers[i] = next++;
    }
  }
  __syncthreads();
  for (std::uint32_t i = threadIdx.x; i < piece.count; i += kThreads) {
    pass.numbers[first + piece.begin + i] = numbers[into[i]];
  }
  for (std::uint32_t i = threadIdx.x / kWarp; i < piece.count; i += kWarps) {
    if (into[i] != i) continue;
    Members members = source.member(head, piece.begin + i);
    for (std::uint32_t other = 0; other < piece.count; ++other) {
      if (other == i || into[other] != i) continue;
      const Members joined = source.member(head, piece.begin + other);
      members.count += joined.count;
      members.first = min(members.first, joined.first);
      members.last = max(members.last, joined.last);
    }
    const bool alone = members.count == counts[i];
    const float inverse = 1.0F / static_cast<float>(members.count);
    const std::size_t to = first + numbers[i];
    average<E>(source.keys, head, piece, into, counts, i, alone, inverse, out.keys + to * source.keys.dim);
    if (source.values.dim > 0) {
      average<E>(source.values, head, piece, into, counts, i, alone, inverse, out.values + to * source.values.dim);
    }
    if (threadIdx.x % kWarp == 0) out.members[to] = members;
  }
}

/// The entries of the tokens after a pass; first: that was the first one.
__global__ void assign_kernel(const std::uint32_t* numbers, std::uint32_t tokens, bool first,
                              std::uint32_t* assignment) {
  const std::uint32_t token = blockIdx.x * blockDim.x + threadIdx.x;
  if (token >= tokens) return;
  const std::size_t row = static_cast<std::size_t>(blockIdx.y) * tokens;
  assignment[row + token] = numbers[row + (first ? token : assignment[row + token])];
}

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

/// What lies in the workspace, in order.
struct Workspace {
  std::size_t rows;
  std::uint32_t pieces;

  Workspace(const HeadRows& keys, const Options& options)
      : rows(static_cast<std::size_t>(keys.heads) * keys.tokens), pieces(keys.tokens / options.chunk + 3) {}

  template <typename T>
  T* take(std::byte*& at, std::size_t count) const {
    T* taken = reinterpret_cast<T*>(at);
    at += aligned(count * sizeof(T));
    return taken;
  }
};

HeadRows float_rows(const HeadRows& like, const float* data) {
  return HeadRows::contiguous(reinterpret_cast<const std::byte*>(data), DType::kFloat32, like.heads, like.tokens,
                              like.dim);
}

template <class E>
cudaError_t launch_pass(const Source& source, const Pass& pass, const DeviceClusters& out, cudaStream_t stream) {
  const std::size_t shared = static_cast<std::size_t>(pass.chunk) * (source.keys.dim + kPadding) * sizeof(float);
  const cudaError_t error =
      cudaFuncSetAttribute(match_kernel<E>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  const dim3 grid(pass.pieces, source.keys.heads);
  match_kernel<E><<<grid, kThreads, shared, stream>>>(source, pass);
  place_kernel<<<(source.keys.heads + kWarp - 1) / kWarp, kWarp, 0, stream>>>(source, pass, out.entries);
  return cudaSuccess;
}

}  // namespace

std::size_t cuda_compress_workspace_bytes(const HeadRows& keys, const HeadRows& values, const Options& options) {
  const Workspace workspace(keys, options);
  const std::size_t rows = workspace.rows;
  return 2 * aligned(rows * sizeof(std::uint32_t)) +
         aligned(static_cast<std::size_t>(workspace.pieces) * keys.heads * sizeof(std::uint32_t)) +
         2 * aligned(keys.heads * sizeof(std::uint32_t)) + aligned(rows * keys.dim * sizeof(float)) +
         aligned(rows * values.dim * sizeof(float)) + aligned(rows * sizeof(Members));
}

Status cuda_compress(const HeadRows& keys, const HeadRows& values, const Options& options, const DeviceClusters& out,
                     std::byte* workspace, CUstream_st* stream) {
  if (Status status = options.validate(); !status) return status;
  if (keys.dtype != values.dtype || keys.heads != values.heads || keys.tokens != values.tokens) {
    return {Code::kInvalid, "keys and values that are clustered must have the same dtype, heads and tokens"};
  }
  if (keys.dtype == DType::kOpaqueBytes || keys.dim == 0 || keys.dim > kMaxDim || values.dim > kMaxDim ||
      keys.heads > 65535) {
    return {Code::kInvalid, "clustering takes numbers, head dimensions up to 256 and 65535 heads at most"};
  }
  if (static_cast<std::size_t>(options.chunk) * (keys.dim + kPadding) > kMaxChunkElements) {
    return {Code::kRefused, "the keys of a chunk do not fit the shared memory; use a smaller chunk"};
  }
  if (keys.heads == 0 || keys.tokens == 0) return Status::ok();

  const Workspace sizes(keys, options);
  std::byte* at = workspace;
  Pass pass{options.chunk, options.sinks, options.recent, 0,      options.min_similarity,
            sizes.pieces,  nullptr,       nullptr,        nullptr};
  pass.into = sizes.take<std::uint32_t>(at, sizes.rows);
  pass.numbers = sizes.take<std::uint32_t>(at, sizes.rows);
  pass.survivors = sizes.take<std::uint32_t>(at, static_cast<std::size_t>(sizes.pieces) * keys.heads);
  std::uint32_t* counts[2] = {sizes.take<std::uint32_t>(at, keys.heads), sizes.take<std::uint32_t>(at, keys.heads)};
  DeviceClusters other = out;
  other.keys = sizes.take<float>(at, sizes.rows * keys.dim);
  other.values = sizes.take<float>(at, sizes.rows * values.dim);
  other.members = sizes.take<Members>(at, sizes.rows);

  // Passes take turns with the two places, so that the last one writes to out.
  Source source{keys, values, nullptr, nullptr};
  for (std::size_t i = 0; i < options.merges.size(); ++i) {
    const bool last = (options.merges.size() - 1 - i) % 2 == 0;
    DeviceClusters to = last ? out : other;
    // A pass reads how many entries there are while it counts those that will be.
    to.entries = i + 1 == options.merges.size() ? out.entries : counts[i % 2];
    pass.merges = options.merges[i];
    cudaError_t error = cudaSuccess;
    with_element(source.keys.dtype, [&](auto element) {
      using E = decltype(element);
      error = launch_pass<E>(source, pass, to, stream);
      const dim3 grid(pass.pieces, keys.heads);
      if (error == cudaSuccess) merge_kernel<E><<<grid, kThreads, 0, stream>>>(source, pass, to);
    });
    if (error != cudaSuccess) return {Code::kInternal, std::string("cluster kernel: ") + cudaGetErrorString(error)};
    const dim3 grid((keys.tokens + kThreads - 1) / kThreads, keys.heads);
    assign_kernel<<<grid, kThreads, 0, stream>>>(pass.numbers, keys.tokens, i == 0, out.assignment);
    if (Status status = launched("cluster"); !status) return status;
    source = {float_rows(keys, to.keys), float_rows(values, to.values), to.members, to.entries};
  }
  return Status::ok();
}

}  // namespace kvern::cluster
