#include "kernels/cpu/int8.h"

#include <algorithm>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/int8.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvern::int8 {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Sixteen floats at most, so that head dimensions, which are multiples of 16, need no remainder.
using DF = hn::CappedTag<float, 16>;
using DI = hn::Rebind<std::int32_t, DF>;
using DU = hn::Rebind<std::uint32_t, DF>;
using VF = hn::VFromD<DF>;
constexpr std::size_t kLanes = hn::MaxLanes(DF());
constexpr bool kVectors = HWY_TARGET != HWY_SCALAR;

// An element type: its bits, how they become floats and back.
struct Float32 {
  using Raw = std::uint32_t;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr Raw kMagnitude = 0x7FFFFFFFU;
  static constexpr Raw kInfinity = 0x7F800000U;
  static float to_float(Raw raw) { return std::bit_cast<float>(raw); }
  static Raw from_float(float value) { return std::bit_cast<Raw>(value); }
  static HWY_INLINE VF load(const Raw* raw) { return hn::BitCast(DF(), hn::LoadU(DU(), raw)); }
  static HWY_INLINE void store(VF value, Raw* raw) { hn::StoreU(hn::BitCast(DU(), value), DU(), raw); }
};

struct BFloat16 {
  using Raw = std::uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr Raw kMagnitude = 0x7FFFU;
  static constexpr Raw kInfinity = 0x7F80U;
  static float to_float(Raw raw) { return from_bfloat16(raw); }
  static Raw from_float(float value) { return to_bfloat16(value); }
  static HWY_INLINE VF load(const Raw* raw) {
    const hn::Rebind<Raw, DF> d16;
    return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), hn::LoadU(d16, raw))));
  }
  static HWY_INLINE void store(VF value, Raw* raw) {
    const hn::Rebind<Raw, DF> d16;
    const auto bits = hn::BitCast(DU(), value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(DU(), 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(DU(), 0x7FFF))));
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(DI(), rounded)), d16, raw);
  }
};

struct Float16 {
  using Raw = std::uint16_t;
  static constexpr DType kDType = DType::kFloat16;
  static constexpr Raw kMagnitude = 0x7FFFU;
  static constexpr Raw kInfinity = 0x7C00U;
  static float to_float(Raw raw) { return from_float16(raw); }
  static Raw from_float(float value) { return to_float16(value); }
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SCALAR
  // No F16C here, and Highway's replacement for it truncates.
  static HWY_INLINE VF load(const Raw* raw) {
    HWY_ALIGN float values[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) values[i] = to_float(raw[i]);
    return hn::Load(DF(), values);
  }
  static HWY_INLINE void store(VF value, Raw* raw) {
    HWY_ALIGN float values[kLanes];
    hn::Store(value, DF(), values);
    for (std::size_t i = 0; i < kLanes; ++i) raw[i] = from_float(values[i]);
  }
#else
  static HWY_INLINE VF load(const Raw* raw) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    return hn::PromoteTo(DF(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(raw)));
  }
  static HWY_INLINE void store(VF value, Raw* raw) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    hn::StoreU(hn::DemoteTo(d16, value), d16, reinterpret_cast<hwy::float16_t*>(raw));
  }
#endif
};

// Columns [0, whole) are worked on in vectors, the rest one by one.
constexpr std::uint32_t whole_columns(std::uint32_t columns) {
  return kVectors ? columns - columns % static_cast<std::uint32_t>(kLanes) : 0;
}

// Bits of the largest magnitude per column over the rows. Magnitudes are ordered like their bits.
template <class E>
void column_magnitudes(const typename E::Raw* rows, std::uint32_t count, std::uint32_t dim,
                       typename E::Raw* HWY_RESTRICT magnitudes) {
  using Raw = typename E::Raw;
  const hn::CappedTag<Raw, 64 / sizeof(Raw)> d;
  constexpr auto kWide = static_cast<std::uint32_t>(hn::MaxLanes(decltype(d)()));
  const auto mask = hn::Set(d, E::kMagnitude);
  std::uint32_t column = 0;
  for (; kVectors && column + kWide <= dim; column += kWide) {
    auto largest = hn::Zero(d);
    for (std::uint32_t row = 0; row < count; ++row) {
      largest = hn::Max(largest, hn::And(hn::LoadU(d, rows + std::size_t{row} * dim + column), mask));
    }
    hn::StoreU(largest, d, magnitudes + column);
  }
  for (; column < dim; ++column) {
    Raw largest = 0;
    for (std::uint32_t row = 0; row < count; ++row) {
      largest = std::max(largest, static_cast<Raw>(rows[std::size_t{row} * dim + column] & E::kMagnitude));
    }
    magnitudes[column] = largest;
  }
}

// The same over one row.
template <class E>
typename E::Raw row_magnitude(const typename E::Raw* row, std::uint32_t columns) {
  using Raw = typename E::Raw;
  const hn::Rebind<Raw, DF> d;
  auto largest_vector = hn::Zero(d);
  const std::uint32_t whole = whole_columns(columns);
  for (std::uint32_t column = 0; column < whole; column += static_cast<std::uint32_t>(kLanes)) {
    largest_vector = hn::Max(largest_vector, hn::And(hn::LoadU(d, row + column), hn::Set(d, E::kMagnitude)));
  }
  Raw largest = 0;
  if constexpr (sizeof(Raw) == 2) {
    largest = static_cast<Raw>(hn::GetLane(hn::MaxOfLanes(DU(), hn::PromoteTo(DU(), largest_vector))));
  } else {
    largest = hn::GetLane(hn::MaxOfLanes(DU(), largest_vector));
  }
  for (std::uint32_t column = whole; column < columns; ++column) {
    largest = std::max(largest, static_cast<Raw>(row[column] & E::kMagnitude));
  }
  return largest;
}

// Scales and their inverses of groups whose largest magnitudes are given. False when one is not finite.
template <class E>
bool make_scales(const typename E::Raw* HWY_RESTRICT magnitudes, std::uint32_t count,
                 std::uint16_t* HWY_RESTRICT scales, float* HWY_RESTRICT inverses) {
  const hn::Rebind<std::uint16_t, DF> d16;
  const std::uint32_t whole = whole_columns(count);
  bool finite = true;
  for (std::uint32_t i = 0; i < count; ++i) finite &= magnitudes[i] < E::kInfinity;
  if (!finite) return false;
  for (std::uint32_t i = 0; i < whole; i += static_cast<std::uint32_t>(kLanes)) {
    const VF scale = hn::Div(E::load(magnitudes + i), hn::Set(DF(), kMaxCode));
    const auto up = hn::ShiftRight<16>(hn::Add(hn::BitCast(DU(), scale), hn::Set(DU(), 0xFFFF)));
    const auto capped = hn::Min(up, hn::Set(DU(), max_scale_bits(E::kDType)));
    const auto used = hn::Ge(scale, hn::Set(DF(), kMinScale));
    const auto bits = hn::IfThenElseZero(hn::RebindMask(DU(), used), capped);
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(DI(), bits)), d16, scales + i);
    const VF value = hn::BitCast(DF(), hn::ShiftLeft<16>(capped));
    hn::StoreU(hn::IfThenElseZero(used, hn::Div(hn::Set(DF(), 1.0F), value)), DF(), inverses + i);
  }
  for (std::uint32_t i = whole; i < count; ++i) {
    scales[i] = scale_bits(E::to_float(magnitudes[i]), E::kDType);
    inverses[i] = inverse_scale(scales[i]);
  }
  return true;
}

template <class E, class Inverse>
HWY_INLINE void encode_row(const typename E::Raw* HWY_RESTRICT row, std::uint32_t columns, Inverse inverse,
                           std::int8_t* HWY_RESTRICT codes) {
  const hn::Rebind<std::int8_t, DF> d8;
  const std::uint32_t whole = whole_columns(columns);
  for (std::uint32_t column = 0; column < whole; column += static_cast<std::uint32_t>(kLanes)) {
    const auto nearest = hn::NearestInt(hn::Mul(E::load(row + column), inverse.vector(column)));
    hn::StoreU(hn::Max(hn::DemoteTo(d8, nearest), hn::Set(d8, -127)), d8, codes + column);
  }
  for (std::uint32_t column = whole; column < columns; ++column) {
    codes[column] = encode(E::to_float(row[column]), inverse.scalar(column));
  }
}

template <class E, class Scale>
HWY_INLINE void decode_row(const std::int8_t* HWY_RESTRICT codes, std::uint32_t columns, Scale scale,
                           typename E::Raw* HWY_RESTRICT row) {
  const hn::Rebind<std::int8_t, DF> d8;
  const std::uint32_t whole = whole_columns(columns);
  for (std::uint32_t column = 0; column < whole; column += static_cast<std::uint32_t>(kLanes)) {
    const VF code = hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(d8, codes + column)));
    E::store(hn::Mul(code, scale.vector(column)), row + column);
  }
  for (std::uint32_t column = whole; column < columns; ++column) {
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
  constexpr std::uint32_t kMaxGroups = kMaxDim / 16;
  HWY_ALIGN typename E::Raw magnitudes[kRows * kMaxGroups];
  HWY_ALIGN float inverses[kRows * kMaxGroups];
  const std::uint32_t groups = form.groups();
  for (std::uint32_t first = 0; first < form.tokens; first += kRows) {
    const std::uint32_t last = std::min(first + kRows, form.tokens);
    const auto for_each_group = [&](auto visit) HWY_ATTR {
      std::size_t index = 0;
      for (std::uint32_t token = first; token < last; ++token) {
        for (std::uint32_t channel = 0; channel < form.dim; channel += form.group) {
          visit(std::size_t{token} * form.dim + channel, std::min(form.group, form.dim - channel), index++);
        }
      }
    };
    for_each_group([&](std::size_t offset, std::uint32_t columns, std::size_t index)
                       HWY_ATTR { magnitudes[index] = row_magnitude<E>(plane + offset, columns); });
    if (!make_scales<E>(magnitudes, (last - first) * groups, scales + form.scale_index(first, 0), inverses)) {
      return false;
    }
    for_each_group([&](std::size_t offset, std::uint32_t columns, std::size_t index)
                       HWY_ATTR { encode_row<E>(plane + offset, columns, Same{inverses[index]}, codes + offset); });
  }
  return true;
}

bool scales_are_valid(const std::uint16_t* scales, std::size_t count, std::uint16_t largest) {
  std::uint16_t seen = 0;
  for (std::size_t i = 0; i < count; ++i) seen = std::max(seen, scales[i]);
  return seen <= largest;
}

template <class E>
bool decode_per_channel(const Form& form, const std::uint16_t* scales, const std::int8_t* codes, std::uint32_t begin,
                        std::uint32_t end, typename E::Raw* rows) {
  HWY_ALIGN float values[kMaxDim];
  for (std::uint32_t token = begin; token < end;) {
    const std::uint16_t* group = scales + form.scale_index(token, 0);
    if (!scales_are_valid(group, form.dim, max_scale_bits(E::kDType))) return false;
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) values[channel] = scale_value(group[channel]);
    const std::uint32_t last = std::min(end, (token / form.group + 1) * form.group);
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
  const std::uint32_t groups = form.groups();
  const std::uint16_t* used = scales + form.scale_index(begin, 0);
  if (!scales_are_valid(used, std::size_t{end - begin} * groups, max_scale_bits(E::kDType))) return false;
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
