#include "kernels/cpu/cluster.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/cpu/targets.h"
#include "kernels/merge_arithmetic.h"
#include "kernels/transpose.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/cluster.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include "kernels/cpu/elements-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::cluster {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

constexpr std::uint32_t kLanes = hn::MaxLanes(DF());
constexpr std::uint32_t kColumns = 16;
constexpr std::uint32_t kParts = kColumns / kLanes;
// Targets that 16 sources are compared with at a time: their sums fill half of the registers at least.
constexpr std::uint32_t kTargets = kLanes == 16 ? 16 : kLanes == 8 ? 4 : 2;

constexpr std::uint32_t padded(std::uint32_t count) { return (count + kColumns - 1) / kColumns * kColumns; }

// Every second row from the first one on, as columns of floats.
template <class E>
void load_columns(const Rows& rows, std::uint32_t count, std::byte* elements, float* HWY_RESTRICT out) {
  using Raw = typename E::Raw;
  const std::uint32_t width = padded(count);
  void* to = sizeof(Raw) == sizeof(float) ? static_cast<void*>(out) : static_cast<void*>(elements);
  if (width != count) std::memset(to, 0, std::size_t{width} * rows.dim * sizeof(Raw));
  transpose(to, width * sizeof(Raw), rows.data, 2 * rows.stride_bytes, count, rows.dim, sizeof(Raw));
  if constexpr (sizeof(Raw) == sizeof(float)) return;
  const auto* raw = reinterpret_cast<const Raw*>(elements);
  for (std::size_t i = 0; i < std::size_t{width} * rows.dim; i += kLanes) hn::Store(E::load(raw + i), DF(), out + i);
}

// 1 / |column| of kCount vectors of columns, or NaN for what must not be merged: a similarity that is NaN is never the
// largest.
template <std::uint32_t kCount>
HWY_INLINE void inverse_lengths_of(const float* HWY_RESTRICT columns, std::uint32_t width, std::uint32_t dim,
                                   float* HWY_RESTRICT inverses) {
  VF squares[kCount];
  for (auto& square : squares) square = hn::Zero(DF());
  for (std::uint32_t row = 0; row < dim; ++row) {
    for (std::uint32_t i = 0; i < kCount; ++i) {
      const VF value = hn::Load(DF(), columns + std::size_t{row} * width + i * kLanes);
      squares[i] = hn::Add(squares[i], hn::Mul(value, value));
    }
  }
  for (std::uint32_t i = 0; i < kCount; ++i) {
    const auto usable = hn::And(hn::Ge(squares[i], hn::Set(DF(), merge::kMinSquaredLength)),
                                hn::Le(squares[i], hn::Set(DF(), merge::kMaxSquaredLength)));
    const VF inverse = hn::Div(hn::Set(DF(), 1.0F), hn::Sqrt(squares[i]));
    const VF none = hn::Set(DF(), std::numeric_limits<float>::quiet_NaN());
    hn::Store(hn::IfThenElse(usable, inverse, none), DF(), inverses + i * kLanes);
  }
}

// Of 32 columns at a time, since a sum waits for the one before it.
void inverse_lengths(const float* HWY_RESTRICT columns, std::uint32_t width, std::uint32_t dim,
                     float* HWY_RESTRICT inverses) {
  constexpr std::uint32_t kTwo = 2 * kColumns;
  std::uint32_t column = 0;
  for (; column + kTwo <= width; column += kTwo) {
    inverse_lengths_of<2 * kParts>(columns + column, width, dim, inverses + column);
  }
  if (column < width) inverse_lengths_of<kParts>(columns + column, width, dim, inverses + column);
}

// The best target of 16 sources: similarity * |source| and its number.
struct Best {
  VF similarity[kParts];
  hn::VFromD<DI> target[kParts];
};

template <bool kFused>
void match_targets(const float* HWY_RESTRICT sources, std::uint32_t source_width, const float* HWY_RESTRICT targets,
                   std::uint32_t target_width, const float* HWY_RESTRICT inverses, std::uint32_t first,
                   std::uint32_t dim, Best& best) {
  VF sums[kTargets][kParts];
  for (auto& row : sums) {
    for (auto& sum : row) sum = hn::Zero(DF());
  }
  for (std::uint32_t i = 0; i < dim; ++i) {
    VF source[kParts];
    for (std::uint32_t part = 0; part < kParts; ++part) {
      source[part] = hn::Load(DF(), sources + std::size_t{i} * source_width + part * kLanes);
    }
    for (std::uint32_t target = 0; target < kTargets; ++target) {
      const VF other = hn::Set(DF(), targets[std::size_t{i} * target_width + first + target]);
      for (std::uint32_t part = 0; part < kParts; ++part) {
        sums[target][part] = kFused ? hn::MulAdd(source[part], other, sums[target][part])
                                    : hn::Add(sums[target][part], hn::Mul(source[part], other));
      }
    }
  }
  for (std::uint32_t target = 0; target < kTargets; ++target) {
    const VF inverse = hn::Set(DF(), inverses[first + target]);
    const auto number = hn::Set(DI(), static_cast<std::int32_t>(first + target));
    for (std::uint32_t part = 0; part < kParts; ++part) {
      const VF similarity = hn::Mul(sums[target][part], inverse);
      const auto better = hn::Gt(similarity, best.similarity[part]);
      best.similarity[part] = hn::IfThenElse(better, similarity, best.similarity[part]);
      best.target[part] = hn::IfThenElse(hn::RebindMask(DI(), better), number, best.target[part]);
    }
  }
}

template <class E>
void match_as(const Rows& keys, std::uint32_t entries, MatchScratch& scratch) {
  constexpr bool kFused = sizeof(typename E::Raw) == 2;
  const std::uint32_t sources = (entries + 1) / 2;
  const std::uint32_t targets = entries / 2;
  const std::uint32_t source_width = padded(sources);
  const std::uint32_t target_width = padded(targets);
  HWY_ALIGN float source_inverses[kMaxSources];
  HWY_ALIGN float target_inverses[kMaxSources];
  load_columns<E>(keys, sources, scratch.elements, scratch.sources);
  load_columns<E>(keys.from(1), targets, scratch.elements, scratch.targets);
  inverse_lengths(scratch.sources, source_width, keys.dim, source_inverses);
  // Columns of padding are zeros: never a partner.
  inverse_lengths(scratch.targets, target_width, keys.dim, target_inverses);
  for (std::uint32_t first = 0; first < sources; first += kColumns) {
    Best best;
    for (std::uint32_t part = 0; part < kParts; ++part) {
      best.similarity[part] = hn::Set(DF(), -std::numeric_limits<float>::infinity());
      best.target[part] = hn::Zero(DI());
    }
    for (std::uint32_t target = 0; target < target_width; target += kTargets) {
      match_targets<kFused>(scratch.sources + first, source_width, scratch.targets, target_width, target_inverses,
                            target, keys.dim, best);
    }
    HWY_ALIGN float similarities[kColumns];
    HWY_ALIGN std::int32_t numbers[kColumns];
    for (std::uint32_t part = 0; part < kParts; ++part) {
      const VF inverse = hn::Load(DF(), source_inverses + first + part * kLanes);
      hn::Store(hn::Mul(best.similarity[part], inverse), DF(), similarities + part * kLanes);
      hn::Store(best.target[part], DI(), numbers + part * kLanes);
    }
    for (std::uint32_t i = 0; i < std::min(kColumns, sources - first); ++i) {
      const bool none = !(similarities[i] > -std::numeric_limits<float>::infinity());
      scratch.partners[first + i] = {none ? -std::numeric_limits<float>::infinity() : similarities[i],
                                     static_cast<std::uint32_t>(numbers[i])};
    }
  }
}

void match_impl(const Rows& keys, std::uint32_t entries, MatchScratch& scratch) {
  if (keys.dtype == DType::kFloat32) match_as<Float32>(keys, entries, scratch);
  if (keys.dtype == DType::kBFloat16) match_as<BFloat16>(keys, entries, scratch);
  if (keys.dtype == DType::kFloat16) match_as<Float16>(keys, entries, scratch);
}

// out = weight * row, or out += weight * row.
template <class E, bool kAdd>
HWY_INLINE void weigh(const Rows& rows, std::size_t index, float weight, float* HWY_RESTRICT out) {
  const auto* row = reinterpret_cast<const typename E::Raw*>(rows.data + index * rows.stride_bytes);
  const std::uint32_t whole = rows.dim / kColumns * kColumns;
  const VF factor = hn::Set(DF(), weight);
  for (std::uint32_t column = 0; column < whole; column += kLanes) {
    const VF value = hn::Mul(E::load(row + column), factor);
    hn::StoreU(kAdd ? hn::Add(hn::LoadU(DF(), out + column), value) : value, DF(), out + column);
  }
  for (std::uint32_t column = whole; column < rows.dim; ++column) {
    const float value = E::to_float(row[column]) * weight;
    out[column] = kAdd ? out[column] + value : value;
  }
}

template <class E>
void average_as(const Rows& rows, std::uint32_t entries, const std::uint32_t* into, const float* weights,
                const float* inverses, float* out) {
  float* place[kMaxChunk];
  float* next = out;
  for (std::uint32_t i = 0; i < entries; ++i) {
    if (into[i] != i) continue;
    place[i] = next;
    weigh<E, false>(rows, i, weights[i], next);
    next += rows.dim;
  }
  for (std::uint32_t i = 0; i < entries; ++i) {
    if (into[i] != i) weigh<E, true>(rows, i, weights[i], place[into[i]]);
  }
  for (std::uint32_t i = 0; i < entries; ++i) {
    if (into[i] != i || inverses[i] == 1.0F) continue;
    const VF inverse = hn::Set(DF(), inverses[i]);
    const std::uint32_t whole = rows.dim / kColumns * kColumns;
    for (std::uint32_t column = 0; column < whole; column += kLanes) {
      hn::StoreU(hn::Mul(hn::LoadU(DF(), place[i] + column), inverse), DF(), place[i] + column);
    }
    for (std::uint32_t column = whole; column < rows.dim; ++column) place[i][column] *= inverses[i];
  }
}

void average_impl(const Rows& rows, std::uint32_t entries, const std::uint32_t* into, const float* weights,
                  const float* inverses, float* out) {
  if (rows.dtype == DType::kFloat32) average_as<Float32>(rows, entries, into, weights, inverses, out);
  if (rows.dtype == DType::kBFloat16) average_as<BFloat16>(rows, entries, into, weights, inverses, out);
  if (rows.dtype == DType::kFloat16) average_as<Float16>(rows, entries, into, weights, inverses, out);
}

template <class E>
void gather_as(const float* rows, std::uint32_t dim, const std::uint32_t* index, std::size_t count, std::byte* out) {
  auto* to = reinterpret_cast<typename E::Raw*>(out);
  const float most = largest_finite(E::kDType);
  const std::uint32_t whole = dim / kColumns * kColumns;
  for (std::size_t i = 0; i < count; ++i, to += dim) {
    const float* from = rows + std::size_t{index[i]} * dim;
    for (std::uint32_t column = 0; column < whole; column += kLanes) {
      const VF value = hn::LoadU(DF(), from + column);
      E::store(hn::Max(hn::Min(value, hn::Set(DF(), most)), hn::Set(DF(), -most)), to + column);
    }
    for (std::uint32_t column = whole; column < dim; ++column) {
      to[column] = E::from_float(std::clamp(from[column], -most, most));
    }
  }
}

void gather_impl(const float* rows, std::uint32_t dim, const std::uint32_t* index, std::size_t count, DType dtype,
                 std::byte* out) {
  if (dtype == DType::kFloat32) gather_as<Float32>(rows, dim, index, count, out);
  if (dtype == DType::kBFloat16) gather_as<BFloat16>(rows, dim, index, count, out);
  if (dtype == DType::kFloat16) gather_as<Float16>(rows, dim, index, count, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::cluster
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::cluster {

HWY_EXPORT(match_impl);
HWY_EXPORT(average_impl);
HWY_EXPORT(gather_impl);

void match_chunk(const Rows& keys, std::uint32_t entries, MatchScratch& scratch) {
  HWY_DYNAMIC_DISPATCH(match_impl)(keys, entries, scratch);
}
void average_chunk(const Rows& rows, std::uint32_t entries, const std::uint32_t* into, const float* weights,
                   const float* inverses, float* out) {
  HWY_DYNAMIC_DISPATCH(average_impl)(rows, entries, into, weights, inverses, out);
}
void gather_rows(const float* rows, std::uint32_t dim, const std::uint32_t* index, std::size_t count, DType dtype,
                 std::byte* out) {
  HWY_DYNAMIC_DISPATCH(gather_impl)(rows, dim, index, count, dtype, out);
}

}  // namespace kvern::cluster
#endif
