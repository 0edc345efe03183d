#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/int8.h"

namespace kvern::int8 {
namespace {

using namespace cuda;

constexpr std::uint32_t kInfinityBits = 0x7F800000U;
constexpr unsigned kThreads = 256;
/// Elements that a thread loads at once: 8 or 16 bytes. Form::channel_group() is a multiple of it.
constexpr std::uint32_t kVector = 4;

/// Neighbouring elements of a row that move in one instruction.
template <typename T, std::uint32_t kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

/// The elements of a plane, by token and channel.
template <class E, std::uint32_t kCount>
__device__ Pack<typename E::Raw, kCount> load(const typename E::Raw* plane, std::size_t element) {
  return *reinterpret_cast<const Pack<typename E::Raw, kCount>*>(plane + element);
}

template <class E>
__device__ std::uint32_t magnitude_bits(typename E::Raw raw) {
  return __float_as_uint(E::to_float(raw)) & 0x7FFFFFFFU;
}

/// One block per token group of a plane and tile of channels: threads in x hold kCount channels each, threads in y take
/// turns with the tokens. The group is read twice, the second time from the cache.
template <class E, std::uint32_t kCount>
__global__ void encode_per_channel(Form form, const std::byte* planes, std::size_t plane_stride, std::byte* sections,
                                   std::size_t section_stride, std::uint32_t* not_finite) {
  __shared__ std::uint32_t magnitudes[kWarp * kCount];
  const auto* plane = reinterpret_cast<const typename E::Raw*>(planes + blockIdx.z * plane_stride);
  std::byte* section = sections + blockIdx.z * section_stride;
  auto* scales = reinterpret_cast<std::uint16_t*>(section);
  auto* codes = reinterpret_cast<std::int8_t*>(section + form.codes_offset());
  const std::uint32_t first = blockIdx.y * form.group;
  const std::uint32_t last = min(first + form.group, form.tokens);
  const std::uint32_t channel = (blockIdx.x * blockDim.x + threadIdx.x) * kCount;
  const bool inside = channel < form.dim;

  for (unsigned i = threadIdx.y * blockDim.x + threadIdx.x; i < kWarp * kCount; i += blockDim.x * blockDim.y) {
    magnitudes[i] = 0;
  }
  __syncthreads();
  if (inside) {
    std::uint32_t largest[kCount] = {};
    for (std::uint32_t token = first + threadIdx.y; token < last; token += blockDim.y) {
      const auto pack = load<E, kCount>(plane, std::size_t{token} * form.dim + channel);
      for (std::uint32_t i = 0; i < kCount; ++i) largest[i] = max(largest[i], magnitude_bits<E>(pack.values[i]));
    }
    for (std::uint32_t i = 0; i < kCount; ++i) atomicMax(&magnitudes[threadIdx.x * kCount + i], largest[i]);
  }
  __syncthreads();
  if (!inside) return;
  float inverses[kCount];
  Pack<std::uint16_t, kCount> group_scales;
  for (std::uint32_t i = 0; i < kCount; ++i) {
    const std::uint32_t bits = magnitudes[threadIdx.x * kCount + i];
    if (bits >= kInfinityBits) *not_finite = 1;
    inverses[i] = inverse_scale(__uint_as_float(bits), E::kDType);
    group_scales.values[i] = scale_bits(__uint_as_float(bits), E::kDType);
  }
  if (threadIdx.y == 0) {
    *reinterpret_cast<Pack<std::uint16_t, kCount>*>(scales + form.scale_index(first, channel)) = group_scales;
  }
  for (std::uint32_t token = first + threadIdx.y; token < last; token += blockDim.y) {
    const std::size_t element = std::size_t{token} * form.dim + channel;
    const auto pack = load<E, kCount>(plane, element);
    Pack<std::int8_t, kCount> coded;
    for (std::uint32_t i = 0; i < kCount; ++i) coded.values[i] = encode(E::to_float(pack.values[i]), inverses[i]);
    *reinterpret_cast<Pack<std::int8_t, kCount>*>(codes + element) = coded;
  }
}

/// One warp per token and group of channels.
template <class E, std::uint32_t kCount>
__global__ void encode_per_token(Form form, const std::byte* planes, std::size_t plane_stride, std::byte* sections,
                                 std::size_t section_stride, std::uint32_t* not_finite) {
  const auto* plane = reinterpret_cast<const typename E::Raw*>(planes + blockIdx.z * plane_stride);
  std::byte* section = sections + blockIdx.z * section_stride;
  auto* scales = reinterpret_cast<std::uint16_t*>(section);
  auto* codes = reinterpret_cast<std::int8_t*>(section + form.codes_offset());
  const std::uint32_t groups = form.groups();
  const std::uint32_t index = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (index >= form.tokens * groups) return;
  const std::uint32_t token = index / groups;
  const std::uint32_t first = index % groups * form.group;
  const std::uint32_t last = min(first + form.group, form.dim);
  const std::uint32_t lane = threadIdx.x % kWarp;

  std::uint32_t largest = 0;
  for (std::uint32_t channel = first + lane * kCount; channel < last; channel += kWarp * kCount) {
    const auto pack = load<E, kCount>(plane, std::size_t{token} * form.dim + channel);
    for (std::uint32_t i = 0; i < kCount; ++i) largest = max(largest, magnitude_bits<E>(pack.values[i]));
  }
  largest = __reduce_max_sync(0xFFFFFFFFU, largest);
  const float magnitude = __uint_as_float(largest);
  const float inverse = inverse_scale(magnitude, E::kDType);
  if (lane == 0) {
    if (largest >= kInfinityBits) *not_finite = 1;
    scales[index] = scale_bits(magnitude, E::kDType);
  }
  for (std::uint32_t channel = first + lane * kCount; channel < last; channel += kWarp * kCount) {
    const std::size_t element = std::size_t{token} * form.dim + channel;
    const auto pack = load<E, kCount>(plane, element);
    Pack<std::int8_t, kCount> coded;
    for (std::uint32_t i = 0; i < kCount; ++i) coded.values[i] = encode(E::to_float(pack.values[i]), inverse);
    *reinterpret_cast<Pack<std::int8_t, kCount>*>(codes + element) = coded;
  }
}

/// Zeros between scales and codes, which the checksum covers.
__global__ void fill_gaps(Form form, std::byte* sections, std::size_t section_stride) {
  std::byte* section = sections + blockIdx.x * section_stride;
  const std::size_t at = form.scales() * sizeof(std::uint16_t) + threadIdx.x;
  if (at < form.codes_offset()) section[at] = std::byte{0};
}

template <class E, std::uint32_t kCount>
__global__ void decode_elements(Form form, const std::byte* sections, std::size_t section_stride, std::uint32_t begin,
                                std::uint32_t end, std::byte* rows, std::size_t rows_stride, std::uint32_t* bad_scale) {
  const std::byte* section = sections + blockIdx.z * section_stride;
  const auto* scales = reinterpret_cast<const std::uint16_t*>(section);
  const auto* codes = reinterpret_cast<const std::int8_t*>(section + form.codes_offset());
  auto* out = reinterpret_cast<typename E::Raw*>(rows + blockIdx.z * rows_stride);
  const std::size_t count = std::size_t{end - begin} * form.dim;
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x * kCount;
  for (std::size_t at = (std::size_t{blockIdx.x} * blockDim.x + threadIdx.x) * kCount; at < count; at += step) {
    const std::uint32_t token = begin + static_cast<std::uint32_t>(at / form.dim);
    const auto channel = static_cast<std::uint32_t>(at % form.dim);
    const auto coded = *reinterpret_cast<const Pack<std::int8_t, kCount>*>(codes + std::size_t{begin} * form.dim + at);
    Pack<typename E::Raw, kCount> decoded;
    for (std::uint32_t i = 0; i < kCount; ++i) {
      const std::uint16_t scale = scales[form.scale_index(token, channel + i)];
      if (scale > max_scale_bits(E::kDType)) *bad_scale = 1;
      decoded.values[i] = E::from_float(decode(coded.values[i], scale_value(scale)));
    }
    *reinterpret_cast<Pack<typename E::Raw, kCount>*>(out + at) = decoded;
  }
}

Status check(const Form& form, std::uint32_t count) {
  if (form.dtype == DType::kOpaqueBytes || form.tokens == 0 || form.dim == 0 || form.group == 0 || count == 0) {
    return {Code::kInvalid, "int8: nothing to encode or decode, or no numbers"};
  }
  if (count > 65535 || form.groups() > 65535) return {Code::kInvalid, "int8: more than 65535 planes or token groups"};
  return Status::ok();
}

template <class E, std::uint32_t kCount>
void encode_as(const Form& form, const std::byte* planes, std::size_t plane_stride, std::uint32_t count,
               std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite, cudaStream_t stream) {
  fill_gaps<<<count, static_cast<unsigned>(Form::kAlignment), 0, stream>>>(form, sections, section_stride);
  if (form.per_channel) {
    const unsigned packs = (form.dim + kCount - 1) / kCount;
    const unsigned width = std::min(packs, kWarp);
    const dim3 grid((packs + width - 1) / width, form.groups(), count);
    encode_per_channel<E, kCount><<<grid, dim3(width, kThreads / width), 0, stream>>>(
        form, planes, plane_stride, sections, section_stride, not_finite);
  } else {
    constexpr unsigned kWarps = kThreads / kWarp;
    const unsigned blocks = (form.tokens * form.groups() + kWarps - 1) / kWarps;
    encode_per_token<E, kCount><<<dim3(blocks, 1, count), kThreads, 0, stream>>>(form, planes, plane_stride, sections,
                                                                                 section_stride, not_finite);
  }
}

template <class E, std::uint32_t kCount>
void decode_as(const Form& form, const std::byte* sections, std::size_t section_stride, std::uint32_t count,
               std::uint32_t begin, std::uint32_t end, std::byte* rows, std::size_t rows_stride,
               std::uint32_t* bad_scale, cudaStream_t stream) {
  const std::size_t packs = std::size_t{end - begin} * form.dim / kCount;
  const auto blocks = static_cast<unsigned>(std::min<std::size_t>((packs + kThreads - 1) / kThreads, 1U << 16));
  decode_elements<E, kCount><<<dim3(blocks, 1, count), kThreads, 0, stream>>>(form, sections, section_stride, begin,
                                                                              end, rows, rows_stride, bad_scale);
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

}  // namespace

Status cuda_encode_planes(const Form& form, const std::byte* planes, std::size_t plane_stride, std::uint32_t count,
                          std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite,
                          CUstream_st* stream) {
  if (Status status = check(form, count); !status) return status;
  with_type(form, [&]<class E, std::uint32_t kCount>() {
    encode_as<E, kCount>(form, planes, plane_stride, count, sections, section_stride, not_finite, stream);
  });
  return launched("int8 encode");
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
