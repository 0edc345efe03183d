#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/key_scores.h"

namespace kvern::evict {
namespace {

using namespace cuda;

constexpr unsigned kWarps = 8;
constexpr unsigned kThreads = kWarps * kWarp;
/// Tokens whose directions one block adds up.
constexpr std::uint32_t kPiece = 512;

std::uint32_t pieces_of(std::uint32_t tokens) { return (tokens + kPiece - 1) / kPiece; }

/// <k, other> with the lanes of a warp, in every lane; other null: |k|^2.
template <class E>
__device__ float product(const HeadRows& keys, std::uint32_t head, std::uint32_t token, const float* other) {
  const auto* row = reinterpret_cast<const typename E::Raw*>(keys.row(head, token));
  float sum = 0;
  for (std::uint32_t i = threadIdx.x % kWarp; i < keys.dim; i += kWarp) {
    const float element = E::to_float(row[i]);
    sum = __fmaf_rn(element, other == nullptr ? element : other[i], sum);
  }
  return sum_of_warp(sum);
}

/// One warp per key: -|k|, or, with inverses, 1/|k| (0 for what has no direction) there.
template <class E>
__global__ void norms(HeadRows keys, float* scores, float* inverses) {
  const std::uint32_t token = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (token >= keys.tokens) return;
  const float squared = product<E>(keys, blockIdx.y, token, nullptr);
  if (threadIdx.x % kWarp != 0) return;
  const std::size_t at = std::size_t{blockIdx.y} * keys.tokens + token;
  const bool finite = isfinite(squared);
  scores[at] = finite ? -sqrtf(squared) : NAN;
  if (inverses != nullptr) inverses[at] = finite && squared > 0 ? 1 / sqrtf(squared) : 0.0F;
}

/// One block per piece of tokens and head, each thread its dims: partial[head][piece][dim], the sum of k/|k|.
template <class E>
__global__ void add_directions(HeadRows keys, const float* inverses, float* partial) {
  const std::uint32_t last = min(keys.tokens, (blockIdx.x + 1) * kPiece);
  float* out = partial + (std::size_t{blockIdx.y} * gridDim.x + blockIdx.x) * keys.dim;
  for (std::uint32_t i = threadIdx.x; i < keys.dim; i += kThreads) {
    float sum = 0;
    for (std::uint32_t token = blockIdx.x * kPiece; token < last; ++token) {
      const float inverse = inverses[std::size_t{blockIdx.y} * keys.tokens + token];
      if (inverse == 0) continue;
      const auto* row = reinterpret_cast<const typename E::Raw*>(keys.row(blockIdx.y, token));
      sum = __fmaf_rn(E::to_float(row[i]), inverse, sum);
    }
    out[i] = sum;
  }
}

/// One block per head: the mean direction, of length 1, to the place of the head's first piece.
__global__ void make_anchor(std::uint32_t pieces, std::uint32_t dim, float* partial) {
  float* of_head = partial + std::size_t{blockIdx.x} * pieces * dim;
  double squared = 0;
  for (std::uint32_t i = threadIdx.x; i < dim; i += kThreads) {
    double sum = 0;
    for (std::uint32_t piece = 0; piece < pieces; ++piece) {
      sum += static_cast<double>(of_head[std::size_t{piece} * dim + i]);
    }
    of_head[i] = static_cast<float>(sum);
    squared += sum * sum;
  }
  squared = sum_of_block<kWarps>(squared);
  const double inverse = squared > 0 ? 1 / sqrt(squared) : 0;
  for (std::uint32_t i = threadIdx.x; i < dim; i += kThreads) {
    of_head[i] = static_cast<float>(static_cast<double>(of_head[i]) * inverse);
  }
}

/// One warp per key.
template <class E>
__global__ void differences(HeadRows keys, const float* inverses, const float* anchors, std::size_t anchor_stride,
                            float* scores) {
  const std::uint32_t token = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (token >= keys.tokens) return;
  const std::size_t at = std::size_t{blockIdx.y} * keys.tokens + token;
  if (isnan(scores[at])) return;
  const float cosine = product<E>(keys, blockIdx.y, token, anchors + blockIdx.y * anchor_stride) * inverses[at];
  if (threadIdx.x % kWarp == 0) scores[at] = -cosine;
}

Status check(const HeadRows& keys) {
  if (keys.dtype != DType::kOpaqueBytes && keys.dim > 0 && keys.heads <= 65535) return Status::ok();
  return {Code::kInvalid, "key scores: keys must be of a float type, have a dim and at most 65535 heads"};
}

dim3 warps_of(const HeadRows& keys) { return dim3((keys.tokens + kWarps - 1) / kWarps, keys.heads); }

}  // namespace

Status cuda_knorm_scores(const HeadRows& keys, float* scores, CUstream_st* stream) {
  if (Status status = check(keys); !status) return status;
  if (keys.heads == 0 || keys.tokens == 0) return Status::ok();
  with_element(keys.dtype,
               [&]<class E>(E) { norms<E><<<warps_of(keys), kThreads, 0, stream>>>(keys, scores, nullptr); });
  return launched("knorm");
}

std::size_t cuda_keydiff_bytes(const HeadRows& keys) {
  return (std::size_t{keys.heads} * keys.tokens + std::size_t{keys.heads} * pieces_of(keys.tokens) * keys.dim) *
         sizeof(float);
}

Status cuda_keydiff_scores(const HeadRows& keys, std::byte* scratch, float* scores, CUstream_st* stream) {
  if (Status status = check(keys); !status) return status;
  if (keys.heads == 0 || keys.tokens == 0) return Status::ok();
  auto* inverses = reinterpret_cast<float*>(scratch);
  float* partial = inverses + std::size_t{keys.heads} * keys.tokens;
  const std::uint32_t pieces = pieces_of(keys.tokens);
  with_element(keys.dtype, [&]<class E>(E) {
    norms<E><<<warps_of(keys), kThreads, 0, stream>>>(keys, scores, inverses);
    add_directions<E><<<dim3(pieces, keys.heads), kThreads, 0, stream>>>(keys, inverses, partial);
    make_anchor<<<keys.heads, kThreads, 0, stream>>>(pieces, keys.dim, partial);
    differences<E>
        <<<warps_of(keys), kThreads, 0, stream>>>(keys, inverses, partial, std::size_t{pieces} * keys.dim, scores);
  });
  return launched("keydiff");
}

}  // namespace kvern::evict
