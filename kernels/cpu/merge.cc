#include "kernels/cpu/merge.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/targets.h"
#include "kernels/merge_arithmetic.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/merge.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include "kernels/cpu/elements-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::merge {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

constexpr std::uint32_t kLanes = hn::MaxLanes(DF());
// Rows are added up in 16 columns, whatever a vector holds, and the columns in one fixed tree.
constexpr std::uint32_t kColumns = 16;
constexpr std::uint32_t kParts = kColumns / kLanes;
// Rows that are worked on together: their angles fill whole vectors, and two layers of them stay in the L1 cache.
constexpr std::uint32_t kRows = 16;

constexpr std::uint32_t padded(std::uint32_t dim) { return (dim + kColumns - 1) / kColumns * kColumns; }

struct VectorOps {
  using Value = VF;
  static HWY_INLINE VF set(float value) { return hn::Set(DF(), value); }
  static HWY_INLINE VF add(VF a, VF b) { return hn::Add(a, b); }
  static HWY_INLINE VF sub(VF a, VF b) { return hn::Sub(a, b); }
  static HWY_INLINE VF mul(VF a, VF b) { return hn::Mul(a, b); }
  static HWY_INLINE VF div(VF a, VF b) { return hn::Div(a, b); }
  static HWY_INLINE VF sqrt(VF a) { return hn::Sqrt(a); }
  static HWY_INLINE VF select_le(VF a, VF b, VF yes, VF no) { return hn::IfThenElse(hn::Le(a, b), yes, no); }
};

#include "kernels/merge_arithmetic-inl.h"

// Sixteen columns of sums.
struct Sums {
  VF parts[kParts];

  HWY_INLINE Sums() {
    for (auto& part : parts) part = hn::Zero(DF());
  }
  HWY_INLINE void add_square(std::uint32_t part, VF value) {
    parts[part] = hn::Add(parts[part], hn::Mul(value, value));
  }
  // Column i and i + 8, then i + 4, 2, 1.
  HWY_INLINE float total() const {
    HWY_ALIGN float columns[kColumns];
    for (std::uint32_t part = 0; part < kParts; ++part) hn::Store(parts[part], DF(), columns + part * kLanes);
#if HWY_TARGET == HWY_SCALAR
    for (std::uint32_t half = kColumns / 2; half > 0; half /= 2) {
      for (std::uint32_t i = 0; i < half; ++i) columns[i] += columns[i + half];
    }
    return columns[0];
#else
    const hn::CappedTag<float, 4> d4;
    const auto low = hn::Add(hn::Load(d4, columns), hn::Load(d4, columns + 8));
    const auto high = hn::Add(hn::Load(d4, columns + 4), hn::Load(d4, columns + 12));
    const auto four = hn::Add(low, high);
    const auto two = hn::Add(four, hn::Shuffle1032(four));
    return hn::GetLane(hn::Add(two, hn::Shuffle2301(two)));
#endif
  }
};

// Rows as floats, padded with zeros to whole columns.
template <class E>
void load_as(const Rows& rows, float* HWY_RESTRICT out) {
  const std::uint32_t width = padded(rows.dim);
  const std::uint32_t whole = rows.dim / kColumns * kColumns;
  for (std::uint32_t row = 0; row < rows.count; ++row) {
    const auto* from = reinterpret_cast<const typename E::Raw*>(rows.data + row * rows.stride_bytes);
    float* to = out + row * width;
    for (std::uint32_t column = 0; column < whole; column += kLanes)
      hn::Store(E::load(from + column), DF(), to + column);
    for (std::uint32_t column = whole; column < rows.dim; ++column) to[column] = E::to_float(from[column]);
    for (std::uint32_t column = rows.dim; column < width; ++column) to[column] = 0;
  }
}

void load(const Rows& rows, float* HWY_RESTRICT out) {
  if (rows.dtype == DType::kFloat32) load_as<Float32>(rows, out);
  if (rows.dtype == DType::kBFloat16) load_as<BFloat16>(rows, out);
  if (rows.dtype == DType::kFloat16) load_as<Float16>(rows, out);
}

// Rows without gaps from padded floats, saturating.
template <class E>
void store_as(const float* HWY_RESTRICT rows, std::uint32_t count, std::uint32_t dim, std::byte* out) {
  const std::uint32_t width = padded(dim);
  const std::uint32_t whole = dim / kColumns * kColumns;
  const float most = largest_finite(E::kDType);
  for (std::uint32_t row = 0; row < count; ++row) {
    const float* from = rows + row * width;
    auto* to = reinterpret_cast<typename E::Raw*>(out) + std::size_t{row} * dim;
    for (std::uint32_t column = 0; column < whole; column += kLanes) {
      const VF value = hn::Load(DF(), from + column);
      E::store(hn::Max(hn::Min(value, hn::Set(DF(), most)), hn::Set(DF(), -most)), to + column);
    }
    for (std::uint32_t column = whole; column < dim; ++column) {
      to[column] = E::from_float(std::clamp(from[column], -most, most));
    }
  }
}

void store(DType dtype, const float* HWY_RESTRICT rows, std::uint32_t count, std::uint32_t dim, std::byte* out) {
  if (dtype == DType::kFloat32) store_as<Float32>(rows, count, dim, out);
  if (dtype == DType::kBFloat16) store_as<BFloat16>(rows, count, dim, out);
  if (dtype == DType::kFloat16) store_as<Float16>(rows, count, dim, out);
}

void square(const float* HWY_RESTRICT rows, std::uint32_t count, std::uint32_t width, float* HWY_RESTRICT squares) {
  for (std::uint32_t row = 0; row < count; ++row) {
    Sums sums;
    for (std::uint32_t column = 0; column < width; column += kColumns) {
      for (std::uint32_t part = 0; part < kParts; ++part) {
        sums.add_square(part, hn::Load(DF(), rows + row * width + column + part * kLanes));
      }
    }
    squares[row] = sums.total();
  }
}

// Sixteen pairs of rows and what is known of them.
struct Pairs {
  HWY_ALIGN float x[kRows * kMaxDim];
  HWY_ALIGN float y[kRows * kMaxDim];
  HWY_ALIGN float x_squared[kRows];
  HWY_ALIGN float y_squared[kRows];
  HWY_ALIGN float x_inverse[kRows];
  HWY_ALIGN float y_inverse[kRows];
  HWY_ALIGN float difference[kRows];  // |ux - uy| squared
  HWY_ALIGN float sum[kRows];
  HWY_ALIGN float angle[kRows];
};

// Everything but the directions. Lanes past the rows hold numbers that nobody reads.
void measure(const Rows& x, const Rows& y, Pairs& pairs) {
  const std::uint32_t width = padded(x.dim);
  load(x, pairs.x);
  load(y, pairs.y);
  std::fill(pairs.x_squared + x.count, pairs.x_squared + kRows, 1.0F);
  std::fill(pairs.y_squared + x.count, pairs.y_squared + kRows, 1.0F);
  square(pairs.x, x.count, width, pairs.x_squared);
  square(pairs.y, x.count, width, pairs.y_squared);
  const VF one = hn::Set(DF(), 1.0F);
  for (std::uint32_t row = 0; row < kRows; row += kLanes) {
    hn::Store(hn::Div(one, hn::Sqrt(hn::Load(DF(), pairs.x_squared + row))), DF(), pairs.x_inverse + row);
    hn::Store(hn::Div(one, hn::Sqrt(hn::Load(DF(), pairs.y_squared + row))), DF(), pairs.y_inverse + row);
  }
  std::fill(pairs.difference + x.count, pairs.difference + kRows, 1.0F);
  std::fill(pairs.sum + x.count, pairs.sum + kRows, 1.0F);
  for (std::uint32_t row = 0; row < x.count; ++row) {
    Sums difference;
    Sums sum;
    const VF x_inverse = hn::Set(DF(), pairs.x_inverse[row]);
    const VF y_inverse = hn::Set(DF(), pairs.y_inverse[row]);
    for (std::uint32_t column = 0; column < width; column += kColumns) {
      for (std::uint32_t part = 0; part < kParts; ++part) {
        const std::uint32_t at = row * width + column + part * kLanes;
        const VF ux = hn::Mul(hn::Load(DF(), pairs.x + at), x_inverse);
        const VF uy = hn::Mul(hn::Load(DF(), pairs.y + at), y_inverse);
        difference.add_square(part, hn::Sub(ux, uy));
        sum.add_square(part, hn::Add(ux, uy));
      }
    }
    pairs.difference[row] = difference.total();
    pairs.sum[row] = sum.total();
  }
  for (std::uint32_t row = 0; row < kRows; row += kLanes) {
    const VF angle = angle_between<VectorOps>(hn::Load(DF(), pairs.difference + row), hn::Load(DF(), pairs.sum + row));
    hn::Store(angle, DF(), pairs.angle + row);
  }
  for (std::uint32_t row = 0; row < x.count; ++row) {
    if (!usable(pairs.x_squared[row]) || !usable(pairs.y_squared[row])) pairs.angle[row] = kPi;
  }
}

Rows part_of(const Rows& rows, std::uint32_t begin) {
  return {rows.dtype, rows.data + begin * rows.stride_bytes, rows.stride_bytes, std::min(kRows, rows.count - begin),
          rows.dim};
}

float finite_length(float squared) { return squared <= kMaxSquaredLength ? std::sqrt(squared) : 0.0F; }

void measure_impl(const Rows& x, const Rows& y, float* angles) {
  Pairs pairs;
  for (std::uint32_t row = 0; row < x.count; row += kRows) {
    const Rows some = part_of(x, row);
    measure(some, part_of(y, row), pairs);
    std::copy(pairs.angle, pairs.angle + some.count, angles + row);
  }
}

void merge_impl(const Rows& x, const Rows& y, float weight, const MergedRows& out) {
  Pairs pairs;
  const std::uint32_t width = padded(x.dim);
  const std::size_t row_bytes = x.dim * dtype_bytes(out.direction_dtype);
  HWY_ALIGN float x_weights[kRows];
  HWY_ALIGN float y_weights[kRows];
  for (std::uint32_t first = 0; first < x.count; first += kRows) {
    const Rows some = part_of(x, first);
    measure(some, part_of(y, first), pairs);
    for (std::uint32_t row = 0; row < kRows; row += kLanes) {
      const auto weights =
          slerp_weights<VectorOps>(hn::Load(DF(), pairs.difference + row), hn::Load(DF(), pairs.sum + row),
                                   hn::Load(DF(), pairs.angle + row), weight);
      hn::Store(hn::Mul(weights.x, hn::Load(DF(), pairs.x_inverse + row)), DF(), x_weights + row);
      hn::Store(hn::Mul(weights.y, hn::Load(DF(), pairs.y_inverse + row)), DF(), y_weights + row);
    }
    for (std::uint32_t row = 0; row < some.count; ++row) {
      float* direction = pairs.x + row * width;
      out.angles[first + row] = pairs.angle[row];
      out.x_lengths[first + row] = finite_length(pairs.x_squared[row]);
      out.y_lengths[first + row] = finite_length(pairs.y_squared[row]);
      if (is_forced(pairs.angle[row])) {
        std::fill(direction, direction + width, 0.0F);
        continue;
      }
      const VF x_weight = hn::Set(DF(), x_weights[row]);
      const VF y_weight = hn::Set(DF(), y_weights[row]);
      for (std::uint32_t column = 0; column < width; column += kLanes) {
        const VF from_x = hn::Mul(hn::Load(DF(), direction + column), x_weight);
        const VF from_y = hn::Mul(hn::Load(DF(), pairs.y + row * width + column), y_weight);
        hn::Store(hn::Add(from_x, from_y), DF(), direction + column);
      }
    }
    store(out.direction_dtype, pairs.x, some.count, x.dim, out.directions + first * row_bytes);
  }
}

template <class E>
void scale_as(const Rows& directions, const float* lengths, std::byte* out) {
  const std::uint32_t whole = directions.dim / kColumns * kColumns;
  const float most = largest_finite(E::kDType);
  for (std::uint32_t row = 0; row < directions.count; ++row) {
    const auto* from = reinterpret_cast<const typename E::Raw*>(directions.data + row * directions.stride_bytes);
    auto* to = reinterpret_cast<typename E::Raw*>(out) + std::size_t{row} * directions.dim;
    const VF length = hn::Set(DF(), lengths[row]);
    for (std::uint32_t column = 0; column < whole; column += kLanes) {
      const VF value = hn::Mul(E::load(from + column), length);
      E::store(hn::Max(hn::Min(value, hn::Set(DF(), most)), hn::Set(DF(), -most)), to + column);
    }
    for (std::uint32_t column = whole; column < directions.dim; ++column) {
      to[column] = E::from_float(std::clamp(E::to_float(from[column]) * lengths[row], -most, most));
    }
  }
}

void scale_impl(const Rows& directions, const float* lengths, std::byte* out) {
  if (directions.dtype == DType::kFloat32) scale_as<Float32>(directions, lengths, out);
  if (directions.dtype == DType::kBFloat16) scale_as<BFloat16>(directions, lengths, out);
  if (directions.dtype == DType::kFloat16) scale_as<Float16>(directions, lengths, out);
}

void lengths_impl(const Rows& rows, float* lengths) {
  HWY_ALIGN float values[kRows * kMaxDim];
  for (std::uint32_t first = 0; first < rows.count; first += kRows) {
    const Rows some = part_of(rows, first);
    load(some, values);
    square(values, some.count, padded(rows.dim), lengths + first);
    for (std::uint32_t row = 0; row < some.count; ++row) lengths[first + row] = finite_length(lengths[first + row]);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::merge
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::merge {

HWY_EXPORT(measure_impl);
HWY_EXPORT(merge_impl);
HWY_EXPORT(scale_impl);
HWY_EXPORT(lengths_impl);

void measure_rows(const Rows& x, const Rows& y, float* angles) { HWY_DYNAMIC_DISPATCH(measure_impl)(x, y, angles); }
void merge_rows(const Rows& x, const Rows& y, float weight, const MergedRows& out) {
  HWY_DYNAMIC_DISPATCH(merge_impl)(x, y, weight, out);
}
void scale_rows(const Rows& directions, const float* lengths, std::byte* out) {
  HWY_DYNAMIC_DISPATCH(scale_impl)(directions, lengths, out);
}
void row_lengths(const Rows& rows, float* lengths) { HWY_DYNAMIC_DISPATCH(lengths_impl)(rows, lengths); }

}  // namespace kvern::merge
#endif
