#include <algorithm>
#include <string>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/rope.h"

namespace kvern::rope {
namespace {

/// Four warps: enough to fill a multiprocessor of every generation at these register counts.
constexpr unsigned kThreads = 128;
/// Rows beyond the grid's height are taken in turns.
constexpr unsigned kMaxRowsOfGrid = 65535;

struct Float32 {
  using Raw = float;
  static __device__ float to_float(float raw) { return raw; }
  static __device__ float from_float(float value) { return value; }
};
struct Float16 {
  using Raw = std::uint16_t;
  static __device__ float to_float(Raw raw) { return from_float16(raw); }
  static __device__ Raw from_float(float value) {
    constexpr float kMost = largest_finite(DType::kFloat16);
    return to_float16(fminf(fmaxf(value, -kMost), kMost));
  }
};
struct BFloat16 {
  using Raw = std::uint16_t;
  static __device__ float to_float(Raw raw) { return from_bfloat16(raw); }
  static __device__ Raw from_float(float value) {
    constexpr float kMost = largest_finite(DType::kBFloat16);
    return to_bfloat16(fminf(fmaxf(value, -kMost), kMost));
  }
};

__global__ void fill_turns(const double* inverse_frequencies, std::uint32_t pairs, const std::int64_t* positions,
                           std::int64_t first, std::uint32_t rows, float* cosines, float* sines) {
  const std::size_t index = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= std::size_t{rows} * pairs) return;
  const std::size_t row = index / pairs;
  const std::int64_t position = positions == nullptr ? first + static_cast<std::int64_t>(row) : positions[row];
  const CosineSine by = cosine_sine(static_cast<double>(position) * inverse_frequencies[index % pairs]);
  cosines[index] = by.cosine;
  sines[index] = by.sine;
}

/// One block per row and head; a thread takes a pair, or an element beyond the pairs, at a time.
template <class In, class Out>
__global__ void rotate_rows(HeadRows rows, TurnsView turns, Style style, float sign, typename Out::Raw* out) {
  const std::uint32_t head = blockIdx.x;
  for (std::uint32_t token = blockIdx.y; token < rows.tokens; token += gridDim.y) {
    const auto* from = reinterpret_cast<const typename In::Raw*>(rows.data + head * rows.head_stride_bytes +
                                                                 token * rows.token_stride_bytes);
    typename Out::Raw* to = out + (std::size_t{head} * rows.tokens + token) * rows.dim;
    const std::size_t turn_row = turns.rows == 1 ? 0 : std::size_t{token} * turns.pairs;
    for (std::uint32_t i = threadIdx.x; i < rows.dim - turns.pairs; i += blockDim.x) {
      if (i >= turns.pairs) {
        const std::uint32_t element = i + turns.pairs;
        to[element] = Out::from_float(In::to_float(from[element]));
        continue;
      }
      const std::uint32_t first = style == Style::kNeox ? i : 2 * i;
      const std::uint32_t second = style == Style::kNeox ? i + turns.pairs : 2 * i + 1;
      float a = In::to_float(from[first]);
      float b = In::to_float(from[second]);
      turn({turns.cosines[turn_row + i], turns.sines[turn_row + i] * sign}, a, b);
      to[first] = Out::from_float(a);
      to[second] = Out::from_float(b);
    }
  }
}

template <class In, class Out>
void launch(const HeadRows& rows, TurnsView turns, Style style, Direction direction, std::byte* out,
            CUstream_st* stream) {
  const dim3 grid(rows.heads, std::min(rows.tokens, kMaxRowsOfGrid));
  rotate_rows<In, Out><<<grid, kThreads, 0, stream>>>(
      rows, turns, style, direction == Direction::kForward ? 1.0F : -1.0F, reinterpret_cast<typename Out::Raw*>(out));
}

template <class In>
void launch_from(const HeadRows& rows, TurnsView turns, Style style, Direction direction, DType out_dtype,
                 std::byte* out, CUstream_st* stream) {
  if (out_dtype == DType::kFloat32) launch<In, Float32>(rows, turns, style, direction, out, stream);
  if (out_dtype == DType::kFloat16) launch<In, Float16>(rows, turns, style, direction, out, stream);
  if (out_dtype == DType::kBFloat16) launch<In, BFloat16>(rows, turns, style, direction, out, stream);
}

}  // namespace

Status cuda_turns(const double* inverse_frequencies, std::uint32_t pairs, const std::int64_t* positions,
                  std::int64_t first, std::uint32_t rows, float* cosines, float* sines, CUstream_st* stream) {
  const std::size_t count = std::size_t{rows} * pairs;
  if (count == 0) return Status::ok();
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  fill_turns<<<blocks, kThreads, 0, stream>>>(inverse_frequencies, pairs, positions, first, rows, cosines, sines);
  return cuda::launched("rope turns");
}

Status cuda_rotate(const HeadRows& rows, TurnsView turns, Style style, Direction direction, DType out_dtype,
                   std::byte* out, CUstream_st* stream) {
  if (Status status = check_turns(rows, turns, out_dtype); !status) return status;
  if (rows.heads == 0 || rows.tokens == 0) return Status::ok();
  if (rows.dtype == DType::kFloat32) launch_from<Float32>(rows, turns, style, direction, out_dtype, out, stream);
  if (rows.dtype == DType::kFloat16) launch_from<Float16>(rows, turns, style, direction, out_dtype, out, stream);
  if (rows.dtype == DType::kBFloat16) launch_from<BFloat16>(rows, turns, style, direction, out_dtype, out, stream);
  return cuda::launched("rope rotate");
}

}  // namespace kvern::rope
