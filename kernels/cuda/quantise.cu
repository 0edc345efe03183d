#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <string>

#include "kernels/cuda/codes.cuh"
#include "kernels/cuda/quantise.h"
#include "kernels/cuda/rows.cuh"

namespace kvern::quantise {
namespace {

using namespace cuda;

/// Threads of a block at most, and the packs that each holds in registers: 16 KiB of 2-byte elements a block, all
/// asked for before the first is used.
constexpr unsigned kThreads = 128;
constexpr unsigned kWarps = kThreads / kWarp;
constexpr std::uint32_t kHeld = 8;
/// Packs beside each other in a block's tile of rows, at most.
constexpr std::uint32_t kMaxTilePacks = 32;
/// Channel groups have at most this many channels, 16 threads of kPackChannels, and at least two packs.
constexpr std::uint32_t kMaxChannelGroup = 128;
constexpr std::uint32_t kMinGroupPacks = Form::kDimStep / kPackChannels;
/// Blocks that share a multiprocessor: while some wait for memory, others code.
template <class E>
constexpr unsigned kBlocks = kWordElements<E> == 1 ? 4 : 6;
/// Packs of a warp's run.
constexpr std::uint32_t kRunPacks = kWarp * kHeld;

/// A form and what would take divisions to find again.
struct Layout {
  explicit Layout(const Form& of)
      : form(of),
        groups(of.groups()),
        offsets_at(of.offsets_at()),
        first_at(of.first_at()),
        second_at(of.second_at()),
        row_packs(of.dim / kPackChannels) {}

  Form form;
  std::uint32_t groups;
  std::size_t offsets_at;
  std::size_t first_at;
  std::size_t second_at;
  Divisor row_packs;
};

template <class E>
__device__ const Elements<E>& elements_at(const std::byte* pack) {
  return *reinterpret_cast<const Elements<E>*>(pack);
}
/// The value of an element of a word.
template <class E>
__device__ float value_in(std::uint32_t word, std::uint32_t element) {
  float values[kWordElements<E>];
  to_floats<E>(word >> element * 16, values);
  return values[0];
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

/// The planes of codes from a pack on, which is numbered among those of its plane, row by row: kPackChannels codes of
/// b bits are b bytes.
template <class Byte>
struct CodePlanes {
  Byte* first;
  Byte* second;
};
template <Kind kKind, class Byte>
__device__ CodePlanes<Byte> codes_at(const Layout& layout, Byte* section, std::size_t pack) {
  return {section + layout.first_at + pack * first_bits(kKind), section + layout.second_at + pack * second_bits(kKind)};
}
/// pack: counted from where the planes begin.
template <Kind kKind>
__device__ void store_codes(const CodePlanes<std::byte>& codes, std::uint32_t pack, const Packed& packed) {
  store_bytes<first_bits(kKind)>(codes.first + std::size_t{pack} * first_bits(kKind), packed.first);
  store_bytes<second_bits(kKind)>(codes.second + std::size_t{pack} * second_bits(kKind), packed.second);
}
template <Kind kKind>
__device__ Packed load_codes(const CodePlanes<const std::byte>& codes, std::uint32_t pack) {
  Packed packed;
  packed.first = load_bytes<first_bits(kKind)>(codes.first + std::size_t{pack} * first_bits(kKind));
  packed.second =
      static_cast<std::uint32_t>(load_bytes<second_bits(kKind)>(codes.second + std::size_t{pack} * second_bits(kKind)));
  return packed;
}

/// Stores what a group is written with. low and high: NaN where an element is.
template <class E, Kind kKind>
__device__ Factors finish_group(const Layout& layout, std::byte* section, std::size_t index, float low, float high,
                                std::uint32_t* not_finite) {
  constexpr float kLargest = largest_finite(DType::kFloat32);
  if (!(low >= -kLargest && high <= kLargest)) *not_finite = 1;
  const Group group = make_group(low, high, kKind, layout.form.scheme, E::kDType);
  reinterpret_cast<std::uint16_t*>(section)[index] = group.scale;
  if (layout.form.has_offsets()) {
    reinterpret_cast<typename E::Raw*>(section + layout.offsets_at)[index] = E::from_float(group.offset);
  }
  return {group.inverse, group.bias};
}

/// One block per token group of a plane and tile of channels: threads in x hold kPackChannels channels each, threads in
/// y take turns with the tokens. Groups of more than kHeld tokens per thread are read twice, the second time from the
/// cache. Threads beyond the last token or channel repeat it, which changes no extreme, and store nothing.
template <class E, Kind kKind, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocks<E>)
    encode_per_channel(Layout layout, Rows rows, std::byte* sections, std::size_t section_stride,
                       std::uint32_t* not_finite) {
  __shared__ Elements<E> lows[kThreads];  // [thread in y][pack]
  __shared__ Elements<E> highs[kThreads];
  __shared__ Factors factors[kMaxTilePacks * kPackChannels];
  const Form& form = layout.form;
  std::byte* section = sections + blockIdx.z * section_stride;
  const std::uint32_t first = blockIdx.x * form.group;
  const std::uint32_t tokens = min(form.group, form.tokens - first);
  const std::uint32_t first_pack = blockIdx.y * blockDim.x;
  const std::uint32_t row_packs = form.dim / kPackChannels;
  const bool inside = first_pack + threadIdx.x < row_packs;
  const std::uint32_t pack = min(first_pack + threadIdx.x, row_packs - 1);
  const std::uint32_t step = blockDim.y * kHeld;
  const std::uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const auto plane = rows.plane(blockIdx.z, pack * sizeof(Elements<E>));

  Elements<E> held[kHeld];
  const auto hold = [&](std::uint32_t from) {
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      held[i] = elements_at<E>(plane.row(first + min(from + threadIdx.y + i * blockDim.y, tokens - 1)));
    }
  };
  Elements<E> low;
  Elements<E> high;
  for (std::uint32_t from = 0; from < tokens; from += step) {
    hold(from);
    if (from == 0) low = high = held[0];
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      for (std::uint32_t k = 0; k < Elements<E>::kWords; ++k) {
        low.words[k] = smaller_of<E>(low.words[k], held[i].words[k]);
        high.words[k] = larger_of<E>(high.words[k], held[i].words[k]);
      }
    }
  }
  lows[thread] = low;
  highs[thread] = high;
  __syncthreads();
  for (std::uint32_t i = thread; i < blockDim.x * kPackChannels; i += blockDim.x * blockDim.y) {
    const std::uint32_t channel = first_pack * kPackChannels + i;
    if (channel >= form.dim) continue;
    const std::uint32_t word = i % kPackChannels / kWordElements<E>;
    std::uint32_t of_low = lows[i / kPackChannels].words[word];
    std::uint32_t of_high = highs[i / kPackChannels].words[word];
    for (std::uint32_t y = 1; y < blockDim.y; ++y) {
      of_low = smaller_of<E>(of_low, lows[y * blockDim.x + i / kPackChannels].words[word]);
      of_high = larger_of<E>(of_high, highs[y * blockDim.x + i / kPackChannels].words[word]);
    }
    const std::uint32_t element = i % kWordElements<E>;
    factors[i] = finish_group<E, kKind>(layout, section, std::size_t{blockIdx.x} * form.dim + channel,
                                        value_in<E>(of_low, element), value_in<E>(of_high, element), not_finite);
  }
  __syncthreads();
  if (!inside) return;
  Factors own[kPackChannels];
  for (std::uint32_t k = 0; k < kPackChannels; ++k) own[k] = factors[threadIdx.x * kPackChannels + k];
  const CodePlanes<std::byte> codes = codes_at<kKind>(layout, section, std::size_t{first} * row_packs + pack);
  for (std::uint32_t from = 0; from < tokens; from += step) {
    if (tokens > step) hold(from);
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + threadIdx.y + i * blockDim.y;
      const Packed packed = encode_pack<E, kKind>(held[i], own);
      if (token < tokens) store_codes<kKind>(codes, token * row_packs, packed);
    }
  }
}

/// Whether the channel groups of a plane are a run of equal ones, through all rows, whose packs are a power of two.
bool has_runs(const Form& form) {
  return !form.per_channel && form.dim % form.group == 0 && std::has_single_bit(form.group / kPackChannels);
}

/// One warp per run of kRunPacks packs: lane i holds every 32nd pack, and finishes every 32nd group.
template <class E, Kind kKind, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocks<E>)
    encode_runs(Layout layout, std::size_t packs, std::uint32_t log_group_packs, Rows rows, std::byte* sections,
                std::size_t section_stride, std::uint32_t* not_finite) {
  __shared__ Ends<E> ends[kWarps][kRunPacks];
  __shared__ Factors factors[kWarps][kRunPacks / kMinGroupPacks];
  const std::uint32_t warp = threadIdx.x / kWarp;
  const std::uint32_t lane = threadIdx.x % kWarp;
  const std::size_t first = (std::size_t{blockIdx.x} * kWarps + warp) * kRunPacks;
  if (first >= packs) return;
  const auto count = static_cast<std::uint32_t>(min(packs - first, std::size_t{kRunPacks}));
  const auto plane = rows.plane(blockIdx.z, 0);
  std::byte* section = sections + blockIdx.z * section_stride;

  Elements<E> held[kHeld];
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::size_t pack = first + min(i * kWarp + lane, count - 1);
    held[i] = elements_at<E>(plane.template pack<sizeof(Elements<E>)>(pack, layout.row_packs));
  }
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) ends[warp][i * kWarp + lane] = ends_of<E>(held[i]);
  __syncwarp();
  const std::uint32_t group_packs = 1U << log_group_packs;
  for (std::uint32_t group = lane; group < count >> log_group_packs; group += kWarp) {
    const Ends<E>* of_group = ends[warp] + (group << log_group_packs);
    // Lanes whose groups begin in the same bank of shared memory begin at different packs.
    const std::uint32_t turn = (group << log_group_packs) / kWarp & (group_packs - 1);
    Ends<E> all = of_group[turn];
    for (std::uint32_t k = 1; k < group_packs; ++k) all.add(of_group[k ^ turn]);
    float low;
    float high;
    all.values(low, high);
    factors[warp][group] =
        finish_group<E, kKind>(layout, section, (first >> log_group_packs) + group, low, high, not_finite);
  }
  __syncwarp();
  const CodePlanes<std::byte> codes = codes_at<kKind>(layout, section, first);
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::uint32_t pack = min(i * kWarp + lane, count - 1);
    const Factors factor = factors[warp][pack >> log_group_packs];
    Factors own[kPackChannels];
    for (std::uint32_t k = 0; k < kPackChannels; ++k) own[k] = factor;
    const Packed packed = encode_pack<E, kKind>(held[i], own);
    if (i * kWarp + lane < count) store_codes<kKind>(codes, pack, packed);
  }
}

/// For groups that are no runs. One block per tile of tokens and whole groups of channels, threads as for channels;
/// what they find in their packs lies in shared memory, and one thread per group puts it together.
template <class E, Kind kKind, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocks<E>)
    encode_per_token(Layout layout, Rows rows, std::byte* sections, std::size_t section_stride,
                     std::uint32_t* not_finite) {
  __shared__ Ends<E> ends[kThreads * kHeld];                      // [token][pack]
  __shared__ Factors factors[kThreads * kHeld / kMinGroupPacks];  // [token][group]
  const Form& form = layout.form;
  std::byte* section = sections + blockIdx.z * section_stride;
  const std::uint32_t packs = blockDim.x;
  const std::uint32_t row_packs = form.dim / kPackChannels;
  const std::uint32_t first_pack = blockIdx.y * packs;
  const std::uint32_t tile_tokens = blockDim.y * kHeld;
  const std::uint32_t first = blockIdx.x * tile_tokens;
  const std::uint32_t tokens = min(tile_tokens, form.tokens - first);
  const std::uint32_t group_packs = form.group / kPackChannels;
  const std::uint32_t tile_packs = min(packs, row_packs - first_pack);
  const std::uint32_t groups = (tile_packs + group_packs - 1) / group_packs;
  const bool inside = threadIdx.x < tile_packs;
  const std::uint32_t own_pack = first_pack + threadIdx.x;
  const auto plane = rows.plane(blockIdx.z, own_pack * sizeof(Elements<E>));

  Elements<E> held[kHeld];
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::uint32_t at = threadIdx.y + i * blockDim.y;
    if (inside && at < tokens) held[i] = elements_at<E>(plane.row(first + at));
  }
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::uint32_t at = threadIdx.y + i * blockDim.y;
    if (inside && at < tokens) ends[at * packs + threadIdx.x] = ends_of<E>(held[i]);
  }
  __syncthreads();
  for (std::uint32_t i = threadIdx.y * packs + threadIdx.x; i < tokens * groups; i += packs * blockDim.y) {
    const std::uint32_t at = i / groups;
    const std::uint32_t group = i % groups;
    const Ends<E>* of_group = ends + at * packs + group * group_packs;
    const std::uint32_t count = min(group_packs, tile_packs - group * group_packs);
    Ends<E> all = of_group[0];
    for (std::uint32_t k = 1; k < count; ++k) all.add(of_group[k]);
    float low;
    float high;
    all.values(low, high);
    const std::size_t index = std::size_t{first + at} * layout.groups + first_pack / group_packs + group;
    factors[i] = finish_group<E, kKind>(layout, section, index, low, high, not_finite);
  }
  __syncthreads();
  if (!inside) return;
  const CodePlanes<std::byte> codes = codes_at<kKind>(layout, section, std::size_t{first} * row_packs + own_pack);
  const std::uint32_t group = threadIdx.x / group_packs;
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::uint32_t at = threadIdx.y + i * blockDim.y;
    if (at >= tokens) continue;
    const Factors factor = factors[at * groups + group];
    Factors own[kPackChannels];
    for (std::uint32_t k = 0; k < kPackChannels; ++k) own[k] = factor;
    store_codes<kKind>(codes, at * row_packs, encode_pack<E, kKind>(held[i], own));
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
__device__ Line stored_line(const Layout& layout, const std::byte* section, std::size_t index, std::uint32_t* invalid) {
  float offset = 0;
  if (layout.form.has_offsets()) {
    offset = E::to_float(reinterpret_cast<const typename E::Raw*>(section + layout.offsets_at)[index]);
  }
  Line line;
  const std::uint16_t scale = reinterpret_cast<const std::uint16_t*>(section)[index];
  if (!make_line(scale, offset, kKind, layout.form.scheme, E::kDType, line)) *invalid = 1;
  return kKind == Kind::kInt8Residual ? refine(line, E::kDType) : line;
}

/// One block per tile of tokens and of channels, threads as in encode_per_channel. For keys the tile is of one token
/// group, and its lines are made once; for values the threads that hold a channel group's packs each make its line.
template <class E, Kind kKind, bool kPerChannel>
__global__ void __launch_bounds__(kThreads, kBlocks<E>)
    decode_elements(Layout layout, const std::byte* sections, std::size_t section_stride, std::uint32_t begin,
                    std::uint32_t end, std::uint32_t tile_tokens, std::byte* rows, std::size_t rows_stride,
                    std::uint32_t* invalid) {
  const Form& form = layout.form;
  const std::byte* section = sections + blockIdx.z * section_stride;
  // Tiles begin at multiples of their size, which is the group's for keys.
  const std::uint32_t tile = begin / tile_tokens + blockIdx.x;
  const std::uint32_t first = max(begin, tile * tile_tokens);
  const std::uint32_t tokens = min(end, (tile + 1) * tile_tokens) - first;
  const std::uint32_t row_packs = form.dim / kPackChannels;
  const std::uint32_t first_pack = blockIdx.y * blockDim.x;
  const bool inside = first_pack + threadIdx.x < row_packs;
  const std::uint32_t pack = min(first_pack + threadIdx.x, row_packs - 1);
  PlacedLines own;
  if constexpr (kPerChannel) {
    __shared__ Line lines[kMaxTilePacks * kPackChannels];
    const std::uint32_t width = blockDim.x * kPackChannels;
    for (std::uint32_t i = threadIdx.y * blockDim.x + threadIdx.x; i < width; i += blockDim.x * blockDim.y) {
      const std::uint32_t channel = first_pack * kPackChannels + i;
      if (channel >= form.dim) continue;
      lines[i] = stored_line<E, kKind>(layout, section, std::size_t{tile} * form.dim + channel, invalid);
    }
    __syncthreads();
    if (!inside) return;
    for (std::uint32_t k = 0; k < kPackChannels; ++k) put_line<kKind>(own, k, lines[threadIdx.x * kPackChannels + k]);
  }
  if (!inside) return;
  const CodePlanes<const std::byte> codes = codes_at<kKind>(layout, section, std::size_t{first} * row_packs + pack);
  auto* out =
      reinterpret_cast<Elements<E>*>(rows + blockIdx.z * rows_stride) + std::size_t{first - begin} * row_packs + pack;
  for (std::uint32_t from = threadIdx.y; from < tokens; from += blockDim.y * kHeld) {
    Packed packed[kHeld];
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      packed[i] = load_codes<kKind>(codes, min(from + i * blockDim.y, tokens - 1) * row_packs);
    }
#pragma unroll
    for (std::uint32_t i = 0; i < kHeld; ++i) {
      const std::uint32_t token = from + i * blockDim.y;
      if constexpr (!kPerChannel) {
        if (token >= tokens) continue;
        // Channel groups begin at multiples of 16, so that a thread's channels are all in one.
        const std::size_t index = std::size_t{first + token} * layout.groups + pack * kPackChannels / form.group;
        const Line line = stored_line<E, kKind>(layout, section, index, invalid);
        for (std::uint32_t k = 0; k < kPackChannels; ++k) put_line<kKind>(own, k, line);
      }
      const Elements<E> decoded = decode_pack<E, kKind>(packed[i], own, invalid);
      if (token < tokens) out[token * row_packs] = decoded;
    }
  }
}

/// One warp per run of kRunPacks packs from first_pack on, like encode_runs.
template <class E, Kind kKind>
__global__ void __launch_bounds__(kThreads, kBlocks<E>)
    decode_runs(Layout layout, std::size_t first_pack, std::size_t packs, std::uint32_t log_group_packs,
                const std::byte* sections, std::size_t section_stride, std::byte* rows, std::size_t rows_stride,
                std::uint32_t* invalid) {
  __shared__ Line lines[kWarps][kRunPacks / kMinGroupPacks];
  const std::uint32_t warp = threadIdx.x / kWarp;
  const std::uint32_t lane = threadIdx.x % kWarp;
  const std::size_t at = (std::size_t{blockIdx.x} * kWarps + warp) * kRunPacks;
  if (at >= packs) return;
  const auto count = static_cast<std::uint32_t>(min(packs - at, std::size_t{kRunPacks}));
  const std::byte* section = sections + blockIdx.z * section_stride;
  auto* out = reinterpret_cast<Elements<E>*>(rows + blockIdx.z * rows_stride) + at;
  const std::size_t first = first_pack + at;
  const CodePlanes<const std::byte> codes = codes_at<kKind>(layout, section, first);

  Packed packed[kHeld];
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    packed[i] = load_codes<kKind>(codes, min(i * kWarp + lane, count - 1));
  }
  for (std::uint32_t group = lane; group < count >> log_group_packs; group += kWarp) {
    lines[warp][group] = stored_line<E, kKind>(layout, section, (first >> log_group_packs) + group, invalid);
  }
  __syncwarp();
#pragma unroll
  for (std::uint32_t i = 0; i < kHeld; ++i) {
    const std::uint32_t pack = min(i * kWarp + lane, count - 1);
    const Line line = lines[warp][pack >> log_group_packs];
    PlacedLines own;
    for (std::uint32_t k = 0; k < kPackChannels; ++k) put_line<kKind>(own, k, line);
    const Elements<E> decoded = decode_pack<E, kKind>(packed[i], own, invalid);
    if (i * kWarp + lane < count) out[pack] = decoded;
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

bool has_gaps(const Form& form) {
  return form.scales() * sizeof(std::uint16_t) < form.offsets_at() ||
         (form.has_offsets() && form.offsets_at() + form.scales() * form.element_bytes() < form.first_at()) ||
         (second_bits(form.kind) > 0 && form.first_end() < form.second_at());
}

/// Threads of a block over `packs` packs of a row and at most `tokens` tokens.
dim3 tile_threads(std::uint32_t packs, std::uint32_t tokens) {
  return dim3(packs, std::min(kThreads / packs, (tokens + kHeld - 1) / kHeld));
}
std::uint32_t log_group_packs(const Form& form) {
  return static_cast<std::uint32_t>(std::countr_zero(form.group / kPackChannels));
}
dim3 run_blocks(std::size_t packs, std::uint32_t count) {
  constexpr std::size_t kBlockPacks = kWarps * kRunPacks;
  return dim3(static_cast<unsigned>((packs + kBlockPacks - 1) / kBlockPacks), 1, count);
}

template <class E, Kind kKind, class Rows>
void encode_as(const Form& form, const Rows& rows, std::uint32_t count, std::byte* sections, std::size_t section_stride,
               std::uint32_t* not_finite, cudaStream_t stream) {
  if (has_gaps(form)) {
    fill_gaps<<<count, static_cast<unsigned>(Form::kAlignment), 0, stream>>>(form, sections, section_stride);
  }
  const Layout layout(form);
  const std::uint32_t packs = form.dim / kPackChannels;
  if (form.per_channel) {
    const dim3 threads = tile_threads(std::min(packs, kMaxTilePacks), std::min(form.group, form.tokens));
    const dim3 grid(layout.groups, (packs + threads.x - 1) / threads.x, count);
    encode_per_channel<E, kKind><<<grid, threads, 0, stream>>>(layout, rows, sections, section_stride, not_finite);
  } else if (has_runs(form)) {
    const std::size_t all = std::size_t{form.tokens} * packs;
    encode_runs<E, kKind><<<run_blocks(all, count), kThreads, 0, stream>>>(layout, all, log_group_packs(form), rows,
                                                                           sections, section_stride, not_finite);
  } else {
    const std::uint32_t group_packs = form.group / kPackChannels;
    const dim3 threads = tile_threads(std::min(packs, kMaxTilePacks / group_packs * group_packs), form.tokens);
    const std::uint32_t tile_tokens = threads.y * kHeld;
    const dim3 grid((form.tokens + tile_tokens - 1) / tile_tokens, (packs + threads.x - 1) / threads.x, count);
    encode_per_token<E, kKind><<<grid, threads, 0, stream>>>(layout, rows, sections, section_stride, not_finite);
  }
}

template <class E, Kind kKind>
void decode_as(const Form& form, const std::byte* sections, std::size_t section_stride, std::uint32_t count,
               std::uint32_t begin, std::uint32_t end, std::byte* rows, std::size_t rows_stride, std::uint32_t* invalid,
               cudaStream_t stream) {
  const Layout layout(form);
  const std::uint32_t packs = form.dim / kPackChannels;
  if (has_runs(form)) {
    const std::size_t all = std::size_t{end - begin} * packs;
    decode_runs<E, kKind><<<run_blocks(all, count), kThreads, 0, stream>>>(layout, std::size_t{begin} * packs, all,
                                                                           log_group_packs(form), sections,
                                                                           section_stride, rows, rows_stride, invalid);
    return;
  }
  const dim3 threads =
      tile_threads(std::min(packs, kMaxTilePacks), form.per_channel ? std::min(form.group, form.tokens) : form.tokens);
  const std::uint32_t tile_tokens = form.per_channel ? form.group : threads.y * kHeld;
  const dim3 grid((end - 1) / tile_tokens - begin / tile_tokens + 1, (packs + threads.x - 1) / threads.x, count);
  const auto decode = form.per_channel ? decode_elements<E, kKind, true> : decode_elements<E, kKind, false>;
  decode<<<grid, threads, 0, stream>>>(layout, sections, section_stride, begin, end, tile_tokens, rows, rows_stride,
                                       invalid);
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

template <class Rows>
Status encode_rows(const Form& form, const Rows& rows, std::uint32_t count, std::byte* sections,
                   std::size_t section_stride, std::uint32_t* not_finite, cudaStream_t stream) {
  if (Status status = check(form, count); !status) return status;
  with_types(form, [&]<class E, Kind kKind>() {
    encode_as<E, kKind>(form, rows, count, sections, section_stride, not_finite, stream);
  });
  return launched("quantise encode");
}

}  // namespace

Status cuda_encode_planes(const Form& form, const std::byte* planes, std::size_t plane_stride, std::uint32_t count,
                          std::byte* sections, std::size_t section_stride, std::uint32_t* not_finite,
                          CUstream_st* stream) {
  const PlanarRows rows{planes, plane_stride, static_cast<std::uint32_t>(form.dim * form.element_bytes())};
  return encode_rows(form, rows, count, sections, section_stride, not_finite, stream);
}

Status cuda_encode_pages(const Form& form, const PagedRows& rows, std::uint32_t count, std::byte* sections,
                         std::size_t section_stride, std::uint32_t* not_finite, CUstream_st* stream) {
  return encode_rows(form, rows, count, sections, section_stride, not_finite, stream);
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
