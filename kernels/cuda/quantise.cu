#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/quantise.h"

namespace kvern::quantise {
namespace {

using namespace cuda;

/// Threads of a block at most, and the packs that each holds in registers: 16 KiB of 2-byte elements a block, all
/// asked for before the first is used.
constexpr unsigned kThreads = 128;
constexpr std::uint32_t kHeld = 8;
/// Packs beside each other in a block's tile of rows, at most.
constexpr std::uint32_t kMaxTilePacks = 32;
constexpr std::int32_t kInfinityKey = 0x7F800000;
/// Channel groups have at most this many channels, 16 threads of kPackChannels.
constexpr std::uint32_t kMaxChannelGroup = 128;

template <class E>
using Elements = Words<E, kPackChannels>;

template <class E>
__device__ Elements<E> load(const typename E::Raw* rows, std::size_t element) {
  return *reinterpret_cast<const Elements<E>*>(rows + element);
}
template <class E>
__device__ void to_values(const Elements<E>& elements, float (&values)[kPackChannels]) {
  for (std::uint32_t i = 0; i < Elements<E>::kWords; ++i) {
    to_floats<E>(elements.words[i], values + i * kWordElements<E>);
  }
}

/// An integer that is ordered like the values, and back.
__device__ std::int32_t ordered(float value) {
  const std::int32_t bits = __float_as_int(value);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
__device__ float from_ordered(std::int32_t key) { return __int_as_float(key ^ ((key >> 31) & 0x7FFFFFFF)); }

/// Lowest and highest value of some elements, ordered. NaN is above infinity.
struct Span {
  std::int32_t low = INT32_MAX;
  std::int32_t high = INT32_MIN;
  __device__ void add(const Span& other) {
    low = min(low, other.low);
    high = max(high, other.high);
  }
  __device__ bool is_finite() const { return high < kInfinityKey && low > ~kInfinityKey; }
};
template <class E>
__device__ void to_spans(const Extremes<E>& extremes, Span* spans) {
  float low[kWordElements<E>];
  float high[kWordElements<E>];
  to_floats<E>(extremes.low, low);
  to_floats<E>(extremes.high, high);
  for (std::uint32_t i = 0; i < kWordElements<E>; ++i) spans[i] = {ordered(low[i]), ordered(high[i])};
}

template <std::uint32_t kBytes>
__device__ void store_bytes(std::byte* to, std::uint64_t bits) {
  if constexpr (kBytes == 1) *reinterpret_cast<std::uint8_t*>(to) = static_cast<std::uint8_t>(bits);
  if constexpr (kBytes == 2) *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(bits);
  if constexpr (kBytes == 4) *reinterpret_cast<std::uint32_t*>(to) = static_cast<std::uint32_t>(bits);
  if constexpr (kBytes == 8) *reinterpret_cast<std::uint64_t*>(to) = bits;
}
template <std::uint32_t kBytes>
__device__ std::uint64_t load_bytes(const std::byte* from) {
  if constexpr (kBytes == 1) return *reinterpret_cast<const std::uint8_t*>(from);
  if constexpr (kBytes == 2) return *reinterpret_cast<const std::uint16_t*>(from);
  if constexpr (kBytes == 4) return *reinterpret_cast<const std::uint32_t*>(from);
  if constexpr (kBytes == 8) return *reinterpret_cast<const std::uint64_t*>(from);
  return 0;
}

/// kPackChannels codes of b bits are b bytes.
template <Kind kKind>
__device__ void store_codes(const Form& form, std::byte* section, std::uint32_t token, std::uint32_t channel,
                            const std::uint32_t (&codes)[kPackChannels]) {
  const Packed packed = pack(codes, kKind);
  const std::size_t at = (std::size_t{token} * form.dim + channel) / kPackChannels;
  store_bytes<first_bits(kKind)>(section + form.first_at() + at * first_bits(kKind), packed.first);
  store_bytes<second_bits(kKind)>(section + form.second_at() + at * second_bits(kKind), packed.second);
}
template <Kind kKind>
__device__ Packed load_codes(const Form& form, const std::byte* section, std::uint32_t token, std::uint32_t channel) {
  const std::size_t at = (std::size_t{token} * form.dim + channel) / kPackChannels;
  Packed packed;
  packed.first = load_bytes<first_bits(kKind)>(section + form.first_at() + at * first_bits(kKind));
  packed.second =
      static_cast<std::uint32_t>(load_bytes<second_bits(kKind)>(section + form.second_at() + at * second_bits(kKind)));
  return packed;
}

template <class E>
__device__ void store_group(const Form& form, std::byte* section, std::size_t index, const Group& group) {
  reinterpret_cast<std::uint16_t*>(section)[index] = group.scale;
  if (form.has_offsets()) {
    reinterpret_cast<typename E::Raw*>(section + form.offsets_at())[index] = E::from_float(group.offset);
  }
}

/// What a group's elements are coded with, as threads leave it for each other.
struct Factors {
  float inverse;
  float bias;
};
template <class E, Kind kKind>
__device__ Factors finish_group(const Form& form, std::byte* section, std::size_t index, const Span& span,
                                std::uint32_t* not_finite) {
  if (!span.is_finite()) *not_finite = 1;
  const Group group = make_group(from_ordered(span.low), from_ordered(span.high), kKind, form.scheme, E::kDType);
  store_group<E>(form, section, index, group);
  return {group.inverse, group.bias};
}
template <Kind kKind>
__device__ std::uint32_t encode(float value, const Factors& factors) {
  Group group;
  group.inverse = factors.inverse;
  group.bias = factors.bias;
  return quantise::encode(value, group, kKind);
}

/// One block per token group of a plane and tile of channels: threads in x hold kPackChannels channels each, threads in
/// y take turns with the tokens. Groups of more than kHeld tokens per thread are read twice, the second time from the
/// cache.
template <class E, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    encode_per_channel(Form form, const std::byte* planes, std::size_t plane_stride, std::byte* sections,
                       std::size_t section_stride, std::uint32_t* not_finite) {
  __shared__ Span spans[kThreads * kPackChannels];  // [thread in y][channel]
  __shared__ Factors factors[kMaxTilePacks * kPackChannels];
  const auto* plane = reinterpret_cast<const typename E::Raw*>(planes + blockIdx.z * plane_stride);
  std::byte* section = sections + blockIdx.z * section_stride;
  const std::uint32_t first = blockIdx.x * form.group;
  const std::uint32_t last = min(first + form.group, form.tokens);
  const std::uint32_t width = blockDim.x * kPackChannels;
  const std::uint32_t slot = threadIdx.x * kPackChannels;
  const std::uint32_t channel = blockIdx.y * width + slot;
  const bool inside = channel < form.dim;
  const std::uint32_t step = blockDim.y * kHeld;

  Elements<E> held[kHeld];
  const auto hold = [&](std::uint32_t from) {
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + threadIdx.y + i * blockDim.y;
      if (inside && token < last) held[i] = load<E>(plane, std::size_t{token} * form.dim + channel);
    }
  };
  Extremes<E> extremes[Elements<E>::kWords];
  for (std::uint32_t from = first; from < last; from += step) {
    hold(from);
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      if (!inside || from + threadIdx.y + i * blockDim.y >= last) continue;
      for (std::uint32_t k = 0; k < Elements<E>::kWords; ++k) extremes[k].add(held[i].words[k]);
    }
  }
  for (std::uint32_t k = 0; k < Elements<E>::kWords; ++k) {
    to_spans(extremes[k], spans + threadIdx.y * width + slot + k * kWordElements<E>);
  }
  __syncthreads();
  for (std::uint32_t i = threadIdx.y * blockDim.x + threadIdx.x; i < width; i += blockDim.x * blockDim.y) {
    if (blockIdx.y * width + i >= form.dim) continue;
    Span span = spans[i];
    for (std::uint32_t y = 1; y < blockDim.y; ++y) span.add(spans[y * width + i]);
    factors[i] =
        finish_group<E, kKind>(form, section, form.scale_index(first, blockIdx.y * width + i), span, not_finite);
  }
  __syncthreads();
  if (!inside) return;
  Factors own[kPackChannels];
  for (std::uint32_t k = 0; k < kPackChannels; ++k) own[k] = factors[slot + k];
  for (std::uint32_t from = first; from < last; from += step) {
    if (last - first > step) hold(from);
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + threadIdx.y + i * blockDim.y;
      if (token >= last) continue;
      float values[kPackChannels];
      to_values<E>(held[i], values);
      std::uint32_t codes[kPackChannels];
      for (std::uint32_t k = 0; k < kPackChannels; ++k) codes[k] = encode<kKind>(values[k], own[k]);
      store_codes<kKind>(form, section, token, channel, codes);
    }
  }
}

/// One block per tile of tokens and whole groups of channels. Threads as above; what they find in their packs lies in
/// shared memory, and one thread per group puts it together.
template <class E, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    encode_per_token(Form form, const std::byte* planes, std::size_t plane_stride, std::byte* sections,
                     std::size_t section_stride, std::uint32_t* not_finite) {
  __shared__ Span spans[kThreads * kHeld];           // [token][pack]
  __shared__ Factors factors[kThreads * kHeld / 2];  // [token][group]: groups have two packs or more
  const auto* plane = reinterpret_cast<const typename E::Raw*>(planes + blockIdx.z * plane_stride);
  std::byte* section = sections + blockIdx.z * section_stride;
  const std::uint32_t packs = blockDim.x;
  const std::uint32_t first_channel = blockIdx.y * packs * kPackChannels;
  const std::uint32_t channel = first_channel + threadIdx.x * kPackChannels;
  const std::uint32_t tile_tokens = blockDim.y * kHeld;
  const std::uint32_t first = blockIdx.x * tile_tokens;
  const std::uint32_t tokens = min(tile_tokens, form.tokens - first);
  const std::uint32_t group_packs = form.group / kPackChannels;
  const std::uint32_t tile_packs = min(packs, (form.dim - first_channel) / kPackChannels);
  const std::uint32_t groups = (tile_packs + group_packs - 1) / group_packs;
  const bool inside = threadIdx.x < tile_packs;

  Elements<E> held[kHeld];
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::uint32_t at = threadIdx.y + i * blockDim.y;
    if (inside && at < tokens) held[i] = load<E>(plane, std::size_t{first + at} * form.dim + channel);
  }
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::uint32_t at = threadIdx.y + i * blockDim.y;
    if (!inside || at >= tokens) continue;
    Extremes<E> extremes;
    for (std::uint32_t k = 0; k < Elements<E>::kWords; ++k) extremes.add(held[i].words[k]);
    Span of_elements[kWordElements<E>];
    to_spans(extremes, of_elements);
    for (std::uint32_t k = 1; k < kWordElements<E>; ++k) of_elements[0].add(of_elements[k]);
    spans[at * packs + threadIdx.x] = of_elements[0];
  }
  __syncthreads();
  for (std::uint32_t i = threadIdx.y * packs + threadIdx.x; i < tokens * groups; i += packs * blockDim.y) {
    const std::uint32_t at = i / groups;
    const std::uint32_t group = i % groups;
    const Span* of_group = spans + at * packs + group * group_packs;
    const std::uint32_t count = min(group_packs, tile_packs - group * group_packs);
    Span span;
    for (std::uint32_t k = 0; k < count; ++k) span.add(of_group[k]);
    const std::size_t index = form.scale_index(first + at, first_channel + group * form.group);
    factors[i] = finish_group<E, kKind>(form, section, index, span, not_finite);
  }
  __syncthreads();
  if (!inside) return;
  const std::uint32_t group = threadIdx.x / group_packs;
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::uint32_t at = threadIdx.y + i * blockDim.y;
    if (at >= tokens) continue;
    const Factors own = factors[at * groups + group];
    float values[kPackChannels];
    to_values<E>(held[i], values);
    std::uint32_t codes[kPackChannels];
    for (std::uint32_t k = 0; k < kPackChannels; ++k) codes[k] = encode<kKind>(values[k], own);
    store_codes<kKind>(form, section, first + at, channel, codes);
  }
}

/// Zeros between the parts of a section, which the checksum covers.
__global__ void fill_gaps(Form form, std::byte* sections, std::size_t section_stride) {
  std::byte* section = sections + blockIdx.x * section_stride;
  const auto fill = [section](std::size_t begin, std::size_t end) {
    if (begin + threadIdx.x < end) section[begin + threadIdx.x] = std::byte{0};
  };
  fill(form.scales() * sizeof(std::uint16_t), form.offsets_at());
  if (form.has_offsets()) fill(form.offsets_at() + form.scales() * form.element_bytes(), form.first_at());
  if (second_bits(form.kind) > 0) fill(form.first_end(), form.second_at());
}

/// The line of a group as it is stored; sets *invalid where encoding cannot have made it.
template <class E, Kind kKind>
__device__ Line stored_line(const Form& form, const std::byte* section, std::size_t index, std::uint32_t* invalid) {
  float offset = 0;
  if (form.has_offsets()) {
    offset = E::to_float(reinterpret_cast<const typename E::Raw*>(section + form.offsets_at())[index]);
  }
  Line line;
  const std::uint16_t scale = reinterpret_cast<const std::uint16_t*>(section)[index];
  if (!make_line(scale, offset, kKind, form.scheme, E::kDType, line)) *invalid = 1;
  return kKind == Kind::kInt8Residual ? refine(line, E::kDType) : line;
}

template <class E, Kind kKind>
__device__ Elements<E> decode_pack(const Packed& packed, const Line (&lines)[kPackChannels], std::uint32_t* invalid) {
  float values[kPackChannels];
  for (std::uint32_t k = 0; k < kPackChannels; ++k) {
    const std::uint32_t code = unpack(packed, k, kKind);
    if (kKind == Kind::kFp8 && (code & 0x7FU) == 0x7FU) *invalid = 1;
    values[k] = decode(code, lines[k], kKind);
  }
  Elements<E> decoded;
  for (std::uint32_t i = 0; i < Elements<E>::kWords; ++i) decoded.words[i] = to_word<E>(values + i * kWordElements<E>);
  return decoded;
}

/// One block per tile of tokens, all of one token group, and of channels. The lines of a channel group are made once
/// per block, or once per token by the threads that hold its packs.
template <class E, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    decode_elements(Form form, const std::byte* sections, std::size_t section_stride, std::uint32_t begin,
                    std::uint32_t end, std::uint32_t tile_tokens, std::byte* rows, std::size_t rows_stride,
                    std::uint32_t* invalid) {
  __shared__ Line lines[kMaxTilePacks * kPackChannels];
  const std::byte* section = sections + blockIdx.z * section_stride;
  auto* out = reinterpret_cast<typename E::Raw*>(rows + blockIdx.z * rows_stride);
  // Tiles begin at multiples of their size, which is the group's for keys.
  const std::uint32_t tile = begin / tile_tokens + blockIdx.x;
  const std::uint32_t first = max(begin, tile * tile_tokens);
  const std::uint32_t last = min(end, (tile + 1) * tile_tokens);
  const std::uint32_t width = blockDim.x * kPackChannels;
  const std::uint32_t channel = blockIdx.y * width + threadIdx.x * kPackChannels;
  if (form.per_channel) {
    for (std::uint32_t i = threadIdx.y * blockDim.x + threadIdx.x; i < width; i += blockDim.x * blockDim.y) {
      const std::uint32_t at = blockIdx.y * width + i;
      if (at < form.dim) lines[i] = stored_line<E, kKind>(form, section, form.scale_index(first, at), invalid);
    }
    __syncthreads();
  }
  if (channel >= form.dim) return;
  Line own[kPackChannels];
  if (form.per_channel) {
    for (std::uint32_t k = 0; k < kPackChannels; ++k) own[k] = lines[threadIdx.x * kPackChannels + k];
  }
  for (std::uint32_t from = first + threadIdx.y; from < last; from += blockDim.y * kHeld) {
    Packed packed[kHeld];
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + i * blockDim.y;
      if (token < last) packed[i] = load_codes<kKind>(form, section, token, channel);
    }
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + i * blockDim.y;
      if (token >= last) continue;
      if (!form.per_channel) {
        // Channel groups begin at multiples of 16, so that a thread's channels are all in one.
        const Line line = stored_line<E, kKind>(form, section, form.scale_index(token, channel), invalid);
        for (std::uint32_t k = 0; k < kPackChannels; ++k) own[k] = line;
      }
      *reinterpret_cast<Elements<E>*>(out + std::size_t{token - begin} * form.dim + channel) =
          decode_pack<E, kKind>(packed[i], own, invalid);
    }
  }
}

Status check(const Form& form, std::uint32_t count) {
  if (form.dtype == DType::kOpaqueBytes || form.tokens == 0 || form.dim == 0 || form.group == 0 || count == 0) {
    return {Code::kInvalid, "quantise: nothing to encode or decode, or no numbers"};
  }
  if (form.dim % Form::kDimStep != 0) return {Code::kInvalid, "quantise: rows must be multiples of 16 elements"};
  if (!form.per_channel && (form.group > kMaxChannelGroup || form.group % Form::kDimStep != 0)) {
    return {Code::kInvalid, "quantise: channel groups must be multiples of 16 up to 128"};
  }
  if (count > 65535 || form.groups() > 65535) {
    return {Code::kInvalid, "quantise: more than 65535 planes or token groups"};
  }
  return Status::ok();
}

/// Threads of a block over `packs` packs of a row.
dim3 tile_threads(std::uint32_t packs) { return dim3(packs, kThreads / packs); }

template <class E, Kind kKind>
void encode_as(const Form& form, const std::byte* planes, std::size_t plane_stride, std::uint32_t count,
               std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite, cudaStream_t stream) {
  fill_gaps<<<count, static_cast<unsigned>(Form::kAlignment), 0, stream>>>(form, sections, section_stride);
  const std::uint32_t packs = form.dim / kPackChannels;
  if (form.per_channel) {
    const dim3 threads = tile_threads(std::min(packs, kMaxTilePacks));
    const dim3 grid(form.groups(), (packs + threads.x - 1) / threads.x, count);
    encode_per_channel<E, kKind>
        <<<grid, threads, 0, stream>>>(form, planes, plane_stride, sections, section_stride, not_finite);
  } else {
    const std::uint32_t group_packs = form.group / kPackChannels;
    const dim3 threads = tile_threads(std::min(packs, kMaxTilePacks / group_packs * group_packs));
    const std::uint32_t tile_tokens = threads.y * kHeld;
    const dim3 grid((form.tokens + tile_tokens - 1) / tile_tokens, (packs + threads.x - 1) / threads.x, count);
    encode_per_token<E, kKind>
        <<<grid, threads, 0, stream>>>(form, planes, plane_stride, sections, section_stride, not_finite);
  }
}

template <class E, Kind kKind>
void decode_as(const Form& form, const std::byte* sections, std::size_t section_stride, std::uint32_t count,
               std::uint32_t begin, std::uint32_t end, std::byte* rows, std::size_t rows_stride, std::uint32_t* invalid,
               cudaStream_t stream) {
  const std::uint32_t packs = form.dim / kPackChannels;
  const dim3 threads = tile_threads(std::min(packs, kMaxTilePacks));
  const std::uint32_t tile_tokens = form.per_channel ? form.group : threads.y * kHeld;
  const dim3 grid((end - 1) / tile_tokens - begin / tile_tokens + 1, (packs + threads.x - 1) / threads.x, count);
  decode_elements<E, kKind><<<grid, threads, 0, stream>>>(form, sections, section_stride, begin, end, tile_tokens, rows,
                                                          rows_stride, invalid);
}

/// Calls run with the element type and the kind.
template <typename Run>
void with_types(const Form& form, Run run) {
  const auto with_kind = [&]<class E>(E) {
    if (form.kind == Kind::kFp8) run.template operator()<E, Kind::kFp8>();
    if (form.kind == Kind::kInt4) run.template operator()<E, Kind::kInt4>();
    if (form.kind == Kind::kInt3) run.template operator()<E, Kind::kInt3>();
    if (form.kind == Kind::kInt2) run.template operator()<E, Kind::kInt2>();
    if (form.kind == Kind::kInt8Residual) run.template operator()<E, Kind::kInt8Residual>();
  };
  if (form.dtype == DType::kFloat32) with_kind(Float32());
  if (form.dtype == DType::kFloat16) with_kind(Float16());
  if (form.dtype == DType::kBFloat16) with_kind(BFloat16());
}

}  // namespace

Status cuda_encode_planes(const Form& form, const std::byte* planes, std::size_t plane_stride, std::uint32_t count,
                          std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite,
                          CUstream_st* stream) {
  if (Status status = check(form, count); !status) return status;
  with_types(form, [&]<class E, Kind kKind>() {
    encode_as<E, kKind>(form, planes, plane_stride, count, sections, section_stride, not_finite, stream);
  });
  return launched("quantise encode");
}

Status cuda_decode_rows(const Form& form, const std::byte* sections, std::size_t section_stride, std::uint32_t count,
                        std::uint32_t begin, std::uint32_t end, std::byte* rows, std::size_t rows_stride,
                        std::uint32_t* invalid, CUstream_st* stream) {
  if (Status status = check(form, count); !status) return status;
  if (begin >= end || end > form.tokens) return {Code::kInvalid, "quantise: the token range lies outside the plane"};
  with_types(form, [&]<class E, Kind kKind>() {
    decode_as<E, kKind>(form, sections, section_stride, count, begin, end, rows, rows_stride, invalid, stream);
  });
  return launched("quantise decode");
}

}  // namespace kvern::quantise
