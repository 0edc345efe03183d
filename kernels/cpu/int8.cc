#include "kernels/cpu/int8.h"

#include <algorithm>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/int8.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include "kernels/cpu/elements-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::int8 {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

// Calls visit(column) for vectors of the tag's lanes that cover the columns. The last one may overlap the one before
// it, so visit() must be idempotent. False, and nothing done, when the columns do not fill one vector.
template <class D, class Visit>
HWY_INLINE bool for_each_vector(D, std::uint32_t columns, Visit visit) {
  constexpr auto kWidth = static_cast<std::uint32_t>(hn::MaxLanes(D()));
  if (HWY_TARGET == HWY_SCALAR || columns < kWidth) return false;
  std::uint32_t column = 0;
  for (; column + kWidth <= columns; column += kWidth) visit(column);
  if (column < columns) visit(columns - kWidth);
  return true;
}

// Bits of the largest magnitude per column over the rows. Magnitudes are ordered like their bits.
template <class E>
void column_magnitudes(const typename E::Raw* rows, std::uint32_t count, std::uint32_t dim,
                       typename E::Raw* HWY_RESTRICT magnitudes) {
  using Raw = typename E::Raw;
  const hn::CappedTag<Raw, 64 / sizeof(Raw)> d;
  const auto mask = hn::Set(d, E::kMagnitude);
  const bool done = for_each_vector(d, dim, [&](std::uint32_t column) HWY_ATTR {
    auto largest = hn::Zero(d);
    for (std::uint32_t row = 0; row < count; ++row) {
      largest = hn::Max(largest, hn::And(hn::LoadU(d, rows + std::size_t{row} * dim + column), mask));
    }
    hn::StoreU(largest, d, magnitudes + column);
  });
  if (done) return;
  for (std::uint32_t column = 0; column < dim; ++column) {
    Raw largest = 0;
    for (std::uint32_t row = 0; row < count; ++row) {
      largest = std::max(largest, static_cast<Raw>(rows[std::size_t{row} * dim + column] & E::kMagnitude));
    }
    magnitudes[column] = largest;
  }
}

template <class E>
typename E::Raw row_magnitude(const typename E::Raw* row, std::uint32_t columns) {
  typename E::Raw largest = 0;
  for (std::uint32_t column = 0; column < columns; ++column) {
    largest = std::max(largest, static_cast<typename E::Raw>(row[column] & E::kMagnitude));
  }
  return largest;
}

#if HWY_TARGET == HWY_SCALAR

template <class E>
std::uint32_t row_magnitudes_by_block(const typename E::Raw*, std::uint32_t, std::size_t, std::uint32_t,
                                      typename E::Raw*) {
  return 0;
}

#else

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

// As many rows at a time as a 128-bit block has lanes: interleaving pairs of rows and keeping the larger lanes halves
// their number, and in the end one lane per row is left, in order. Returns how many rows it did.
template <class E>
std::uint32_t row_magnitudes_by_block(const typename E::Raw* rows, std::uint32_t count, std::size_t stride,
                                      std::uint32_t columns, typename E::Raw* HWY_RESTRICT magnitudes) {
  using Raw = typename E::Raw;
  constexpr std::uint32_t kRows = 16 / sizeof(Raw);
  const hn::CappedTag<Raw, 64 / sizeof(Raw)> d;
  const hn::CappedTag<Raw, kRows> block;
  const auto mask = hn::Set(d, E::kMagnitude);
  if (columns < hn::MaxLanes(d)) return 0;
  std::uint32_t row = 0;
  for (; row + kRows <= count; row += kRows) {
    hn::VFromD<decltype(d)> largest[kRows];
    for (std::uint32_t i = 0; i < kRows; ++i) {
      const Raw* from = rows + (row + i) * stride;
      largest[i] = hn::Zero(d);
      for_each_vector(d, columns, [&](std::uint32_t column) HWY_ATTR {
        largest[i] = hn::Max(largest[i], hn::And(hn::LoadU(d, from + column), mask));
      });
    }
    for (std::uint32_t half = kRows / 2; half > 0; half /= 2) {
      for (std::uint32_t i = 0; i < half; ++i) {
        largest[i] = hn::Max(hn::InterleaveLower(d, largest[i], largest[i + half]),
                             hn::InterleaveUpper(d, largest[i], largest[i + half]));
      }
    }
    hn::StoreU(largest_block(d, largest[0]), block, magnitudes + row);
  }
  return row;
}

#endif

// Bits of the largest magnitude of each of count rows that lie stride elements apart.
template <class E>
void row_magnitudes(const typename E::Raw* rows, std::uint32_t count, std::size_t stride, std::uint32_t columns,
                    typename E::Raw* HWY_RESTRICT magnitudes) {
  std::uint32_t row = row_magnitudes_by_block<E>(rows, count, stride, columns, magnitudes);
  for (; row < count; ++row) magnitudes[row] = row_magnitude<E>(rows + row * stride, columns);
}

// Scales and their inverses of groups whose largest magnitudes are given. False when one is not finite.
template <class E>
bool make_scales(const typename E::Raw* HWY_RESTRICT magnitudes, std::uint32_t count,
                 std::uint16_t* HWY_RESTRICT scales, float* HWY_RESTRICT inverses) {
  const hn::Rebind<std::uint16_t, DF> d16;
  bool finite = true;
  for (std::uint32_t i = 0; i < count; ++i) finite &= magnitudes[i] < E::kInfinity;
  if (!finite) return false;
  const bool done = for_each_vector(DF(), count, [&](std::uint32_t i) HWY_ATTR {
    const VF magnitude = E::load(magnitudes + i);
    const VF scale = hn::Div(magnitude, hn::Set(DF(), kMaxCode));
    const auto used = hn::Ge(scale, hn::Set(DF(), kMinScale));
    const auto most = hn::Set(DU(), max_scale_bits(E::kDType));
    const auto up = hn::Min(hn::ShiftRight<16>(hn::Add(hn::BitCast(DU(), scale), hn::Set(DU(), 0xFFFF))), most);
    const auto bits = hn::IfThenElseZero(hn::RebindMask(DU(), used), up);
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(DI(), bits)), d16, scales + i);
    const auto capped = hn::RebindMask(DF(), hn::Eq(up, most));
    const VF numerator = hn::IfThenElse(capped, hn::Set(DF(), kMaxCode), hn::Set(DF(), 1.0F));
    const VF divisor = hn::IfThenElse(capped, magnitude, hn::BitCast(DF(), hn::ShiftLeft<16>(up)));
    hn::StoreU(hn::IfThenElseZero(used, hn::Div(numerator, divisor)), DF(), inverses + i);
  });
  for (std::uint32_t i = 0; i < count && !done; ++i) {
    const float magnitude = E::to_float(magnitudes[i]);
    scales[i] = scale_bits(magnitude, E::kDType);
    inverses[i] = inverse_scale(magnitude, E::kDType);
  }
  return true;
}

template <class E, class Inverse>
HWY_INLINE void encode_row(const typename E::Raw* HWY_RESTRICT row, std::uint32_t columns, Inverse inverse,
                           std::int8_t* HWY_RESTRICT codes) {
  const hn::Rebind<std::uint8_t, DF> d8;
  // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
  const VF magic = hn::Set(DF(), 0x1.8p23F);
  const bool done = for_each_vector(DF(), columns, [&](std::uint32_t column) HWY_ATTR {
    const VF nearest = hn::Add(hn::Mul(E::load(row + column), inverse.vector(column)), magic);
    hn::StoreU(hn::TruncateTo(d8, hn::BitCast(DU(), nearest)), d8, reinterpret_cast<std::uint8_t*>(codes) + column);
  });
  for (std::uint32_t column = 0; column < columns && !done; ++column) {
    codes[column] = encode(E::to_float(row[column]), inverse.scalar(column));
  }
}

template <class E, class Scale>
HWY_INLINE void decode_row(const std::int8_t* HWY_RESTRICT codes, std::uint32_t columns, Scale scale,
                           typename E::Raw* HWY_RESTRICT row) {
  const hn::Rebind<std::int8_t, DF> d8;
  const bool done = for_each_vector(DF(), columns, [&](std::uint32_t column) HWY_ATTR {
    const VF code = hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(d8, codes + column)));
    E::store(hn::Mul(code, scale.vector(column)), row + column);
  });
  for (std::uint32_t column = 0; column < columns && !done; ++column) {
    row[column] = E::from_float(decode(codes[column], scale.scalar(column)));
  }
}

// A factor per column.
struct PerColumn {
  const float* values;
  HWY_INLINE VF vector(std::uint32_t column) const { return hn::LoadU(DF(), values + column); }
  float scalar(std::uint32_t column) const { return values[column]; }
};

// One factor for all columns.
struct Same {
  float value;
  HWY_INLINE VF vector(std::uint32_t) const { return hn::Set(DF(), value); }
  float scalar(std::uint32_t) const { return value; }
};

template <class E>
bool encode_per_channel(const Form& form, const typename E::Raw* plane, std::uint16_t* scales, std::int8_t* codes) {
  HWY_ALIGN typename E::Raw magnitudes[kMaxDim];
  HWY_ALIGN float inverses[kMaxDim];
  for (std::uint32_t first = 0; first < form.tokens; first += form.group) {
    const std::uint32_t last = std::min(first + form.group, form.tokens);
    const std::size_t offset = std::size_t{first} * form.dim;
    column_magnitudes<E>(plane + offset, last - first, form.dim, magnitudes);
    if (!make_scales<E>(magnitudes, form.dim, scales + form.scale_index(first, 0), inverses)) return false;
    for (std::uint32_t token = first; token < last; ++token) {
      const std::size_t row = std::size_t{token} * form.dim;
      encode_row<E>(plane + row, form.dim, PerColumn{inverses}, codes + row);
    }
  }
  return true;
}

template <class E>
bool encode_per_token(const Form& form, const typename E::Raw* plane, std::uint16_t* scales, std::int8_t* codes) {
  // Enough rows that the scales are made in whole vectors, few enough that they are still in the L1 cache.
  constexpr std::uint32_t kRows = 16;
  constexpr std::uint32_t kMaxGroups = (kMaxDim + 15) / 16;
  HWY_ALIGN typename E::Raw magnitudes[kRows * kMaxGroups];
  HWY_ALIGN float inverses[kRows * kMaxGroups];
  const std::uint32_t groups = form.groups();
  for (std::uint32_t first = 0; first < form.tokens; first += kRows) {
    const std::uint32_t count = std::min(kRows, form.tokens - first);
    const auto* rows = plane + std::size_t{first} * form.dim;
    for (std::uint32_t group = 0; group < groups; ++group) {
      const std::uint32_t channel = group * form.group;
      typename E::Raw of_group[kRows];
      row_magnitudes<E>(rows + channel, count, form.dim, std::min(form.group, form.dim - channel), of_group);
      for (std::uint32_t row = 0; row < count; ++row) magnitudes[row * groups + group] = of_group[row];
    }
    if (!make_scales<E>(magnitudes, count * groups, scales + form.scale_index(first, 0), inverses)) return false;
    for (std::uint32_t row = 0; row < count; ++row) {
      for (std::uint32_t group = 0; group < groups; ++group) {
        const std::uint32_t channel = group * form.group;
        const std::size_t offset = std::size_t{first + row} * form.dim + channel;
        encode_row<E>(plane + offset, std::min(form.group, form.dim - channel), Same{inverses[row * groups + group]},
                      codes + offset);
      }
    }
  }
  return true;
}

// Whether tokens begin to end, of one group where scales are per channel, decode to finite values.
bool are_finite(const Form& form, const std::uint16_t* scales, const std::int8_t* codes, std::uint32_t begin,
                std::uint32_t end) {
  const std::uint16_t* used = scales + form.scale_index(begin, 0);
  const std::size_t count = form.per_channel ? form.dim : std::size_t{end - begin} * form.groups();
  std::uint16_t seen = 0;
  for (std::size_t i = 0; i < count; ++i) seen = std::max(seen, used[i]);
  if (seen <= any_code_scale_bits(form.dtype)) return true;
  if (seen > max_scale_bits(form.dtype)) return false;
  for (std::uint32_t token = begin; token < end; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) {
      const std::int8_t code = codes[std::size_t{token} * form.dim + channel];
      if (!is_finite(code, scale_value(scales[form.scale_index(token, channel)]), form.dtype)) return false;
    }
  }
  return true;
}

template <class E>
bool decode_per_channel(const Form& form, const std::uint16_t* scales, const std::int8_t* codes, std::uint32_t begin,
                        std::uint32_t end, typename E::Raw* rows) {
  HWY_ALIGN float values[kMaxDim];
  for (std::uint32_t token = begin; token < end;) {
    const std::uint16_t* group = scales + form.scale_index(token, 0);
    const std::uint32_t last = std::min(end, (token / form.group + 1) * form.group);
    if (!are_finite(form, scales, codes, token, last)) return false;
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) values[channel] = scale_value(group[channel]);
    for (; token < last; ++token) {
      decode_row<E>(codes + std::size_t{token} * form.dim, form.dim, PerColumn{values},
                    rows + std::size_t{token - begin} * form.dim);
    }
  }
  return true;
}

template <class E>
bool decode_per_token(const Form& form, const std::uint16_t* scales, const std::int8_t* codes, std::uint32_t begin,
                      std::uint32_t end, typename E::Raw* rows) {
  const std::uint16_t* used = scales + form.scale_index(begin, 0);
  if (!are_finite(form, scales, codes, begin, end)) return false;
  for (std::uint32_t token = begin; token < end; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; channel += form.group) {
      decode_row<E>(codes + std::size_t{token} * form.dim + channel, std::min(form.group, form.dim - channel),
                    Same{scale_value(*used++)}, rows + std::size_t{token - begin} * form.dim + channel);
    }
  }
  return true;
}

template <class E>
bool encode_as(const Form& form, const std::byte* plane, std::uint16_t* scales, std::int8_t* codes) {
  const auto* elements = reinterpret_cast<const typename E::Raw*>(plane);
  return form.per_channel ? encode_per_channel<E>(form, elements, scales, codes)
                          : encode_per_token<E>(form, elements, scales, codes);
}

template <class E>
bool decode_as(const Form& form, const std::uint16_t* scales, const std::int8_t* codes, std::uint32_t begin,
               std::uint32_t end, std::byte* rows) {
  auto* elements = reinterpret_cast<typename E::Raw*>(rows);
  return form.per_channel ? decode_per_channel<E>(form, scales, codes, begin, end, elements)
                          : decode_per_token<E>(form, scales, codes, begin, end, elements);
}

bool encode_any(const Form& form, const std::byte* plane, std::uint16_t* scales, std::int8_t* codes) {
  switch (form.dtype) {
    case DType::kFloat32:
      return encode_as<Float32>(form, plane, scales, codes);
    case DType::kFloat16:
      return encode_as<Float16>(form, plane, scales, codes);
    case DType::kBFloat16:
      return encode_as<BFloat16>(form, plane, scales, codes);
    case DType::kOpaqueBytes:
      return false;
  }
  return false;
}

bool decode_any(const Form& form, const std::uint16_t* scales, const std::int8_t* codes, std::uint32_t begin,
                std::uint32_t end, std::byte* rows) {
  switch (form.dtype) {
    case DType::kFloat32:
      return decode_as<Float32>(form, scales, codes, begin, end, rows);
    case DType::kFloat16:
      return decode_as<Float16>(form, scales, codes, begin, end, rows);
    case DType::kBFloat16:
      return decode_as<BFloat16>(form, scales, codes, begin, end, rows);
    case DType::kOpaqueBytes:
      return false;
  }
  return false;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::int8
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::int8 {

HWY_EXPORT(encode_any);
HWY_EXPORT(decode_any);

bool encode_plane(const Form& form, const std::byte* plane, std::uint16_t* scales, std::int8_t* codes) {
  return HWY_DYNAMIC_DISPATCH(encode_any)(form, plane, scales, codes);
}

bool decode_rows(const Form& form, const std::uint16_t* scales, const std::int8_t* codes, std::uint32_t begin,
                 std::uint32_t end, std::byte* rows) {
  return HWY_DYNAMIC_DISPATCH(decode_any)(form, scales, codes, begin, end, rows);
}

}  // namespace kvern::int8
#endif
