#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <string>
#include <type_traits>

#include "kernels/cuda/int8.h"
#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/rows.cuh"

namespace kvern::int8 {
namespace {

using namespace cuda;

constexpr std::uint32_t kInfinityBits = 0x7F800000U;
constexpr unsigned kThreads = 128;
constexpr unsigned kWarps = kThreads / kWarp;
/// Packs that a thread holds in registers: all are asked for before the first is used.
constexpr std::uint32_t kHeld = 16;
constexpr std::uint32_t kHeldTokens = 8;
/// Blocks that share a multiprocessor: while some wait for memory, others code.
constexpr unsigned kBlocks = 6;
/// Of those that encode: packs of 4-byte elements take twice the registers.
template <class E>
constexpr unsigned kEncodeBlocks = kWordElements<E> == 1 ? 4 : kBlocks;
/// Elements that a thread loads at once: 8 or 16 bytes. Form::channel_group() is a multiple of it.
constexpr std::uint32_t kVector = 4;
/// Elements of a pack of a run, and the packs of a warp's run: lanes hold kRunHeld each.
constexpr std::uint32_t kRunVector = 8;
constexpr std::uint32_t kRunHeld = 8;
constexpr std::uint32_t kRunPacks = kWarp * kRunHeld;
/// Form::channel_group() is a multiple of 16.
constexpr std::uint32_t kMinGroupPacks = 2;

/// Neighbouring elements of a row that move in one instruction.
template <typename T, std::uint32_t kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

/// A pack as it waits in registers: whole words, which take less room than elements.
template <typename T>
using Waiting = std::conditional_t<
    sizeof(T) == 16, uint4,
    std::conditional_t<sizeof(T) == 8, uint2,
                       std::conditional_t<sizeof(T) == 4, std::uint32_t,
                                          std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint8_t>>>>;

template <class E, std::uint32_t kCount>
__device__ Pack<typename E::Raw, kCount> load(const std::byte* pack) {
  return *reinterpret_cast<const Pack<typename E::Raw, kCount>*>(pack);
}

template <class E>
__device__ float value_of(typename E::Raw raw) {
  float values[kWordElements<E>];
  to_floats<E>(raw, values);
  return values[0];
}
template <class E>
__device__ std::uint32_t magnitude_bits(typename E::Raw raw) {
  return __float_as_uint(value_of<E>(raw)) & 0x7FFFFFFFU;
}

template <class E, std::uint32_t kCount>
__device__ void encode_pack(const Pack<typename E::Raw, kCount>& pack, const float (&inverses)[kCount],
                            std::int8_t* codes) {
  Pack<std::int8_t, kCount> coded;
  for (std::uint32_t i = 0; i < kCount; ++i) coded.values[i] = encode(value_of<E>(pack.values[i]), inverses[i]);
  *reinterpret_cast<Pack<std::int8_t, kCount>*>(codes) = coded;
}

/// The inverse of a group's scale, which it stores.
template <class E>
__device__ float finish_group(std::uint32_t magnitude, std::uint16_t* scale, std::uint32_t* not_finite) {
  if (magnitude >= kInfinityBits) *not_finite = 1;
  *scale = scale_bits(__uint_as_float(magnitude), E::kDType);
  return inverse_scale(__uint_as_float(magnitude), E::kDType);
}

/// One block per token group of a plane and tile of channels: threads in x hold kCount channels each, threads in y take
/// turns with the tokens. Groups of more than kHeld tokens per thread are read twice, the second time from the cache.
/// Threads beyond the last token or channel repeat it, which changes no magnitude, and store nothing.
template <class E, std::uint32_t kCount, class Rows>
__global__ void __launch_bounds__(kThreads, kEncodeBlocks<E>)
    encode_per_channel(Form form, Rows rows, std::byte* sections, std::size_t section_stride,
                       std::uint32_t* not_finite) {
  __shared__ std::uint32_t magnitudes[kThreads * kCount];  // [thread in y][channel]
  __shared__ float inverses[kWarp * kCount];
  std::byte* section = sections + blockIdx.z * section_stride;
  auto* scales = reinterpret_cast<std::uint16_t*>(section);
  auto* codes = reinterpret_cast<std::int8_t*>(section + form.codes_offset());
  const std::uint32_t first = blockIdx.x * form.group;
  const std::uint32_t last = min(first + form.group, form.tokens);
  const std::uint32_t width = blockDim.x * kCount;
  const std::uint32_t slot = threadIdx.x * kCount;
  const bool inside = blockIdx.y * width + slot < form.dim;
  const std::uint32_t channel = inside ? blockIdx.y * width + slot : form.dim - kCount;
  const std::uint32_t step = blockDim.y * kHeld;
  const auto plane = rows.plane(blockIdx.z, channel * sizeof(typename E::Raw));

  using Elements = Pack<typename E::Raw, kCount>;
  Waiting<Elements> held[kHeld];
  const auto hold = [&](std::uint32_t from) {
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = min(from + threadIdx.y + i * blockDim.y, last - 1);
      held[i] = std::bit_cast<Waiting<Elements>>(load<E, kCount>(plane.row(token)));
    }
  };
  std::uint32_t largest[kCount] = {};
  for (std::uint32_t from = first; from < last; from += step) {
    hold(from);
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const auto pack = std::bit_cast<Elements>(held[i]);
      for (std::uint32_t k = 0; k < kCount; ++k) largest[k] = max(largest[k], magnitude_bits<E>(pack.values[k]));
    }
  }
  for (std::uint32_t k = 0; k < kCount; ++k) magnitudes[threadIdx.y * width + slot + k] = largest[k];
  __syncthreads();
  for (std::uint32_t i = threadIdx.y * blockDim.x + threadIdx.x; i < width; i += blockDim.x * blockDim.y) {
    if (blockIdx.y * width + i >= form.dim) continue;
    std::uint32_t magnitude = 0;
    for (std::uint32_t y = 0; y < blockDim.y; ++y) magnitude = max(magnitude, magnitudes[y * width + i]);
    inverses[i] = finish_group<E>(magnitude, scales + form.scale_index(first, blockIdx.y * width + i), not_finite);
  }
  __syncthreads();
  if (!inside) return;
  float own[kCount];
  for (std::uint32_t k = 0; k < kCount; ++k) own[k] = inverses[slot + k];
  for (std::uint32_t from = first; from < last; from += step) {
    if (last - first > step) hold(from);
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + threadIdx.y + i * blockDim.y;
      if (token < last)
        encode_pack<E, kCount>(std::bit_cast<Elements>(held[i]), own, codes + std::size_t{token} * form.dim + channel);
    }
  }
}

/// One warp per kHeldTokens tokens of a group of channels; a lane each finishes their groups.
template <class E, std::uint32_t kCount, class Rows>
__global__ void __launch_bounds__(kThreads, kEncodeBlocks<E>)
    encode_per_token(Form form, Rows rows, std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite) {
  std::byte* section = sections + blockIdx.z * section_stride;
  auto* scales = reinterpret_cast<std::uint16_t*>(section);
  auto* codes = reinterpret_cast<std::int8_t*>(section + form.codes_offset());
  const std::uint32_t first_token = (blockIdx.x * kWarps + threadIdx.x / kWarp) * kHeldTokens;
  if (first_token >= form.tokens) return;
  const std::uint32_t tokens = min(kHeldTokens, form.tokens - first_token);
  const std::uint32_t first = blockIdx.y * form.group;
  const std::uint32_t last = min(first + form.group, form.dim);
  const std::uint32_t lane = threadIdx.x % kWarp;
  const std::uint32_t channel = first + lane * kCount;
  // Groups that are wider than a warp holds are read twice beyond that, the second time from the cache.
  constexpr std::uint32_t kStep = kWarp * kCount;
  constexpr std::size_t kElementBytes = sizeof(typename E::Raw);
  const auto plane = rows.plane(blockIdx.z, channel * kElementBytes);

  using Elements = Pack<typename E::Raw, kCount>;
  Waiting<Elements> held[kHeldTokens];
#pragma unroll
  for (std::uint32_t t = 0; t < kHeldTokens; ++t) {
    if (t < tokens && channel < last) {
      held[t] = std::bit_cast<Waiting<Elements>>(load<E, kCount>(plane.row(first_token + t)));
    }
  }
  std::uint32_t magnitude = 0;  // of the group of the lane's token
#pragma unroll
  for (std::uint32_t t = 0; t < kHeldTokens; ++t) {
    std::uint32_t largest = 0;
    if (t < tokens && channel < last) {
      const auto own = std::bit_cast<Elements>(held[t]);
      for (std::uint32_t k = 0; k < kCount; ++k) largest = max(largest, magnitude_bits<E>(own.values[k]));
      for (std::uint32_t more = channel + kStep; more < last; more += kStep) {
        const auto pack = load<E, kCount>(plane.row(first_token + t) + (more - channel) * kElementBytes);
        for (std::uint32_t k = 0; k < kCount; ++k) largest = max(largest, magnitude_bits<E>(pack.values[k]));
      }
    }
    largest = __reduce_max_sync(kEveryLane, largest);
    if (lane == t) magnitude = largest;
  }
  float inverse = 0;
  if (lane < tokens) {
    inverse = finish_group<E>(magnitude, scales + form.scale_index(first_token + lane, first), not_finite);
  }
#pragma unroll
  for (std::uint32_t t = 0; t < kHeldTokens; ++t) {
    const float of_token = __shfl_sync(kEveryLane, inverse, static_cast<int>(t));
    if (t >= tokens || channel >= last) continue;
    float own[kCount];
    for (std::uint32_t k = 0; k < kCount; ++k) own[k] = of_token;
    const std::size_t row = std::size_t{first_token + t} * form.dim;
    encode_pack<E, kCount>(std::bit_cast<Elements>(held[t]), own, codes + row + channel);
    for (std::uint32_t more = channel + kStep; more < last; more += kStep) {
      const auto pack = load<E, kCount>(plane.row(first_token + t) + (more - channel) * kElementBytes);
      encode_pack<E, kCount>(pack, own, codes + row + more);
    }
  }
}

/// Zeros between scales and codes, which the checksum covers.
__global__ void fill_gaps(Form form, std::byte* sections, std::size_t section_stride) {
  std::byte* section = sections + blockIdx.x * section_stride;
  const std::size_t at = form.scales() * sizeof(std::uint16_t) + threadIdx.x;
  if (at < form.codes_offset()) section[at] = std::byte{0};
}

/// One block per tile of tokens, all of one token group where scales are per channel, and of channels.
template <class E, std::uint32_t kCount>
__global__ void __launch_bounds__(kThreads, kBlocks)
    decode_elements(Form form, const std::byte* sections, std::size_t section_stride, std::uint32_t begin,
                    std::uint32_t end, std::uint32_t tile_tokens, std::byte* rows, std::size_t rows_stride,
                    std::uint32_t* bad_scale) {
  const std::byte* section = sections + blockIdx.z * section_stride;
  const auto* scales = reinterpret_cast<const std::uint16_t*>(section);
  const auto* codes = reinterpret_cast<const std::int8_t*>(section + form.codes_offset());
  auto* out = reinterpret_cast<typename E::Raw*>(rows + blockIdx.z * rows_stride);
  const std::uint32_t tile = begin / tile_tokens + blockIdx.x;
  const std::uint32_t first = max(begin, tile * tile_tokens);
  const std::uint32_t last = min(end, (tile + 1) * tile_tokens);
  const std::uint32_t channel = (blockIdx.y * blockDim.x + threadIdx.x) * kCount;
  if (channel >= form.dim) return;
  const auto scale_of = [&](std::size_t index) {
    const std::uint16_t bits = scales[index];
    if (bits > max_scale_bits(E::kDType)) *bad_scale = 1;
    return scale_value(bits);
  };
  float own[kCount];
  if (form.per_channel) {
    for (std::uint32_t k = 0; k < kCount; ++k) own[k] = scale_of(form.scale_index(first, channel + k));
  }
  for (std::uint32_t from = first + threadIdx.y; from < last; from += blockDim.y * kHeld) {
    using Codes = Pack<std::int8_t, kCount>;
    Waiting<Codes> held[kHeld];
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + i * blockDim.y;
      if (token < last) {
        held[i] = *reinterpret_cast<const Waiting<Codes>*>(codes + std::size_t{token} * form.dim + channel);
      }
    }
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + i * blockDim.y;
      if (token >= last) continue;
      if (!form.per_channel) {
        // Channel groups begin at multiples of kCount, so that a pack's channels are all in one.
        const float scale = scale_of(form.scale_index(token, channel));
        for (std::uint32_t k = 0; k < kCount; ++k) own[k] = scale;
      }
      const auto coded = std::bit_cast<Codes>(held[i]);
      Pack<typename E::Raw, kCount> decoded;
      for (std::uint32_t k = 0; k < kCount; ++k) {
        if (!is_finite(coded.values[k], own[k], E::kDType)) *bad_scale = 1;
        decoded.values[k] = E::from_float(decode(coded.values[k], own[k]));
      }
      *reinterpret_cast<Pack<typename E::Raw, kCount>*>(out + std::size_t{token - begin} * form.dim + channel) =
          decoded;
    }
  }
}

/// Whether the channel groups of a plane are a run of equal ones, through all rows, whose packs are a power of two.
bool has_runs(const Form& form) {
  return !form.per_channel && form.dim % form.group == 0 && form.group % (kRunVector * kMinGroupPacks) == 0 &&
         std::has_single_bit(form.group / kRunVector) && form.group / kRunVector <= kRunPacks;
}

template <class E>
__device__ Words<E, kRunVector> decode_pack(uint2 codes, float scale, std::uint32_t* bad_scale) {
  // The sign bit turned makes bytes of codes from -128 on, which are the last bits of a float above 2^23.
  constexpr float kUnits = 0x1p23F;
  constexpr std::uint32_t kTurned = 0x80808080U;
  const std::uint32_t words[2] = {codes.x ^ kTurned, codes.y ^ kTurned};
  float values[kRunVector];
  for (std::uint32_t k = 0; k < kRunVector; ++k) {
    const std::uint32_t bits = __byte_perm(words[k / 4], std::bit_cast<std::uint32_t>(kUnits), 0x7440 + k % 4);
    const float code = __uint_as_float(bits) - (kUnits + 128);
    if (!is_finite(code, scale, E::kDType)) *bad_scale = 1;
    values[k] = code * scale;
  }
  Words<E, kRunVector> decoded;
  for (std::uint32_t i = 0; i < Words<E, kRunVector>::kWords; ++i) {
    decoded.words[i] = to_word<E>(values + i * kWordElements<E>);
  }
  return decoded;
}

/// One warp per run of kRunPacks packs from first_pack on, which are numbered row by row: lane i holds every 32nd pack,
/// and reads every 32nd group's scale.
template <class E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    decode_runs(std::size_t codes_offset, std::size_t first_pack, std::size_t packs, std::uint32_t log_group_packs,
                const std::byte* sections, std::size_t section_stride, std::byte* rows, std::size_t rows_stride,
                std::uint32_t* bad_scale) {
  __shared__ float scales[kWarps][kRunPacks / kMinGroupPacks];
  const std::uint32_t warp = threadIdx.x / kWarp;
  const std::uint32_t lane = threadIdx.x % kWarp;
  const std::size_t at = (std::size_t{blockIdx.x} * kWarps + warp) * kRunPacks;
  if (at >= packs) return;
  const auto count = static_cast<std::uint32_t>(min(packs - at, std::size_t{kRunPacks}));
  const std::size_t first = first_pack + at;
  const std::byte* section = sections + blockIdx.z * section_stride;
  const auto* stored = reinterpret_cast<const std::uint16_t*>(section) + (first >> log_group_packs);
  const auto* codes = reinterpret_cast<const uint2*>(section + codes_offset) + first;
  auto* out = reinterpret_cast<Words<E, kRunVector>*>(rows + blockIdx.z * rows_stride) + at;

  uint2 held[kRunHeld];
#pragma unroll
  for (std::uint32_t i = 0; i < kRunHeld; ++i) held[i] = codes[min(i * kWarp + lane, count - 1)];
  for (std::uint32_t group = lane; group < count >> log_group_packs; group += kWarp) {
    const std::uint16_t bits = stored[group];
    if (bits > max_scale_bits(E::kDType)) *bad_scale = 1;
    scales[warp][group] = scale_value(bits);
  }
  __syncwarp();
#pragma unroll
  for (std::uint32_t i = 0; i < kRunHeld; ++i) {
    const std::uint32_t pack = i * kWarp + lane;
    if (pack < count) out[pack] = decode_pack<E>(held[i], scales[warp][pack >> log_group_packs], bad_scale);
  }
}

Status check(const Form& form, std::uint32_t count) {
  if (form.dtype == DType::kOpaqueBytes || form.tokens == 0 || form.dim == 0 || form.group == 0 || count == 0) {
    return {Code::kInvalid, "int8: nothing to encode or decode, or no numbers"};
  }
  if (count > 65535 || form.groups() > 65535) return {Code::kInvalid, "int8: more than 65535 planes or token groups"};
  return Status::ok();
}

/// Threads of a block over `packs` packs of a row.
dim3 tile_threads(std::uint32_t packs) {
  const std::uint32_t width = std::min(packs, kWarp);
  return dim3(width, kThreads / width);
}

template <class E, std::uint32_t kCount, class Rows>
void encode_as(const Form& form, const Rows& rows, std::uint32_t count, std::byte* sections, std::size_t section_stride,
               std::uint32_t* not_finite, cudaStream_t stream) {
  const bool has_gap = form.scales() * sizeof(std::uint16_t) < form.codes_offset();
  if (has_gap) fill_gaps<<<count, static_cast<unsigned>(Form::kAlignment), 0, stream>>>(form, sections, section_stride);
  if (form.per_channel) {
    const std::uint32_t packs = (form.dim + kCount - 1) / kCount;
    const dim3 threads = tile_threads(packs);
    const dim3 grid(form.groups(), (packs + threads.x - 1) / threads.x, count);
    encode_per_channel<E, kCount><<<grid, threads, 0, stream>>>(form, rows, sections, section_stride, not_finite);
  } else {
    constexpr std::uint32_t kTokens = kWarps * kHeldTokens;
    const dim3 grid((form.tokens + kTokens - 1) / kTokens, form.groups(), count);
    encode_per_token<E, kCount><<<grid, kThreads, 0, stream>>>(form, rows, sections, section_stride, not_finite);
  }
}

template <class E, std::uint32_t kCount>
void decode_as(const Form& form, const std::byte* sections, std::size_t section_stride, std::uint32_t count,
               std::uint32_t begin, std::uint32_t end, std::byte* rows, std::size_t rows_stride,
               std::uint32_t* bad_scale, cudaStream_t stream) {
  if (has_runs(form)) {
    constexpr std::size_t kBlockPacks = kWarps * kRunPacks;
    const std::size_t row_packs = form.dim / kRunVector;
    const std::size_t all = (end - begin) * row_packs;
    const dim3 grid(static_cast<unsigned>((all + kBlockPacks - 1) / kBlockPacks), 1, count);
    decode_runs<E><<<grid, kThreads, 0, stream>>>(form.codes_offset(), begin * row_packs, all,
                                                  static_cast<std::uint32_t>(std::countr_zero(form.group / kRunVector)),
                                                  sections, section_stride, rows, rows_stride, bad_scale);
    return;
  }
  const std::uint32_t packs = (form.dim + kCount - 1) / kCount;
  const dim3 threads = tile_threads(packs);
  const std::uint32_t tile_tokens = form.per_channel ? form.group : threads.y * kHeld;
  const dim3 grid((end - 1) / tile_tokens - begin / tile_tokens + 1, (packs + threads.x - 1) / threads.x, count);
  decode_elements<E, kCount><<<grid, threads, 0, stream>>>(form, sections, section_stride, begin, end, tile_tokens,
                                                           rows, rows_stride, bad_scale);
}

/// Calls run with the element type and the number of elements that move together: packs must not cross rows.
template <typename Run>
void with_type(const Form& form, Run run) {
  const auto with_count = [&]<class E>(E) {
    if (form.dim % kVector == 0) {
      run.template operator()<E, kVector>();
    } else {
      run.template operator()<E, 1>();
    }
  };
  if (form.dtype == DType::kFloat32) with_count(Float32());
  if (form.dtype == DType::kFloat16) with_count(Float16());
  if (form.dtype == DType::kBFloat16) with_count(BFloat16());
}

template <class Rows>
Status encode_rows(const Form& form, const Rows& rows, std::uint32_t count, std::byte* sections,
                   std::size_t section_stride, std::uint32_t* not_finite, cudaStream_t stream) {
  if (Status status = check(form, count); !status) return status;
  with_type(form, [&]<class E, std::uint32_t kCount>() {
    encode_as<E, kCount>(form, rows, count, sections, section_stride, not_finite, stream);
  });
  return launched("int8 encode");
}

}  // namespace

Status cuda_encode_planes(const Form& form, const std::byte* planes, std::size_t plane_stride, std::uint32_t count,
                          std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite,
                          CUstream_st* stream) {
  const PlanarRows rows{planes, plane_stride, static_cast<std::uint32_t>(form.dim * dtype_bytes(form.dtype))};
  return encode_rows(form, rows, count, sections, section_stride, not_finite, stream);
}

Status cuda_encode_pages(const Form& form, const PagedRows& rows, std::uint32_t count, std::byte* sections,
                         std::size_t section_stride, std::uint32_t* not_finite, CUstream_st* stream) {
  return encode_rows(form, rows, count, sections, section_stride, not_finite, stream);
}

Status cuda_decode_rows(const Form& form, const std::byte* sections, std::size_t section_stride, std::uint32_t count,
                        std::uint32_t begin, std::uint32_t end, std::byte* rows, std::size_t rows_stride,
                        std::uint32_t* bad_scale, CUstream_st* stream) {
  if (Status status = check(form, count); !status) return status;
  if (begin >= end || end > form.tokens) return {Code::kInvalid, "int8: the token range lies outside the plane"};
  with_type(form, [&]<class E, std::uint32_t kCount>() {
    decode_as<E, kCount>(form, sections, section_stride, count, begin, end, rows, rows_stride, bad_scale, stream);
  });
  return launched("int8 decode");
}

}  // namespace kvern::int8
