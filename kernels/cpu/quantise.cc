#include "kernels/cpu/quantise.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quantise.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/cache_control.h>
// clang-format on

#include "kernels/cpu/pairs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::quantise {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

// V is worked on in blocks of this many rows: enough that scales are made in whole vectors, few enough that the rows
// are still in the L1 cache when they are encoded.
constexpr std::uint32_t kRows = 16;
constexpr std::uint32_t kMaxLines = kRows * (kMaxDim / Form::kDimStep);

// Where the codes of a row's channel begin.
struct Codes {
  std::uint8_t* first;
  std::uint8_t* second;
};
struct ConstCodes {
  const std::uint8_t* first;
  const std::uint8_t* second;
};

template <Kind kKind>
HWY_INLINE std::size_t first_bytes(std::uint32_t channels) {
  return channels * first_bits(kKind) / 8;
}
template <Kind kKind>
HWY_INLINE std::size_t second_bytes(std::uint32_t channels) {
  return channels * second_bits(kKind) / 8;
}

// The parts of a section. Sizes are kept here, where no store of a byte can change them.
template <Kind kKind>
struct Parts {
  Parts(const Form& form, const std::byte* section)
      : scales(reinterpret_cast<const std::uint16_t*>(section)),
        offsets(section + form.offsets_at()),
        first(reinterpret_cast<const std::uint8_t*>(section + form.first_at())),
        second(reinterpret_cast<const std::uint8_t*>(section + form.second_at())),
        dim(form.dim) {}

  HWY_INLINE ConstCodes codes(std::size_t token, std::uint32_t channel) const {
    return {first + token * first_bytes<kKind>(dim) + first_bytes<kKind>(channel),
            second + token * second_bytes<kKind>(dim) + second_bytes<kKind>(channel)};
  }
  HWY_INLINE Codes mutable_codes(std::size_t token, std::uint32_t channel) const {
    const ConstCodes at = codes(token, channel);
    return {const_cast<std::uint8_t*>(at.first), const_cast<std::uint8_t*>(at.second)};
  }

  const std::uint16_t* scales;
  const std::byte* offsets;
  const std::uint8_t* first;
  const std::uint8_t* second;
  std::uint32_t dim;
};

// What count groups are written with: scales and offsets as they are stored, the rest for the pass that encodes.
template <class E>
struct GroupsOut {
  std::uint16_t* scales;
  typename E::Raw* offsets;  // nullptr for symmetric groups
  float* inverses;
  float* biases;
};

template <class E, Kind kKind>
void make_groups_one_by_one(const Form& form, const typename E::Raw* lows, const typename E::Raw* highs,
                            std::uint32_t begin, std::uint32_t end, GroupsOut<E> out) {
  for (std::uint32_t i = begin; i < end; ++i) {
    const Group group = make_group(E::to_float(lows[i]), E::to_float(highs[i]), kKind, form.scheme, E::kDType);
    out.scales[i] = group.scale;
    if (out.offsets != nullptr) out.offsets[i] = E::from_float(group.offset);
    out.inverses[i] = group.inverse;
    out.biases[i] = group.bias;
  }
}

template <class E, Kind kKind>
bool make_lines_one_by_one(const Form& form, const std::uint16_t* scales, const typename E::Raw* offsets,
                           std::uint32_t begin, std::uint32_t end, float* line_scales, float* line_offsets) {
  bool valid = true;
  for (std::uint32_t i = begin; i < end; ++i) {
    Line line;
    const float offset = form.has_offsets() ? E::to_float(offsets[i]) : 0.0F;
    valid &= make_line(scales[i], offset, kKind, form.scheme, E::kDType, line);
    if constexpr (kKind == Kind::kInt8Residual) line = refine(line, E::kDType);
    line_scales[i] = line.scale;
    line_offsets[i] = line.offset;
  }
  return valid;
}

#if HWY_TARGET == HWY_SCALAR

HWY_INLINE void store_packed(const Packed& packed, Kind kind, Codes at) {
  std::memcpy(at.first, &packed.first, first_bits(kind));
  std::memcpy(at.second, &packed.second, second_bits(kind));
}
HWY_INLINE Packed load_packed(ConstCodes at, Kind kind) {
  Packed packed;
  std::memcpy(&packed.first, at.first, first_bits(kind));
  std::memcpy(&packed.second, at.second, second_bits(kind));
  return packed;
}

template <class E, Kind kKind>
bool encode_as(const Form& form, const typename E::Raw* plane, std::byte* section) {
  const Parts<kKind> parts(form, section);
  auto* offsets = form.has_offsets() ? reinterpret_cast<typename E::Raw*>(section + form.offsets_at()) : nullptr;
  const std::uint32_t token_step = form.per_channel ? form.group : 1;
  const std::uint32_t channel_step = form.per_channel ? kPackChannels : form.group;
  for (std::uint32_t token = 0; token < form.tokens; token += token_step) {
    const std::uint32_t token_end = std::min(token + token_step, form.tokens);
    for (std::uint32_t channel = 0; channel < form.dim; channel += channel_step) {
      const std::uint32_t channel_end = std::min(channel + channel_step, form.dim);
      Group groups[kPackChannels];
      for (std::uint32_t i = 0; i < (form.per_channel ? kPackChannels : 1); ++i) {
        float low = largest_finite(DType::kFloat32);
        float high = -low;
        for (std::uint32_t t = token; t < token_end; ++t) {
          for (std::uint32_t c = channel + i; c < (form.per_channel ? channel + i + 1 : channel_end); ++c) {
            const typename E::Raw raw = plane[std::size_t{t} * form.dim + c];
            if ((raw & E::kMagnitude) >= E::kInfinity) return false;
            low = std::min(low, E::to_float(raw));
            high = std::max(high, E::to_float(raw));
          }
        }
        groups[i] = make_group(low, high, kKind, form.scheme, E::kDType);
        const std::size_t index = form.scale_index(token, channel + i);
        const_cast<std::uint16_t*>(parts.scales)[index] = groups[i].scale;
        if (offsets != nullptr) offsets[index] = E::from_float(groups[i].offset);
      }
      for (std::uint32_t t = token; t < token_end; ++t) {
        for (std::uint32_t c = channel; c < channel_end; c += kPackChannels) {
          std::uint32_t codes[kPackChannels];
          for (std::uint32_t i = 0; i < kPackChannels; ++i) {
            const float value = E::to_float(plane[std::size_t{t} * form.dim + c + i]);
            codes[i] = encode(value, groups[form.per_channel ? i : 0], kKind);
          }
          store_packed(pack(codes, kKind), kKind, parts.mutable_codes(t, c));
        }
      }
    }
  }
  return true;
}

template <class E, Kind kKind>
bool decode_as(const Form& form, const std::byte* section, std::uint32_t begin, std::uint32_t end,
               typename E::Raw* rows) {
  const Parts<kKind> parts(form, section);
  const auto* offsets = reinterpret_cast<const typename E::Raw*>(parts.offsets);
  for (std::uint32_t token = begin; token < end; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; channel += kPackChannels) {
      const Packed packed = load_packed(parts.codes(token, channel), kKind);
      for (std::uint32_t i = 0; i < kPackChannels; ++i) {
        const std::size_t index = form.scale_index(token, channel + i);
        float scale = 0;
        float offset = 0;
        if (!make_lines_one_by_one<E, kKind>(form, parts.scales + index, offsets + index, 0, 1, &scale, &offset)) {
          return false;
        }
        const std::uint32_t code = unpack(packed, i, kKind);
        if (kKind == Kind::kFp8 && (code & 0x7FU) == 0x7FU) return false;
        rows[std::size_t{token - begin} * form.dim + channel + i] = E::from_float(decode(code, {scale, offset}, kKind));
      }
    }
  }
  return true;
}

#else

// Vectors of the pair kernels. The narrow ones cover 16 channels or fewer, for rows and groups of just that.
using Wide = DF;
using Narrow = hn::CappedTag<float, 8>;
constexpr std::uint32_t kWideChannels = 2 * hn::MaxLanes(Wide());
static_assert(2 * hn::MaxLanes(Narrow()) <= Form::kDimStep);

// Adding it rounds to the nearest integer, ties to even, and leaves it in the low bits.
constexpr float kMagic = 0x1.8p23F;

// Calls visit(i) for i in steps of kStep that cover count. The last may overlap the one before: visit() is idempotent.
template <std::uint32_t kStep, class Visit>
HWY_INLINE void for_each_block(std::uint32_t count, Visit visit) {
  std::uint32_t i = 0;
  for (; i + kStep <= count; i += kStep) visit(i);
  if (i < count) visit(count - kStep);
}

// Calls run(tag) with the widest vectors whose pairs fit into the columns.
template <class Run>
HWY_INLINE void with_width(std::uint32_t columns, Run run) {
  if (columns >= kWideChannels) {
    run(Wide());
  } else {
    run(Narrow());
  }
}

// Bits of an element as an integer that is ordered like the values, and back.
template <class E>
using KeyOf = hwy::MakeSigned<typename E::Raw>;
template <class E, class DK>
HWY_INLINE hn::VFromD<DK> ordered(E, DK dk, hn::VFromD<DK> bits) {
  constexpr int kSign = sizeof(typename E::Raw) * 8 - 1;
  return hn::Xor(bits, hn::And(hn::ShiftRight<kSign>(bits), hn::Set(dk, static_cast<KeyOf<E> >(E::kMagnitude))));
}
template <class E, class DK>
HWY_INLINE bool within_infinities(E, DK dk, hn::VFromD<DK> low, hn::VFromD<DK> high) {
  const auto infinity = hn::Set(dk, static_cast<KeyOf<E> >(E::kInfinity));
  return hn::AllTrue(dk, hn::And(hn::Lt(high, infinity), hn::Gt(low, hn::Not(infinity))));
}

// The smallest and largest element of each of a pair's columns over count rows. False when one is not finite.
template <class E, class D>
HWY_INLINE bool column_extremes(D, const typename E::Raw* rows, std::uint32_t count, std::size_t stride,
                                typename E::Raw* HWY_RESTRICT lows, typename E::Raw* HWY_RESTRICT highs) {
  const hn::Repartition<KeyOf<E>, D> dk;
  constexpr std::size_t kWidth = hn::MaxLanes(dk);
  bool finite = true;
  for (std::size_t column = 0; column < 2 * hn::MaxLanes(D()); column += kWidth) {
    auto low = hn::Set(dk, hwy::LimitsMax<KeyOf<E> >());
    auto high = hn::Set(dk, hwy::LimitsMin<KeyOf<E> >());
    for (std::uint32_t row = 0; row < count; ++row) {
      const auto* from = reinterpret_cast<const KeyOf<E>*>(rows + row * stride + column);
      const auto key = ordered(E(), dk, hn::LoadU(dk, from));
      low = hn::Min(low, key);
      high = hn::Max(high, key);
    }
    finite &= within_infinities(E(), dk, low, high);
    hn::StoreU(ordered(E(), dk, low), dk, reinterpret_cast<KeyOf<E>*>(lows + column));
    hn::StoreU(ordered(E(), dk, high), dk, reinterpret_cast<KeyOf<E>*>(highs + column));
  }
  return finite;
}

// The larger one of v's two halves, until a 128-bit block is left.
template <class D>
HWY_INLINE auto largest_block([[maybe_unused]] D d, hn::VFromD<D> v) {
  if constexpr (hn::MaxLanes(D()) * sizeof(hn::TFromD<D>) <= 16) {
    return v;
  } else {
    const hn::Half<D> half;
    return largest_block(half, hn::Max(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// The largest lane of each of a block's vectors, in order: interleaving pairs of rows and keeping the larger lanes
// halves their number until one lane per row is left.
template <class DK, std::size_t kCount>
HWY_INLINE auto largest_of_each(DK dk, hn::VFromD<DK> (&rows)[kCount]) {
  for (std::size_t half = kCount / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) {
      rows[i] =
          hn::Max(hn::InterleaveLower(dk, rows[i], rows[i + half]), hn::InterleaveUpper(dk, rows[i], rows[i + half]));
    }
  }
  return largest_block(dk, rows[0]);
}

// The smallest and largest element of each of count rows, as many at a time as a 128-bit block has lanes.
template <class E, class D>
bool row_extremes(D, const typename E::Raw* rows, std::uint32_t count, std::size_t stride, std::uint32_t columns,
                  typename E::Raw* HWY_RESTRICT lows, typename E::Raw* HWY_RESTRICT highs) {
  using Key = KeyOf<E>;
  const hn::Repartition<Key, D> dk;
  constexpr std::uint32_t kBlock = 16 / sizeof(Key);
  const hn::CappedTag<Key, kBlock> block;
  if (count < kBlock) {
    bool finite = true;
    for (std::uint32_t row = 0; row < count; ++row) {
      Key low = hwy::LimitsMax<Key>();
      Key high = hwy::LimitsMin<Key>();
      const auto key_of = [](typename E::Raw raw) {
        const auto bits = static_cast<Key>(raw);
        return bits < 0 ? static_cast<Key>(bits ^ static_cast<Key>(E::kMagnitude)) : bits;
      };
      for (std::uint32_t column = 0; column < columns; ++column) {
        const Key key = key_of(rows[row * stride + column]);
        low = std::min(low, key);
        high = std::max(high, key);
      }
      finite &= high < static_cast<Key>(E::kInfinity) && low > static_cast<Key>(~static_cast<Key>(E::kInfinity));
      lows[row] = static_cast<typename E::Raw>(key_of(static_cast<typename E::Raw>(low)));
      highs[row] = static_cast<typename E::Raw>(key_of(static_cast<typename E::Raw>(high)));
    }
    return finite;
  }
  bool finite = true;
  for_each_block<kBlock>(count, [&](std::uint32_t first) HWY_ATTR {
    hn::VFromD<decltype(dk)> low[kBlock];  // inverted, so that the largest one is wanted here, too
    hn::VFromD<decltype(dk)> high[kBlock];
    for (std::uint32_t i = 0; i < kBlock; ++i) {
      low[i] = high[i] = hn::Set(dk, hwy::LimitsMin<Key>());
      const auto* row = reinterpret_cast<const Key*>(rows + (first + i) * stride);
      for_each_block<hn::MaxLanes(dk)>(columns, [&](std::uint32_t column) HWY_ATTR {
        const auto key = ordered(E(), dk, hn::LoadU(dk, row + column));
        low[i] = hn::Max(low[i], hn::Not(key));
        high[i] = hn::Max(high[i], key);
      });
    }
    const auto lowest = hn::Not(largest_of_each(dk, low));
    const auto highest = largest_of_each(dk, high);
    finite &= within_infinities(E(), block, lowest, highest);
    hn::StoreU(ordered(E(), block, lowest), block, reinterpret_cast<Key*>(lows + first));
    hn::StoreU(ordered(E(), block, highest), block, reinterpret_cast<Key*>(highs + first));
  });
  return finite;
}

// make_group() of count groups.
template <class E, Kind kKind>
void make_groups(const Form& form, const typename E::Raw* lows, const typename E::Raw* highs, std::uint32_t count,
                 GroupsOut<E> out) {
  constexpr std::uint32_t kWidth = hn::MaxLanes(DF());
  if (count < kWidth) return make_groups_one_by_one<E, kKind>(form, lows, highs, 0, count, out);
  const hn::Rebind<std::uint16_t, DF> d16;
  const bool symmetric = form.scheme == Scheme::kSymmetric;
  const VF quarter = hn::Set(DF(), 0.25F);
  const VF codes = hn::Set(DF(), (symmetric ? half_span(kKind) : max_code(kKind)) * 0.25F);
  const VF reach = hn::Set(DF(), symmetric ? half_span(kKind) : max_code(kKind));
  for_each_block<kWidth>(count, [&](std::uint32_t i) HWY_ATTR {
    const VF smallest = E::load(lows + i);
    const VF low = hn::IfThenElseZero(hn::Ge(hn::Abs(smallest), hn::Set(DF(), kMinOffset)), smallest);
    const VF high = E::load(highs + i);
    const VF span = symmetric ? hn::Mul(hn::Max(hn::Neg(low), high), quarter)
                              : hn::Sub(hn::Mul(high, quarter), hn::Mul(low, quarter));
    const VF exact = hn::Div(span, codes);
    const auto used = hn::Ge(exact, hn::Set(DF(), kMinScale));
    const auto exact_bits = hn::BitCast(DU(), exact);
    const auto odd = hn::And(hn::ShiftRight<16>(exact_bits), hn::Set(DU(), 1));
    const auto nearest = hn::ShiftRight<16>(hn::Add(hn::Add(exact_bits, hn::Set(DU(), 0x7FFF)), odd));
    const auto most = hn::Set(DU(), max_scale_bits(kKind));
    const auto bits = hn::Min(nearest, most);
    // A span of -0 would look like one beyond everything.
    const auto squeezed = hn::And(used, hn::RebindMask(DF(), hn::Eq(bits, most)));
    VF offset = symmetric ? hn::Zero(DF()) : low;
    if (HWY_UNLIKELY(!symmetric && !hn::AllFalse(DF(), squeezed))) {
      const VF half = hn::Set(DF(), 0.5F);
      const VF middle = hn::Add(hn::Mul(low, half), hn::Mul(high, half));
      const VF begin = hn::Sub(middle, hn::Set(DF(), half_span(kKind) * scale_value(max_scale_bits(kKind))));
      const VF cut = hn::BitCast(DF(), hn::And(hn::BitCast(DU(), begin), hn::Set(DU(), 0xFFFF0000U)));
      offset = hn::IfThenElse(squeezed, cut, offset);
    }
    const VF end = hn::Add(hn::Mul(reach, hn::BitCast(DF(), hn::ShiftLeft<16>(bits))), offset);
    const auto beyond = hn::Gt(end, hn::Set(DF(), largest_finite(E::kDType)));
    const auto step = hn::IfThenElseZero(hn::RebindMask(DU(), beyond), hn::Set(DU(), 1));
    const auto final_bits = hn::IfThenElseZero(hn::RebindMask(DU(), used), hn::Sub(bits, step));
    const VF scale = hn::BitCast(DF(), hn::ShiftLeft<16>(final_bits));
    const VF inverse = hn::IfThenElseZero(
        used, hn::Div(hn::IfThenElse(squeezed, codes, hn::Set(DF(), 1.0F)), hn::IfThenElse(squeezed, span, scale)));
    hn::StoreU(hn::TruncateTo(d16, final_bits), d16, out.scales + i);
    hn::StoreU(inverse, DF(), out.inverses + i);
    const VF middle = hn::IfThenElseZero(used, hn::Set(DF(), kKind == Kind::kFp8 ? 0.0F : -half_span(kKind)));
    hn::StoreU(symmetric ? middle : hn::Mul(low, inverse), DF(), out.biases + i);
    if (!symmetric) E::store(offset, out.offsets + i);
  });
}

// make_line() of count groups, refined for int8r.
template <class E, Kind kKind>
bool make_lines(const Form& form, const std::uint16_t* scales, const typename E::Raw* offsets, std::uint32_t count,
                float* line_scales, float* line_offsets) {
  constexpr std::uint32_t kWidth = hn::MaxLanes(DF());
  if (count < kWidth) {
    return make_lines_one_by_one<E, kKind>(form, scales, offsets, 0, count, line_scales, line_offsets);
  }
  const hn::Rebind<std::uint16_t, DF> d16;
  const VF largest = hn::Set(DF(), largest_finite(E::kDType));
  const bool symmetric = form.scheme == Scheme::kSymmetric;
  bool valid = true;
  for_each_block<kWidth>(count, [&](std::uint32_t i) HWY_ATTR {
    const auto bits = hn::PromoteTo(DU(), hn::LoadU(d16, scales + i));
    VF scale = hn::BitCast(DF(), hn::ShiftLeft<16>(bits));
    const auto used = hn::Or(hn::Ge(scale, hn::Set(DF(), kMinScale)), hn::Eq(scale, hn::Zero(DF())));
    auto good = hn::AndNot(hn::RebindMask(DF(), hn::Gt(bits, hn::Set(DU(), max_scale_bits(kKind)))), used);
    VF offset = hn::Zero(DF());
    if (symmetric) {
      const VF end = hn::Mul(hn::Set(DF(), half_span(kKind)), scale);
      if (kKind != Kind::kFp8) offset = hn::Neg(end);
      good = hn::And(good, hn::Le(end, largest));
    } else {
      offset = E::load(offsets + i);
      const VF magnitude = hn::Abs(offset);
      const auto normal = hn::Or(hn::Ge(magnitude, hn::Set(DF(), kMinOffset)), hn::Eq(magnitude, hn::Zero(DF())));
      good = hn::And(good, hn::And(normal, hn::Le(magnitude, largest)));
      good = hn::And(good, hn::Le(hn::Add(hn::Mul(hn::Set(DF(), max_code(kKind)), scale), offset), largest));
    }
    valid &= hn::AllTrue(DF(), good);
    if constexpr (kKind == Kind::kInt8Residual) {
      const VF fine = hn::Mul(scale, hn::Set(DF(), 1 / kResidualSteps));
      const VF start = hn::Sub(offset, hn::Mul(hn::Set(DF(), kResidualMiddle), fine));
      const VF reach = hn::Mul(hn::Set(DF(), 255.0F), fine);
      const auto inside = hn::And(
          hn::And(hn::Le(reach, hn::Set(DF(), largest_finite(DType::kBFloat16))), hn::Ge(start, hn::Neg(largest))),
          hn::Le(hn::Add(reach, start), largest));
      if (HWY_UNLIKELY(!hn::AllTrue(DF(), inside))) {
        make_lines_one_by_one<E, kKind>(form, scales, offsets, i, i + kWidth, line_scales, line_offsets);
        return;
      }
      scale = fine;
      offset = start;
    }
    hn::StoreU(scale, DF(), line_scales + i);
    hn::StoreU(offset, DF(), line_offsets + i);
  });
  return valid;
}

// Codes of 2, 4 and 8 bits per pair of lanes, low bits of each lane first, as bytes of memory.
template <class D, class DU>
HWY_INLINE void store_pairs_of_2(D, DU du, hn::VFromD<DU> even, hn::VFromD<DU> odd, std::uint8_t* to) {
  const hn::Repartition<std::uint64_t, DU> d64;
  const hn::Rebind<std::uint8_t, decltype(d64)> d8;
  const auto nibbles = hn::BitCast(d64, hn::And(hn::Or(even, hn::ShiftLeft<2>(odd)), hn::Set(du, 15)));
  hn::StoreU(hn::TruncateTo(d8, hn::Or(nibbles, hn::ShiftRight<28>(nibbles))), d8, to);
}
template <class DU>
HWY_INLINE void store_pairs_of_4(DU, hn::VFromD<DU> even, hn::VFromD<DU> odd, std::uint8_t* to) {
  const hn::Rebind<std::uint8_t, DU> d8;
  hn::StoreU(hn::TruncateTo(d8, hn::Or(even, hn::ShiftLeft<4>(odd))), d8, to);
}

// Four bits of memory per lane.
template <class DU>
HWY_INLINE hn::VFromD<DU> load_nibbles(DU du, const std::uint8_t* from) {
  constexpr std::size_t kLanes = hn::MaxLanes(DU());
  if constexpr (kLanes == 16) {
    const hn::Half<DU> half;
    std::uint32_t words[2];
    std::memcpy(words, from, sizeof words);
    const auto shifts = hn::ShiftLeft<2>(hn::And(hn::Iota(du, 0), hn::Set(du, 7)));
    return hn::Shr(hn::Combine(du, hn::Set(half, words[1]), hn::Set(half, words[0])), shifts);
  } else {
    std::uint32_t word = 0;
    std::memcpy(&word, from, kLanes / 2);
    return hn::Shr(hn::Set(du, word), hn::ShiftLeft<2>(hn::Iota(du, 0)));
  }
}

template <class E, Kind kKind, class D>
HWY_INLINE void encode_pair(D d, const typename E::Raw* from, Pair<D> inverse, Pair<D> bias, Codes to) {
  const hn::RebindToUnsigned<D> du;
  const hn::Repartition<std::uint16_t, D> d16;
  const Pair<D> value = load_pair(E(), d, from);
  if constexpr (kKind == Kind::kFp8) {
    const auto code = [&](hn::VFromD<D> scaled) HWY_ATTR {
      const auto magnitude = hn::Abs(scaled);
      const auto floor = hn::BitCast(du, hn::Max(magnitude, hn::Set(d, 0x1p-6F)));
      const auto power = hn::Add(hn::And(floor, hn::Set(du, 0x7F800000U)), hn::Set(du, 20U << 23));
      const auto steps = hn::BitCast(du, hn::Add(magnitude, hn::BitCast(d, power)));
      // The low byte of power is zero, so that of steps holds the steps.
      const auto sum =
          hn::And(hn::Add(steps, hn::Sub(hn::ShiftRight<20>(power), hn::Set(du, 141U << 3))), hn::Set(du, 0x7F));
      return hn::Or(sum, hn::And(hn::ShiftRight<24>(hn::BitCast(du, scaled)), hn::Set(du, 0x80)));
    };
    const auto even = code(hn::Mul(value.even, inverse.even));
    const auto odd = code(hn::Mul(value.odd, inverse.odd));
    const hn::Rebind<std::uint16_t, D> pairs;
    hn::StoreU(hn::TruncateTo(pairs, hn::Or(even, hn::ShiftLeft<8>(odd))), pairs,
               reinterpret_cast<std::uint16_t*>(to.first));
  } else {
    const auto magic = hn::Set(d, kMagic);
    const auto steps_of = [&](hn::VFromD<D> x, hn::VFromD<D> inverse_of, hn::VFromD<D> bias_of) HWY_ATTR {
      const auto steps = hn::Sub(hn::Mul(x, inverse_of), bias_of);
      // Sixteen bits cannot hold values that hardly differ beside their size; residuals feel less than half a step.
      constexpr bool kCapped = E::kDType == DType::kFloat32 || kKind == Kind::kInt8Residual;
      return kCapped ? hn::Min(steps, hn::Set(d, max_code(kKind))) : steps;
    };
    const auto even_steps = steps_of(value.even, inverse.even, bias.even);
    const auto odd_steps = steps_of(value.odd, inverse.odd, bias.odd);
    const auto even_code = hn::Add(even_steps, magic);
    const auto odd_code = hn::Add(odd_steps, magic);
    const auto even = hn::BitCast(du, even_code);
    const auto odd = hn::BitCast(du, odd_code);
    if constexpr (kKind == Kind::kInt4) {
      store_pairs_of_4(du, even, odd, to.first);
    } else if constexpr (kKind == Kind::kInt2) {
      store_pairs_of_2(d, du, even, odd, to.first);
    } else if constexpr (kKind == Kind::kInt3) {
      const auto low = hn::Set(du, 3);
      store_pairs_of_2(d, du, hn::And(even, low), hn::And(odd, low), to.first);
      const auto both =
          hn::BitCast(d16, hn::Or(hn::And(even, hn::Set(du, 4)), hn::ShiftLeft<16>(hn::And(odd, hn::Set(du, 4)))));
      hn::StoreMaskBits(d16, hn::Gt(both, hn::Zero(d16)), to.second);
    } else {
      store_pairs_of_4(du, even, odd, to.first);
      const auto fine = [&](hn::VFromD<D> steps, hn::VFromD<D> code) HWY_ATTR {
        const auto rest = hn::Mul(hn::Sub(steps, hn::Sub(code, magic)), hn::Set(d, kResidualSteps));
        const auto cell = hn::Min(hn::Add(rest, hn::Set(d, kResidualMiddle)), hn::Set(d, kResidualSteps - 1));
        return hn::BitCast(du, hn::Add(cell, magic));
      };
      store_pairs_of_4(du, fine(even_steps, even_code), fine(odd_steps, odd_code), to.second);
    }
  }
}

// Collects codes of fp8 to see whether one is NaN.
template <class D>
struct NanCodes {
  using D8 = hn::Repartition<std::uint8_t, hn::Rebind<std::uint16_t, D> >;
  HWY_INLINE NanCodes() : largest(hn::Zero(D8())) {}
  HWY_INLINE void add(hn::VFromD<D8> codes) { largest = hn::Max(largest, hn::And(codes, hn::Set(D8(), 0x7F))); }
  HWY_INLINE bool none() const { return hn::AllTrue(D8(), hn::Lt(largest, hn::Set(D8(), 0x7F))); }
  hn::VFromD<D8> largest;
};

// One per width of vectors, so that many groups are judged at once.
struct AllNanCodes {
  HWY_INLINE AllNanCodes() : wide(), narrow() {}
  NanCodes<Wide> wide;
  NanCodes<Narrow> narrow;
  template <class D>
  HWY_INLINE NanCodes<D>& of(D) {
    if constexpr (hn::MaxLanes(D()) == hn::MaxLanes(Wide())) {
      return wide;
    } else {
      return narrow;
    }
  }
};

template <class E, Kind kKind, class D>
HWY_INLINE void decode_pair(D d, ConstCodes from, Pair<D> scale, Pair<D> offset, typename E::Raw* to,
                            [[maybe_unused]] NanCodes<D>& nans) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  if constexpr (kKind == Kind::kFp8) {
    const hn::Rebind<std::uint16_t, D> d16;
    const auto both = hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(from.first));
    nans.add(hn::BitCast(typename NanCodes<D>::D8(), both));
#if HWY_TARGET == HWY_SSE4
    const auto value_of = [&](hn::VFromD<decltype(du)> code) HWY_ATTR {
      const auto magnitude = hn::And(code, hn::Set(du, 0x7F));
      const auto normal = hn::Add(hn::ShiftLeft<20>(magnitude), hn::Set(du, 120U << 23));
      const auto tiny = hn::Mul(hn::ConvertTo(d, hn::BitCast(di, magnitude)), hn::Set(d, 0x1p-9F));
      const auto value =
          hn::IfThenElse(hn::RebindMask(d, hn::Lt(magnitude, hn::Set(du, 8))), tiny, hn::BitCast(d, normal));
      return hn::Or(value, hn::BitCast(d, hn::ShiftLeft<24>(hn::And(code, hn::Set(du, 0x80)))));
    };
    const auto wide = hn::PromoteTo(du, both);
    store_pair(E(), d,
               Pair<D>{hn::Mul(value_of(wide), scale.even), hn::Mul(value_of(hn::ShiftRight<8>(wide)), scale.odd)}, to);
#else
    // The bits of a float16 of 2^-8 times the value, smallest numbers included; decode_with() makes up for it.
    const hn::Rebind<hwy::float16_t, D> half;
    const auto value_of = [&](hn::VFromD<decltype(d16)> code) HWY_ATTR {
      const auto magnitude = hn::ShiftRight<1>(hn::And(code, hn::Set(d16, 0x7F00)));
      const auto bits = hn::Or(hn::And(code, hn::Set(d16, 0x8000)), magnitude);
      return hn::PromoteTo(d, hn::BitCast(half, bits));
    };
    store_pair(E(), d,
               Pair<D>{hn::Mul(value_of(hn::ShiftLeft<8>(both)), scale.even), hn::Mul(value_of(both), scale.odd)}, to);
#endif
  } else {
    hn::VFromD<decltype(du)> even;
    hn::VFromD<decltype(du)> odd;
    if constexpr (kKind == Kind::kInt4 || kKind == Kind::kInt8Residual) {
      const hn::Rebind<std::uint8_t, D> d8;
      const auto low = hn::Set(du, 15);
      const auto both = hn::PromoteTo(du, hn::LoadU(d8, from.first));
      if constexpr (kKind == Kind::kInt4) {
        even = hn::And(both, low);
        odd = hn::ShiftRight<4>(both);
      } else {
        const auto fine = hn::PromoteTo(du, hn::LoadU(d8, from.second));
        even = hn::Or(hn::ShiftLeft<4>(hn::And(both, low)), hn::And(fine, low));
        odd = hn::Or(hn::AndNot(low, both), hn::ShiftRight<4>(fine));
      }
    } else {
      const auto low = hn::Set(du, 3);
      const auto nibbles = load_nibbles(du, from.first);
      even = hn::And(nibbles, low);
      odd = hn::And(hn::ShiftRight<2>(nibbles), low);
      if constexpr (kKind == Kind::kInt3) {
        std::uint32_t word = 0;
        std::memcpy(&word, from.second, hn::MaxLanes(D()) / 4);
        const auto bits = hn::Shr(hn::Set(du, word), hn::Add(hn::Iota(du, 0), hn::Iota(du, 0)));
        even = hn::Or(even, hn::ShiftLeft<2>(hn::And(bits, hn::Set(du, 1))));
        odd = hn::Or(odd, hn::ShiftLeft<1>(hn::And(bits, hn::Set(du, 2))));
      }
    }
    // The product is exact: fused or not, the sum is the same.
    const auto value_of = [&](hn::VFromD<decltype(du)> code, hn::VFromD<D> by, hn::VFromD<D> plus)
                              HWY_ATTR { return hn::MulAdd(hn::ConvertTo(d, hn::BitCast(di, code)), by, plus); };
    store_pair(E(), d, Pair<D>{value_of(even, scale.even, offset.even), value_of(odd, scale.odd, offset.odd)}, to);
  }
}

// What decode_pair() multiplies with.
template <Kind kKind, class D>
HWY_INLINE hn::VFromD<D> factor(D d, hn::VFromD<D> scale) {
  if constexpr (kKind == Kind::kFp8 && HWY_TARGET != HWY_SSE4) return hn::Mul(scale, hn::Set(d, 256.0F));
  return scale;
}

// encode_pair() of count pairs that lie so many elements and bytes of codes apart, with nothing but registers in the
// loop. Fetches what lies ahead of each.
template <class E, Kind kKind, class D>
HWY_INLINE void encode_run(D d, const typename E::Raw* from, std::size_t from_step, std::size_t ahead, Pair<D> inverse,
                           Pair<D> bias, Codes to, std::size_t first_step, std::size_t second_step,
                           std::uint32_t count) {
  for (; count > 0; --count) {
    hwy::Prefetch(from + ahead);
    encode_pair<E, kKind>(d, from, inverse, bias, to);
    from += from_step;
    to.first += first_step;
    to.second += second_step;
  }
}

// decode_pair() of count pairs.
template <class E, Kind kKind, class D>
HWY_INLINE void decode_run(D d, ConstCodes from, std::size_t first_step, std::size_t second_step, Pair<D> scale,
                           Pair<D> offset, typename E::Raw* to, std::size_t to_step, std::uint32_t count,
                           NanCodes<D>& nans) {
  NanCodes<D> seen = nans;
  for (; count > 0; --count) {
    decode_pair<E, kKind>(d, from, scale, offset, to, seen);
    from.first += first_step;
    from.second += second_step;
    to += to_step;
  }
  nans = seen;
}

template <class E, Kind kKind>
bool encode_per_channel(const Form& form, const typename E::Raw* plane, std::byte* section) {
  const Parts<kKind> parts(form, section);
  auto* scales = reinterpret_cast<std::uint16_t*>(section);
  auto* offsets = form.has_offsets() ? reinterpret_cast<typename E::Raw*>(section + form.offsets_at()) : nullptr;
  bool finite = true;
  with_width(form.dim, [&]<class D>(D d) HWY_ATTR {
    constexpr std::uint32_t kChannels = 2 * hn::MaxLanes(D());
    for (std::uint32_t first = 0; first < form.tokens; first += form.group) {
      const std::uint32_t count = std::min(form.group, form.tokens - first);
      for_each_block<kChannels>(form.dim, [&](std::uint32_t channel) HWY_ATTR {
        HWY_ALIGN typename E::Raw lows[kChannels];
        HWY_ALIGN typename E::Raw highs[kChannels];
        HWY_ALIGN float inverses[kChannels];
        HWY_ALIGN float biases[kChannels];
        const auto* rows = plane + std::size_t{first} * form.dim + channel;
        finite &= column_extremes<E>(d, rows, count, form.dim, lows, highs);
        const std::size_t index = form.scale_index(first, channel);
        make_groups<E, kKind>(form, lows, highs, kChannels,
                              {scales + index, offsets == nullptr ? nullptr : offsets + index, inverses, biases});
        const Pair<D> inverse = load_pair(d, inverses);
        const Pair<D> bias = load_pair(d, biases);
        // The group's rows are in the cache; those of the next one come while these are encoded.
        const std::size_t ahead = std::size_t{std::min(form.group, form.tokens - first - count)} * parts.dim;
        encode_run<E, kKind>(d, rows, parts.dim, ahead, inverse, bias, parts.mutable_codes(first, channel),
                             first_bytes<kKind>(parts.dim), second_bytes<kKind>(parts.dim), count);
      });
      if (!finite) return;
    }
  });
  return finite;
}

template <class E, Kind kKind>
bool encode_per_token(const Form& form, const typename E::Raw* plane, std::byte* section) {
  const Parts<kKind> parts(form, section);
  auto* scales = reinterpret_cast<std::uint16_t*>(section);
  auto* offsets = form.has_offsets() ? reinterpret_cast<typename E::Raw*>(section + form.offsets_at()) : nullptr;
  HWY_ALIGN typename E::Raw lows[kMaxLines];
  HWY_ALIGN typename E::Raw highs[kMaxLines];
  HWY_ALIGN float inverses[kMaxLines];
  HWY_ALIGN float biases[kMaxLines];
  const std::uint32_t groups = form.groups();
  for (std::uint32_t first = 0; first < form.tokens; first += kRows) {
    const std::uint32_t count = std::min(kRows, form.tokens - first);
    const auto* rows = plane + std::size_t{first} * form.dim;
    bool finite = true;
    for (std::uint32_t group = 0; group < groups; ++group) {
      const std::uint32_t channel = group * form.group;
      const std::uint32_t columns = std::min(form.group, form.dim - channel);
      typename E::Raw low[kRows];
      typename E::Raw high[kRows];
      with_width(columns, [&]<class D>(D d) HWY_ATTR {
        finite &= row_extremes<E>(d, rows + channel, count, form.dim, columns, low, high);
      });
      for (std::uint32_t row = 0; row < count; ++row) {
        lows[row * groups + group] = low[row];
        highs[row * groups + group] = high[row];
      }
    }
    if (!finite) return false;
    const std::size_t index = form.scale_index(first, 0);
    make_groups<E, kKind>(form, lows, highs, count * groups,
                          {scales + index, offsets == nullptr ? nullptr : offsets + index, inverses, biases});
    const std::size_t ahead = std::size_t{std::min(kRows, form.tokens - first - count)} * parts.dim;
    for (std::uint32_t row = 0; row < count; ++row) {
      for (std::uint32_t group = 0; group < groups; ++group) {
        const std::uint32_t start = group * form.group;
        const std::uint32_t columns = std::min(form.group, form.dim - start);
        with_width(columns, [&]<class D>(D d) HWY_ATTR {
          const auto inverse = hn::Set(d, inverses[row * groups + group]);
          const auto bias = hn::Set(d, biases[row * groups + group]);
          for_each_block<2 * hn::MaxLanes(D())>(columns, [&](std::uint32_t column) HWY_ATTR {
            hwy::Prefetch(rows + std::size_t{row} * parts.dim + start + column + ahead);
            encode_pair<E, kKind>(d, rows + std::size_t{row} * parts.dim + start + column, Pair<D>{inverse, inverse},
                                  Pair<D>{bias, bias}, parts.mutable_codes(first + row, start + column));
          });
        });
      }
    }
  }
  return true;
}

template <class E, Kind kKind>
bool decode_per_channel(const Form& form, const std::byte* section, std::uint32_t begin, std::uint32_t end,
                        typename E::Raw* rows) {
  const Parts<kKind> parts(form, section);
  const auto* offsets = reinterpret_cast<const typename E::Raw*>(parts.offsets);
  HWY_ALIGN float line_scales[kMaxDim];
  HWY_ALIGN float line_offsets[kMaxDim];
  bool valid = true;
  with_width(form.dim, [&]<class D>(D d) HWY_ATTR {
    NanCodes<D> nans;
    for (std::uint32_t token = begin; token < end && valid;) {
      const std::size_t index = form.scale_index(token, 0);
      valid &= make_lines<E, kKind>(form, parts.scales + index, offsets + index, form.dim, line_scales, line_offsets);
      const std::uint32_t last = std::min(end, (token / form.group + 1) * form.group);
      for_each_block<2 * hn::MaxLanes(D())>(form.dim, [&](std::uint32_t channel) HWY_ATTR {
        Pair<D> scale = load_pair(d, line_scales + channel);
        scale = {factor<kKind>(d, scale.even), factor<kKind>(d, scale.odd)};
        const Pair<D> offset = load_pair(d, line_offsets + channel);
        decode_run<E, kKind>(d, parts.codes(token, channel), first_bytes<kKind>(parts.dim),
                             second_bytes<kKind>(parts.dim), scale, offset,
                             rows + std::size_t{token - begin} * parts.dim + channel, parts.dim, last - token, nans);
      });
      token = last;
    }
    valid &= nans.none();
  });
  return valid;
}

template <class E, Kind kKind>
bool decode_per_token(const Form& form, const std::byte* section, std::uint32_t begin, std::uint32_t end,
                      typename E::Raw* rows) {
  const Parts<kKind> parts(form, section);
  const auto* offsets = reinterpret_cast<const typename E::Raw*>(parts.offsets);
  HWY_ALIGN float line_scales[kMaxLines];
  HWY_ALIGN float line_offsets[kMaxLines];
  const std::uint32_t groups = form.groups();
  for (std::uint32_t first = begin; first < end; first += kRows) {
    const std::uint32_t count = std::min(kRows, end - first);
    const std::size_t index = form.scale_index(first, 0);
    if (!make_lines<E, kKind>(form, parts.scales + index, offsets + index, count * groups, line_scales, line_offsets)) {
      return false;
    }
    AllNanCodes nans;
    for (std::uint32_t row = first; row < first + count; ++row) {
      for (std::uint32_t group = 0; group < groups; ++group) {
        const std::uint32_t start = group * form.group;
        const std::uint32_t columns = std::min(form.group, form.dim - start);
        const std::uint32_t line = (row - first) * groups + group;
        with_width(columns, [&]<class D>(D d) HWY_ATTR {
          const auto scale = factor<kKind>(d, hn::Set(d, line_scales[line]));
          const auto offset = hn::Set(d, line_offsets[line]);
          for_each_block<2 * hn::MaxLanes(D())>(columns, [&](std::uint32_t column) HWY_ATTR {
            decode_pair<E, kKind>(d, parts.codes(row, start + column), Pair<D>{scale, scale}, Pair<D>{offset, offset},
                                  rows + std::size_t{row - begin} * parts.dim + start + column, nans.of(d));
          });
        });
      }
    }
    if (kKind == Kind::kFp8 && !(nans.wide.none() && nans.narrow.none())) return false;
  }
  return true;
}

template <class E, Kind kKind>
bool encode_as(const Form& form, const typename E::Raw* plane, std::byte* section) {
  return form.per_channel ? encode_per_channel<E, kKind>(form, plane, section)
                          : encode_per_token<E, kKind>(form, plane, section);
}

template <class E, Kind kKind>
bool decode_as(const Form& form, const std::byte* section, std::uint32_t begin, std::uint32_t end,
               typename E::Raw* rows) {
  return form.per_channel ? decode_per_channel<E, kKind>(form, section, begin, end, rows)
                          : decode_per_token<E, kKind>(form, section, begin, end, rows);
}

#endif

// Calls run with the element type and the kind as template arguments.
template <class E, class Run>
bool with_kind(Kind kind, Run run) {
  switch (kind) {
    case Kind::kFp8:
      return run.template operator()<E, Kind::kFp8>();
    case Kind::kInt4:
      return run.template operator()<E, Kind::kInt4>();
    case Kind::kInt3:
      return run.template operator()<E, Kind::kInt3>();
    case Kind::kInt2:
      return run.template operator()<E, Kind::kInt2>();
    case Kind::kInt8Residual:
      return run.template operator()<E, Kind::kInt8Residual>();
  }
  return false;
}
template <class Run>
bool with_types(const Form& form, Run run) {
  switch (form.dtype) {
    case DType::kFloat32:
      return with_kind<Float32>(form.kind, run);
    case DType::kFloat16:
      return with_kind<Float16>(form.kind, run);
    case DType::kBFloat16:
      return with_kind<BFloat16>(form.kind, run);
    case DType::kOpaqueBytes:
      return false;
  }
  return false;
}

bool encode_any(const Form& form, const std::byte* plane, std::byte* section) {
  return with_types(form, [&]<class E, Kind kKind>() {
    return encode_as<E, kKind>(form, reinterpret_cast<const typename E::Raw*>(plane), section);
  });
}

bool decode_any(const Form& form, const std::byte* section, std::uint32_t begin, std::uint32_t end, std::byte* rows) {
  return with_types(form, [&]<class E, Kind kKind>() {
    return decode_as<E, kKind>(form, section, begin, end, reinterpret_cast<typename E::Raw*>(rows));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::quantise
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::quantise {

HWY_EXPORT(encode_any);
HWY_EXPORT(decode_any);

bool encode_plane(const Form& form, const std::byte* plane, std::byte* section) {
  return HWY_DYNAMIC_DISPATCH(encode_any)(form, plane, section);
}

bool decode_rows(const Form& form, const std::byte* section, std::uint32_t begin, std::uint32_t end, std::byte* rows) {
  return HWY_DYNAMIC_DISPATCH(decode_any)(form, section, begin, end, rows);
}

}  // namespace kvern::quantise
#endif
