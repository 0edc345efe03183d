#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/quantise.h"

namespace kvern::quantise {
namespace {

using namespace cuda;

constexpr unsigned kThreads = 256;
constexpr std::int32_t kInfinityKey = 0x7F800000;
/// Channel groups have at most this many channels, 16 threads of kPackChannels.
constexpr std::uint32_t kMaxChannelGroup = 128;

/// Neighbouring elements of a row: what a thread loads, codes and stores at once.
template <class E>
struct alignas(16) Elements {
  typename E::Raw values[kPackChannels];
};

template <class E>
__device__ Elements<E> load(const typename E::Raw* rows, std::size_t element) {
  return *reinterpret_cast<const Elements<E>*>(rows + element);
}

/// An integer that is ordered like the values, and back.
__device__ std::int32_t ordered(float value) {
  const std::int32_t bits = __float_as_int(value);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
__device__ float from_ordered(std::int32_t key) { return __int_as_float(key ^ ((key >> 31) & 0x7FFFFFFF)); }
__device__ bool is_finite(std::int32_t low, std::int32_t high) { return high < kInfinityKey && low > ~kInfinityKey; }

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

/// One block per token group of a plane and tile of channels: threads in x hold kPackChannels channels each, threads in
/// y take turns with the tokens. The group is read twice, the second time from the cache.
template <class E, Kind kKind>
__global__ void encode_per_channel(Form form, const std::byte* planes, std::size_t plane_stride, std::byte* sections,
                                   std::size_t section_stride, std::uint32_t* not_finite) {
  __shared__ std::int32_t lows[kWarp * kPackChannels];
  __shared__ std::int32_t highs[kWarp * kPackChannels];
  const auto* plane = reinterpret_cast<const typename E::Raw*>(planes + blockIdx.z * plane_stride);
  std::byte* section = sections + blockIdx.z * section_stride;
  const std::uint32_t first = blockIdx.y * form.group;
  const std::uint32_t last = min(first + form.group, form.tokens);
  const std::uint32_t channel = (blockIdx.x * blockDim.x + threadIdx.x) * kPackChannels;
  const bool inside = channel < form.dim;
  const std::uint32_t slot = threadIdx.x * kPackChannels;

  for (unsigned i = threadIdx.y * blockDim.x + threadIdx.x; i < kWarp * kPackChannels; i += blockDim.x * blockDim.y) {
    lows[i] = INT32_MAX;
    highs[i] = INT32_MIN;
  }
  __syncthreads();
  if (inside) {
    std::int32_t low[kPackChannels];
    std::int32_t high[kPackChannels];
    for (std::uint32_t i = 0; i < kPackChannels; ++i) {
      low[i] = INT32_MAX;
      high[i] = INT32_MIN;
    }
    for (std::uint32_t token = first + threadIdx.y; token < last; token += blockDim.y) {
      const Elements<E> elements = load<E>(plane, std::size_t{token} * form.dim + channel);
      for (std::uint32_t i = 0; i < kPackChannels; ++i) {
        const std::int32_t key = ordered(E::to_float(elements.values[i]));
        low[i] = min(low[i], key);
        high[i] = max(high[i], key);
      }
    }
    for (std::uint32_t i = 0; i < kPackChannels; ++i) {
      atomicMin(&lows[slot + i], low[i]);
      atomicMax(&highs[slot + i], high[i]);
    }
  }
  __syncthreads();
  if (!inside) return;
  Group groups[kPackChannels];
  for (std::uint32_t i = 0; i < kPackChannels; ++i) {
    const std::int32_t low = lows[slot + i];
    const std::int32_t high = highs[slot + i];
    if (!is_finite(low, high)) *not_finite = 1;
    groups[i] = make_group(from_ordered(low), from_ordered(high), kKind, form.scheme, E::kDType);
    if (threadIdx.y == 0) store_group<E>(form, section, form.scale_index(first, channel + i), groups[i]);
  }
  for (std::uint32_t token = first + threadIdx.y; token < last; token += blockDim.y) {
    const Elements<E> elements = load<E>(plane, std::size_t{token} * form.dim + channel);
    std::uint32_t codes[kPackChannels];
    for (std::uint32_t i = 0; i < kPackChannels; ++i) {
      codes[i] = encode(E::to_float(elements.values[i]), groups[i], kKind);
    }
    store_codes<kKind>(form, section, token, channel, codes);
  }
}

/// `width` neighbouring threads, a power of two up to 16, per token and group of channels; each has kPackChannels
/// channels or none.
template <class E, Kind kKind>
__global__ void encode_per_token(Form form, const std::byte* planes, std::size_t plane_stride, std::byte* sections,
                                 std::size_t section_stride, std::uint32_t width, std::uint32_t* not_finite) {
  const auto* plane = reinterpret_cast<const typename E::Raw*>(planes + blockIdx.z * plane_stride);
  std::byte* section = sections + blockIdx.z * section_stride;
  const std::uint32_t groups = form.groups();
  const std::uint32_t index = (blockIdx.x * blockDim.x + threadIdx.x) / width;
  const std::uint32_t token = index / groups;
  const std::uint32_t begin = index % groups * form.group;
  const std::uint32_t channel = begin + threadIdx.x % width * kPackChannels;
  const bool inside = token < form.tokens && channel < min(begin + form.group, form.dim);

  Elements<E> elements;
  std::int32_t low = INT32_MAX;
  std::int32_t high = INT32_MIN;
  if (inside) {
    elements = load<E>(plane, std::size_t{token} * form.dim + channel);
    for (std::uint32_t i = 0; i < kPackChannels; ++i) {
      const std::int32_t key = ordered(E::to_float(elements.values[i]));
      low = min(low, key);
      high = max(high, key);
    }
  }
  for (std::uint32_t distance = width / 2; distance > 0; distance /= 2) {
    low = min(low, __shfl_xor_sync(kEveryLane, low, distance));
    high = max(high, __shfl_xor_sync(kEveryLane, high, distance));
  }
  if (!inside) return;
  const Group group = make_group(from_ordered(low), from_ordered(high), kKind, form.scheme, E::kDType);
  if (channel == begin) {
    if (!is_finite(low, high)) *not_finite = 1;
    store_group<E>(form, section, index, group);
  }
  std::uint32_t codes[kPackChannels];
  for (std::uint32_t i = 0; i < kPackChannels; ++i) codes[i] = encode(E::to_float(elements.values[i]), group, kKind);
  store_codes<kKind>(form, section, token, channel, codes);
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

template <class E, Kind kKind>
__global__ void decode_elements(Form form, const std::byte* sections, std::size_t section_stride, std::uint32_t begin,
                                std::uint32_t end, std::byte* rows, std::size_t rows_stride, std::uint32_t* invalid) {
  const std::byte* section = sections + blockIdx.z * section_stride;
  const auto* scales = reinterpret_cast<const std::uint16_t*>(section);
  const auto* offsets = reinterpret_cast<const typename E::Raw*>(section + form.offsets_at());
  auto* out = reinterpret_cast<typename E::Raw*>(rows + blockIdx.z * rows_stride);
  const std::size_t count = std::size_t{end - begin} * form.dim;
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x * kPackChannels;
  const auto line_at = [&](std::size_t index) {
    Line line;
    const float offset = form.has_offsets() ? E::to_float(offsets[index]) : 0.0F;
    if (!make_line(scales[index], offset, kKind, form.scheme, E::kDType, line)) *invalid = 1;
    return kKind == Kind::kInt8Residual ? refine(line, E::kDType) : line;
  };
  for (std::size_t at = (std::size_t{blockIdx.x} * blockDim.x + threadIdx.x) * kPackChannels; at < count; at += step) {
    const std::uint32_t token = begin + static_cast<std::uint32_t>(at / form.dim);
    const auto channel = static_cast<std::uint32_t>(at % form.dim);
    const Packed packed = load_codes<kKind>(form, section, token, channel);
    Elements<E> decoded;
    Line line;
    for (std::uint32_t i = 0; i < kPackChannels; ++i) {
      // Channel groups begin at multiples of 16, so that a thread's channels are all in one.
      if (form.per_channel || i == 0) line = line_at(form.scale_index(token, channel + i));
      const std::uint32_t code = unpack(packed, i, kKind);
      if (kKind == Kind::kFp8 && (code & 0x7FU) == 0x7FU) *invalid = 1;
      decoded.values[i] = E::from_float(decode(code, line, kKind));
    }
    *reinterpret_cast<Elements<E>*>(out + at) = decoded;
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

template <class E, Kind kKind>
void encode_as(const Form& form, const std::byte* planes, std::size_t plane_stride, std::uint32_t count,
               std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite, cudaStream_t stream) {
  fill_gaps<<<count, static_cast<unsigned>(Form::kAlignment), 0, stream>>>(form, sections, section_stride);
  if (form.per_channel) {
    const unsigned packs = form.dim / kPackChannels;
    const unsigned width = std::min(packs, kWarp);
    const dim3 grid((packs + width - 1) / width, form.groups(), count);
    encode_per_channel<E, kKind><<<grid, dim3(width, kThreads / width), 0, stream>>>(
        form, planes, plane_stride, sections, section_stride, not_finite);
  } else {
    unsigned width = 2;
    while (width * kPackChannels < std::min(form.group, form.dim)) width *= 2;
    const std::size_t threads = std::size_t{form.tokens} * form.groups() * width;
    const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
    encode_per_token<E, kKind><<<dim3(blocks, 1, count), kThreads, 0, stream>>>(form, planes, plane_stride, sections,
                                                                                section_stride, width, not_finite);
  }
}

template <class E, Kind kKind>
void decode_as(const Form& form, const std::byte* sections, std::size_t section_stride, std::uint32_t count,
               std::uint32_t begin, std::uint32_t end, std::byte* rows, std::size_t rows_stride, std::uint32_t* invalid,
               cudaStream_t stream) {
  const std::size_t packs = std::size_t{end - begin} * form.dim / kPackChannels;
  const auto blocks = static_cast<unsigned>(std::min<std::size_t>((packs + kThreads - 1) / kThreads, 1U << 16));
  decode_elements<E, kKind><<<dim3(blocks, 1, count), kThreads, 0, stream>>>(form, sections, section_stride, begin, end,
                                                                             rows, rows_stride, invalid);
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
