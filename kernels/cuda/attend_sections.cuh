#pragma once

#include "kernels/cuda/attend_tensor.cuh"

/// Attention over sections of the forms int4 and int8. A warp copies a tile of codes with their scales to shared memory
/// while it works on the tile before, and turns codes into elements where they are multiplied: the elements that
/// quantise::decode() and int8::decode() give, in arithmetic of pairs of bfloat16 that is exact up to one rounding.
namespace kvern::cuda::tensor {

/// Keys that a warp works on at a time. Token groups are multiples of it.
constexpr std::uint32_t kSectionTile = 32;
/// What a code of int4 has on it when its bits are in the mantissa.
constexpr float kCodeBase = 32;

/// 16 bytes to shared memory while the thread goes on; zeros behind the first `bytes` of them.
__device__ inline void copy_ahead(void* shared, const std::byte* from, unsigned bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until all copies but those of the last group are there, for this thread.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

/// The codes of a word, in pairs: of neighbours half a word apart.
template <unsigned kBits>
struct Word {
  static constexpr unsigned kCodes = 32 / kBits;
  static constexpr unsigned kPairs = kCodes / 2;
  /// Where the element of a column stands when pairs lie side by side.
  __device__ static unsigned place_of(unsigned column) {
    return column / kCodes * kCodes + column % kPairs * 2 + column % kCodes / kPairs;
  }
};

/// Pairs of bfloat16 that are whole numbers, from the bits of the codes: code bits in the mantissa of a power of two,
/// which is taken off again. All of it is exact.
template <unsigned kBits>
__device__ inline std::uint32_t code_pair(std::uint32_t word, unsigned pair, std::uint32_t minus_centre) {
  constexpr std::uint32_t kOnes = 0x3F803F80U;
  constexpr std::uint32_t kMinusOnes = 0xBF80BF80U;
  if constexpr (kBits == 4) {
    // Four bits whose last place is worth one, in kCodeBase to twice that.
    const std::uint32_t shifted = pair == 0 ? word << 2 : word >> (4 * pair - 2);
    return BFloat16Pairs::line((shifted & 0x003C003CU) | 0x42004200U, kOnes, minus_centre);
  } else {
    // The lower seven bits in 128 to 255, less 128 or, for negative ones, 256.
    const std::uint32_t shifted = pair == 0 ? word : word >> 8;
    return BFloat16Pairs::line((shifted & 0x00800080U) | 0x43004300U, kMinusOnes,
                               (shifted & 0x007F007FU) | 0x43004300U);
  }
}

template <class E, unsigned kBlocks, unsigned kBits>
class CodedRows {
 public:
  static constexpr unsigned kTiles = kSectionTile / 16;
  static constexpr unsigned kKeys = kSectionTile;

 private:
  using Codes32 = Word<kBits>;
  static constexpr unsigned kDim = kBlocks * kBlock;
  static constexpr unsigned kRowBytes = kDim * kBits / 8;
  // Lanes read eight bytes of four rows of keys, or four bytes of every second of eight rows of values, at a time: this
  // far apart no two of them meet in a bank. Except for keys of int8, which have to fit the 163 KiB of sm_80.
  static constexpr unsigned kKeyPitch = kRowBytes + (kBits == 4 ? 32 : 16);
  static constexpr unsigned kValuePitch = kRowBytes + 16;
  static constexpr unsigned kMostGroups = 2 * kBlocks;  ///< of channels
  static constexpr bool kOffsets = kBits == 4;

  struct Stage {
    std::byte keys[kKeys][kKeyPitch];
    std::byte values[kKeys][kValuePitch];
    std::uint16_t key_scales[kDim];
    std::uint16_t key_offsets[kOffsets ? kDim : 8];
    std::uint16_t value_scales[kKeys * kMostGroups];
    std::uint16_t value_offsets[kOffsets ? kKeys * kMostGroups : 8];
  };
  static_assert(sizeof(Stage) % 16 == 0);

 public:
  /// Shared memory of a warp.
  static constexpr std::size_t kSharedBytes = 2 * sizeof(Stage);

  __device__ CodedRows(const Segment& segment, Span span, const Queries<kBlocks>& queries, std::byte* shared)
      : segment_(segment),
        span_(span),
        stages_(reinterpret_cast<Stage*>(shared)),
        query_(queries.elements[lane_.row]),
        groups_((kDim + segment.value_codes.group - 1) / segment.value_codes.group),
        minus_centre_(BFloat16Pairs::pack(-segment.centre, -segment.centre)) {
    if (segment.key_codes.offsets == nullptr) clear_offsets();
  }

  __device__ void start(std::uint32_t first) { copy(first, true); }
  __device__ void look_ahead(std::uint32_t next, bool more) {
    // The stage that the next tile goes to has been read by all lanes.
    __syncwarp();
    now_ = ahead_;
    copy(next, more);
    wait_for_copies();
    __syncwarp();
  }
  __device__ void load_keys() {}
  __device__ void find_values(std::uint32_t) {}
  __device__ void load_values() {}

  __device__ void multiply_keys(float (&logits)[kTiles][4]) const {
    const Stage& stage = stages_[now_];
    for (unsigned unit = 0; unit < kRowBytes / 32; ++unit) {
      uint2 words[kTiles][2];
      for (unsigned tile = 0; tile < kTiles; ++tile) {
        for (unsigned i = 0; i < 2; ++i) {
          words[tile][i] =
              *reinterpret_cast<const uint2*>(&stage.keys[tile * 16 + i * 8 + lane_.row][unit * 32 + lane_.column * 8]);
        }
      }
      for (unsigned word = 0; word < 2; ++word) {
        const unsigned column = ((unit * 4 + lane_.column) * 2 + word) * Codes32::kCodes;
        std::uint32_t scales[Codes32::kPairs];
        std::uint32_t offsets[Codes32::kPairs] = {};
        std::uint32_t query[Codes32::kPairs];
        pair_up(stage.key_scales + column, scales);
        if constexpr (kOffsets) pair_up(stage.key_offsets + column, offsets);
        load(query_ + column, query);
        for (unsigned tile = 0; tile < kTiles; ++tile) {
          std::uint32_t keys[2][Codes32::kPairs];
          for (unsigned i = 0; i < 2; ++i) {
            const std::uint32_t codes = word == 0 ? words[tile][i].x : words[tile][i].y;
            for (unsigned pair = 0; pair < Codes32::kPairs; ++pair) {
              keys[i][pair] = E::line(code_pair<kBits>(codes, pair, minus_centre_), scales[pair], offsets[pair]);
            }
          }
          for (unsigned pair = 0; pair < Codes32::kPairs; pair += 2) {
            E::multiply(logits[tile], {keys[0][pair], keys[1][pair], keys[0][pair + 1], keys[1][pair + 1]},
                        {query[pair], query[pair + 1]});
          }
        }
      }
    }
  }

  __device__ void add_values(const Weights (&weights)[kTiles], float (&sums)[4 * kBlocks][4]) const {
    const Stage& stage = stages_[now_];
    for (unsigned unit = 0; unit < kRowBytes / 32; ++unit) {
      const unsigned word = unit * 8 + lane_.row;
      const unsigned group = word * Codes32::kCodes / segment_.value_codes.group;
      for (unsigned tile = 0; tile < kTiles; ++tile) {
        // Elements of two keys in a pair: the first half of the word's columns, and the second.
        std::uint32_t values[2][2][Codes32::kPairs];
        for (unsigned i = 0; i < 2; ++i) {
          const unsigned key = tile * 16 + i * 8 + lane_.column * 2;
          const std::uint32_t a = *reinterpret_cast<const std::uint32_t*>(&stage.values[key][word * 4]);
          const std::uint32_t b = *reinterpret_cast<const std::uint32_t*>(&stage.values[key + 1][word * 4]);
          const std::uint32_t scale = together(stage.value_scales, key, group);
          const std::uint32_t offset = kOffsets ? together(stage.value_offsets, key, group) : 0;
          for (unsigned half = 0; half < 2; ++half) {
            const std::uint32_t codes = half == 0 ? lower_halves(a, b) : upper_halves(a, b);
            for (unsigned pair = 0; pair < Codes32::kPairs; ++pair) {
              values[half][i][pair] = E::line(code_pair<kBits>(codes, pair, minus_centre_), scale, offset);
            }
          }
        }
        for (unsigned pair = 0; pair < Codes32::kPairs; ++pair) {
          multiply_weights<E>(sums[unit * Codes32::kPairs + pair],
                              {values[0][0][pair], values[1][0][pair], values[0][1][pair], values[1][1][pair]},
                              weights[tile]);
        }
      }
    }
  }
  __device__ static unsigned column(unsigned i, unsigned half) {
    const unsigned word = i / Codes32::kPairs * 8 + Lane().row;
    return word * Codes32::kCodes + i % Codes32::kPairs + half * Codes32::kPairs;
  }

 private:
  /// The elements of as many columns as a word has codes.
  __device__ static void load(const std::uint16_t* from, std::uint32_t (&to)[Codes32::kPairs]) {
    if constexpr (Codes32::kPairs == 4) {
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
    } else {
      const uint2 all = *reinterpret_cast<const uint2*>(from);
      to[0] = all.x, to[1] = all.y;
    }
  }
  /// The same, in the pairs that codes come in.
  __device__ static void pair_up(const std::uint16_t* from, std::uint32_t (&to)[Codes32::kPairs]) {
    std::uint32_t all[Codes32::kPairs];
    load(from, all);
    for (unsigned i = 0; i < Codes32::kPairs; i += 2) {
      to[i] = lower_halves(all[i / 2], all[i / 2 + Codes32::kPairs / 2]);
      to[i + 1] = upper_halves(all[i / 2], all[i / 2 + Codes32::kPairs / 2]);
    }
  }
  __device__ std::uint32_t together(const std::uint16_t* of_keys, unsigned key, unsigned group) const {
    const std::uint32_t first = of_keys[key * groups_ + group];
    return first | std::uint32_t{of_keys[(key + 1) * groups_ + group]} << 16;
  }

  template <unsigned kPitch>
  __device__ void copy_rows(std::byte (*to)[kPitch], const std::byte* from, unsigned rows) const {
    constexpr unsigned kEach = kRowBytes / 16;
    for (unsigned i = threadIdx.x % kWarp; i < kKeys * kEach; i += kWarp) {
      copy_ahead(&to[i / kEach][i % kEach * 16], from + i * 16, i / kEach < rows ? 16 : 0);
    }
  }
  __device__ static void copy_part(std::uint16_t* to, const std::byte* from, unsigned bytes, unsigned most) {
    for (unsigned i = threadIdx.x % kWarp * 16; i < most; i += kWarp * 16) {
      copy_ahead(reinterpret_cast<std::byte*>(to) + i, from + i, i < bytes ? min(bytes - i, 16U) : 0);
    }
  }
  /// Begins to copy the tile at first to the stage that is not being read.
  __device__ void copy(std::uint32_t first, bool more) {
    ahead_ = 1 - ahead_;
    if (more) {
      Stage& stage = stages_[ahead_];
      const unsigned rows = min(span_.end - first, kKeys);
      const Codes& keys = segment_.key_codes;
      const Codes& values = segment_.value_codes;
      const std::size_t key_group = std::size_t{first / keys.group} * kDim;
      const std::size_t value_group = std::size_t{first} * groups_;
      copy_rows(stage.keys, keys.codes + std::size_t{first} * kRowBytes, rows);
      copy_part(stage.key_scales, reinterpret_cast<const std::byte*>(keys.scales + key_group), kDim * 2, kDim * 2);
      copy_rows(stage.values, values.codes + std::size_t{first} * kRowBytes, rows);
      copy_part(stage.value_scales, reinterpret_cast<const std::byte*>(values.scales + value_group), rows * groups_ * 2,
                kKeys * groups_ * 2);
      if (kOffsets && keys.offsets != nullptr) {
        copy_part(stage.key_offsets, keys.offsets + key_group * 2, kDim * 2, kDim * 2);
        copy_part(stage.value_offsets, values.offsets + value_group * 2, rows * groups_ * 2, kKeys * groups_ * 2);
      }
    }
    end_of_copies();
  }
  __device__ void clear_offsets() {
    for (unsigned stage = 0; stage < 2; ++stage) {
      for (unsigned i = threadIdx.x % kWarp; i < (kOffsets ? kDim : 8); i += kWarp) stages_[stage].key_offsets[i] = 0;
      for (unsigned i = threadIdx.x % kWarp; i < (kOffsets ? kKeys * kMostGroups : 8); i += kWarp) {
        stages_[stage].value_offsets[i] = 0;
      }
    }
  }

  Lane lane_;
  const Segment& segment_;
  Span span_;
  Stage* stages_;
  const std::uint16_t* query_;
  unsigned groups_;
  std::uint32_t minus_centre_;
  unsigned now_ = 0;
  unsigned ahead_ = 1;
};

/// What a warp needs of the block's dynamic shared memory: its tiles, and its result after them.
template <unsigned kBlocks>
constexpr std::size_t warp_bytes(std::uint32_t bits) {
  const std::size_t tiles = bits == 4 ? CodedRows<BFloat16Pairs, kBlocks, 4>::kSharedBytes
                                      : CodedRows<BFloat16Pairs, kBlocks, 8>::kSharedBytes;
  constexpr std::size_t kResult = (sizeof(WarpResult<kQueries, kBlocks * kBlock>) + 15) / 16 * 16;
  return tiles > kResult ? tiles : kResult;
}

/// As attend_pieces(), where segments may be sections. Dynamic shared memory: shared_bytes per warp, warp_bytes() of
/// the widest codes.
template <class E, unsigned kBlocks>
__global__ void __launch_bounds__(kWarps<kBlocks>* kWarp, kResident)
    attend_sections(const __grid_constant__ Task task) {
  constexpr unsigned kDim = kBlocks * kBlock;
  extern __shared__ __align__(16) std::byte shared[];
  __shared__ Queries<kBlocks> queries;
  __shared__ Piece piece;
  take_piece_ahead(task, PlainRows<E, kBlocks>::kKeys, piece);
  const Block block(task, piece);
  using Result = WarpResult<kQueries, kDim>;
  std::byte* of_warp = shared + block.warp * task.warp_bytes;
  const auto attend = [&](auto source, auto place_of) {
    attend_tiles<E, kBlocks>(source, task, block, queries, place_of, *reinterpret_cast<Result*>(of_warp));
  };
  if (block.segment.bits == 4) {
    attend(CodedRows<E, kBlocks, 4>(block.segment, block.span(), queries, of_warp), Word<4>::place_of);
  } else if (block.segment.bits == 8) {
    attend(CodedRows<E, kBlocks, 8>(block.segment, block.span(), queries, of_warp), Word<8>::place_of);
  } else {
    attend(PlainRows<E, kBlocks>(task, block.segment, block.span(), queries), [](unsigned column) { return column; });
  }
  __syncthreads();
  hand_in<kWarps<kBlocks>, kQueries, kDim, 4>(
      task, piece, block.number, block.query_block,
      [&](unsigned of) -> const auto& { return *reinterpret_cast<const Result*>(shared + of * task.warp_bytes); },
      shared);
}

}  // namespace kvern::cuda::tensor
