#include "kernels/cpu/observation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/observation.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/lane_sums-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvern::evict {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kvern::HWY_NAMESPACE;

constexpr std::uint32_t kGroupVectors = kGroupRows / kLanes;
// The register tile: columns times vectors of rows. AVX-512 has registers for 12 x 2, AVX2 for 6 x 2, SSE4 for 2 x 4.
constexpr std::uint32_t kTileColumns = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 2;
constexpr std::uint32_t kTileGroups = kLanes == 16 ? 2 : 1;
static_assert(kBlockColumns % kTileColumns == 0);

// 2^(y - M) is dropped below this: the result has to be a normal number, and 2^-125 of the largest is nothing.
constexpr float kLeastExponent = -125.5F;

// 2^f for f in [-0.5, 0.5]: within 8e-8 of it (least squares on the relative error, reweighted).
HWY_INLINE VF exp2_of_fraction(VF f) {
  const DF d;
  VF p = hn::Set(d, 0x1.41fbbcp-13F);
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.5f3e54p-10F));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.3b2d4cp-7F));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6aee8p-5F));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebfbdcp-3F));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.62e430p-1F));
  return hn::MulAdd(p, f, hn::Set(d, 1.0F));
}

// value * 2^exponent for whole exponents; 0 where the exponent is below kLeastExponent or NaN.
HWY_INLINE VF scale_by_power(VF value, VF exponent) {
  const DF d;
  // Adding 1.5 * 2^23 leaves the integer in the low bits.
  const auto whole = hn::BitCast(DU(), hn::Add(exponent, hn::Set(d, 0x1.8p23F)));
  const auto scaled = hn::Add(hn::BitCast(DU(), value), hn::ShiftLeft<23>(whole));
  return hn::IfThenElseZero(hn::Gt(exponent, hn::Set(d, kLeastExponent)), hn::BitCast(d, scaled));
}

// ---- Pass 1

template <class E>
void load_keys(const HeadRows& keys, std::uint32_t kv_head, ColumnRange columns, float* HWY_RESTRICT out) {
  const std::uint32_t whole = keys.dim / kLanes * kLanes;
  for (std::uint32_t column = columns.begin; column < columns.end; ++column) {
    const auto* row = reinterpret_cast<const typename E::Raw*>(keys.row(kv_head, column));
    for (std::uint32_t i = 0; i < whole; i += kLanes) hn::StoreU(E::load(row + i), DF(), out + i);
    for (std::uint32_t i = whole; i < keys.dim; ++i) out[i] = E::to_float(row[i]);
    out += keys.dim;
  }
}

// Logits of kGroups groups of rows with kTileColumns keys: out[group] receives [column][row].
template <std::uint32_t kGroups>
HWY_INLINE void multiply_tile(const float* HWY_RESTRICT queries, const float* HWY_RESTRICT keys, std::uint32_t dim,
                              float* HWY_RESTRICT* out, std::uint32_t column) {
  constexpr std::uint32_t kVectors = kGroups * kGroupVectors;
  const std::size_t group_floats = std::size_t{dim} * kGroupRows;
  VF sums[kTileColumns][kVectors];
  for (std::uint32_t c = 0; c < kTileColumns; ++c) {
    for (std::uint32_t v = 0; v < kVectors; ++v) sums[c][v] = hn::Zero(DF());
  }
  const float* HWY_RESTRICT first_key = keys + std::size_t{column} * dim;
  for (std::uint32_t i = 0; i < dim; ++i) {
    VF rows[kVectors];
    for (std::uint32_t v = 0; v < kVectors; ++v) {
      rows[v] = hn::Load(
          DF(), queries + v / kGroupVectors * group_floats + std::size_t{i} * kGroupRows + v % kGroupVectors * kLanes);
    }
    for (std::uint32_t c = 0; c < kTileColumns; ++c) {
      const VF key = hn::Set(DF(), first_key[std::size_t{c} * dim + i]);
      for (std::uint32_t v = 0; v < kVectors; ++v) sums[c][v] = hn::MulAdd(rows[v], key, sums[c][v]);
    }
  }
  for (std::uint32_t c = 0; c < kTileColumns; ++c) {
    for (std::uint32_t v = 0; v < kVectors; ++v) {
      hn::Store(sums[c][v], DF(),
                out[v / kGroupVectors] + std::size_t{column + c} * kGroupRows + v % kGroupVectors * kLanes);
    }
  }
}

// Products with vectors: a block of keys as floats, queries as floats that are scaled already.
template <class E>
class VectorProducts {
 public:
  VectorProducts(const ObservedRows& rows, const HeadRows& keys)
      // Keys of the last block that do not exist are zero or old, and what they give is not looked at.
      : rows_(rows), keys_(keys), block_(std::size_t{kBlockColumns} * keys.dim) {}

  void load(std::uint32_t kv_head, ColumnRange columns) { load_keys<E>(keys_, kv_head, columns, block_.data()); }

  // Logits of `groups` groups, kTileGroups at most, with the block's first `columns` keys.
  void multiply(std::uint32_t group, std::uint32_t groups, std::uint32_t columns, float** out) const {
    const float* queries = rows_.queries + group * group_floats(keys_.dim, false);
    for (std::uint32_t column = 0; column < columns; column += kTileColumns) {
      if (groups == kTileGroups) {
        multiply_tile<kTileGroups>(queries, block_.data(), keys_.dim, out, column);
      } else {
        multiply_tile<1>(queries, block_.data(), keys_.dim, out, column);
      }
    }
  }

 private:
  const ObservedRows& rows_;
  const HeadRows& keys_;
  std::vector<float> block_;
};

#if HWY_TARGET == HWY_AVX3
constexpr bool kHasTiles = true;

// Products with tile registers: bf16 keys as they are, bf16 queries as they are.
class TileProducts {
 public:
  TileProducts(const ObservedRows& rows, const HeadRows& keys)
      : rows_(rows), keys_(keys), dim_(tile_dim(keys.dim)), memory_(kBlockColumns * dim_ + kAlignment) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    block_ = memory_.data() + (kAlignment - address / sizeof(std::uint16_t) % kAlignment) % kAlignment;
  }

  void load(std::uint32_t kv_head, ColumnRange columns) {
    for (std::uint32_t i = 0; i < columns.end - columns.begin; ++i) {
      std::memcpy(block_ + std::size_t{i} * dim_, keys_.row(kv_head, columns.begin + i),
                  keys_.dim * sizeof(std::uint16_t));
    }
  }

  void multiply(std::uint32_t group, std::uint32_t groups, std::uint32_t columns, float** out) const {
    const auto* queries = reinterpret_cast<const std::uint16_t*>(rows_.queries + group * group_floats(keys_.dim, true));
    float* const of_group[2] = {out[0], groups == 2 ? out[1] : nullptr};
    amx::multiply(block_, queries, dim_, of_group);
    const VF scale = hn::Set(DF(), rows_.scale);
    for (std::uint32_t i = 0; i < groups; ++i) {
      for (std::uint32_t at = 0; at < columns * kGroupRows; at += kLanes) {
        hn::Store(hn::Mul(hn::Load(DF(), out[i] + at), scale), DF(), out[i] + at);
      }
    }
  }

 private:
  static constexpr std::size_t kAlignment = 64 / sizeof(std::uint16_t);
  static_assert(kBlockColumns == amx::kKeys && kGroupRows == amx::kTileRows && kTileGroups == 2);

  const ObservedRows& rows_;
  const HeadRows& keys_;
  const std::uint32_t dim_;
  std::vector<std::uint16_t> memory_;
  std::uint16_t* block_ = nullptr;
  const amx::Session session_;
};
#else
constexpr bool kHasTiles = false;
#endif

bool multiplies_in_tiles_any(DType queries, DType keys) {
  return kHasTiles && queries == DType::kBFloat16 && keys == DType::kBFloat16 && amx::available();
}

// Masks keys that come after the query: column c may be seen by rows from first_seen + c on.
void mask_future(float* HWY_RESTRICT logits, std::uint32_t columns, std::int64_t first_seen) {
  for (std::uint32_t c = 0; c < columns; ++c) {
    const std::int64_t masked = std::clamp<std::int64_t>(first_seen + c, 0, kGroupRows);
    std::fill_n(logits + std::size_t{c} * kGroupRows, masked, -std::numeric_limits<float>::infinity());
  }
}

// Logits that are not finite become masked ones. Returns how many of the first `rows` of each column were not; masked
// ones are none of them.
std::uint64_t mask_not_finite(float* HWY_RESTRICT logits, std::uint32_t columns, std::uint32_t rows) {
  std::uint64_t count = 0;
  for (std::uint32_t c = 0; c < columns; ++c) {
    for (std::uint32_t row = 0; row < kGroupRows; ++row) {
      float& logit = logits[std::size_t{c} * kGroupRows + row];
      if (std::isfinite(logit)) continue;
      logit = -std::numeric_limits<float>::infinity();
      if (row < rows) ++count;
    }
  }
  return count;
}

HWY_INLINE bool all_finite(const float* HWY_RESTRICT logits, std::uint32_t columns) {
  // 0 times what is not finite is NaN, and NaN stays.
  VF zero = hn::Zero(DF());
  for (std::uint32_t i = 0; i < columns * kGroupRows; i += kLanes) {
    zero = hn::MulAdd(hn::Load(DF(), logits + i), hn::Zero(DF()), zero);
  }
  return hn::AllFalse(DF(), hn::IsNaN(zero));
}

// Turns one vector of rows of a block's logits into 2^(y - M) and adds them to the totals.
HWY_INLINE void add_block(float* HWY_RESTRICT logits, std::uint32_t columns, float* HWY_RESTRICT reference_out,
                          float* HWY_RESTRICT totals) {
  const DF d;
  const VF old_reference = hn::Load(d, totals);
  VF largest = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (std::uint32_t c = 0; c < columns; ++c) {
    largest = hn::Max(largest, hn::Load(d, logits + std::size_t{c} * kGroupRows));
  }
  const VF reference = hn::Max(old_reference, hn::Round(largest));
  VF sum = hn::Zero(d);
  VF weighted = hn::Zero(d);
  for (std::uint32_t c = 0; c < columns; ++c) {
    float* HWY_RESTRICT at = logits + std::size_t{c} * kGroupRows;
    const VF logit = hn::Load(d, at);
    const VF whole = hn::Round(logit);
    const VF exponent = hn::Sub(whole, reference);
    const VF power = scale_by_power(exp2_of_fraction(hn::Sub(logit, whole)), exponent);
    hn::Store(power, d, at);
    sum = hn::Add(sum, power);
    const VF difference = hn::IfThenElseZero(hn::Gt(exponent, hn::Set(d, kLeastExponent)), hn::Sub(logit, reference));
    weighted = hn::MulAdd(difference, power, weighted);
  }
  const VF change = hn::Max(hn::Sub(old_reference, reference), hn::Set(d, 2 * kLeastExponent));
  const VF factor = scale_by_power(hn::Set(d, 1.0F), change);
  const VF old_sum = hn::Load(d, totals + kGroupRows);
  const VF old_weighted = hn::Load(d, totals + 2 * kGroupRows);
  hn::Store(reference, d, reference_out);
  hn::Store(reference, d, totals);
  hn::Store(hn::MulAdd(old_sum, factor, sum), d, totals + kGroupRows);
  hn::Store(hn::MulAdd(hn::MulAdd(change, old_sum, old_weighted), factor, weighted), d, totals + 2 * kGroupRows);
}

template <class Products>
std::uint64_t observe_columns_with(const ObservedRows& rows, const HeadRows& keys, std::uint32_t kv_head,
                                   ColumnRange columns, const KeptColumns& kept, float* totals) {
  Products products(rows, keys);
  HWY_ALIGN float scratch[kTileGroups][kBlockColumns * kGroupRows];
  HWY_ALIGN float scratch_reference[kGroupRows];
  for (std::uint32_t group = 0; group < rows.groups; ++group) {
    float* of_group = totals + std::size_t{group} * kTotals;
    std::fill_n(of_group, kGroupRows, std::numeric_limits<float>::lowest());
    std::fill_n(of_group + kGroupRows, 2 * kGroupRows, 0.0F);
  }
  std::uint64_t not_finite = 0;
  std::uint32_t block = 0;
  for (std::uint32_t begin = columns.begin; begin < columns.end; begin += kBlockColumns, ++block) {
    const std::uint32_t end = std::min(columns.end, begin + kBlockColumns);
    const std::uint32_t count = end - begin;
    products.load(kv_head, {begin, end});
    const std::uint32_t padded = (count + kTileColumns - 1) / kTileColumns * kTileColumns;
    for (std::uint32_t group = 0; group < rows.groups;) {
      const std::uint32_t groups = std::min(kTileGroups, rows.groups - group);
      float* logits[kTileGroups];
      for (std::uint32_t i = 0; i < groups; ++i) {
        logits[i] = kept.exponentials == nullptr ? scratch[i]
                                                 : kept.exponentials + (group + i) * kept.group_stride +
                                                       std::size_t{block} * kBlockColumns * kGroupRows;
      }
      products.multiply(group, groups, padded, logits);
      for (std::uint32_t i = 0; i < groups; ++i, ++group) {
        const std::uint32_t first_row = group % rows.groups_per_head * kGroupRows;
        const std::uint32_t used = std::min(kGroupRows, rows.rows_per_head - first_row);
        if (HWY_UNLIKELY(!all_finite(logits[i], count))) not_finite += mask_not_finite(logits[i], count, used);
        // Row r of this group stands at position keys.tokens - rows_per_head + first_row + r.
        const std::int64_t first_seen = std::int64_t{begin} + rows.rows_per_head - keys.tokens - first_row;
        if (first_seen + count > 1) mask_future(logits[i], count, first_seen);
        float* reference = kept.references == nullptr
                               ? scratch_reference
                               : kept.references + group * kept.reference_stride + std::size_t{block} * kGroupRows;
        for (std::uint32_t lane = 0; lane < kGroupRows; lane += kLanes) {
          add_block(logits[i] + lane, count, reference + lane, totals + std::size_t{group} * kTotals + lane);
        }
      }
    }
  }
  return not_finite;
}

std::uint64_t observe_columns_any(const ObservedRows& rows, const HeadRows& keys, std::uint32_t kv_head,
                                  ColumnRange columns, const KeptColumns& kept, float* totals) {
  const auto with = [&]<class Products>() {
    return observe_columns_with<Products>(rows, keys, kv_head, columns, kept, totals);
  };
#if HWY_TARGET == HWY_AVX3
  if (rows.tiles) return with.template operator()<TileProducts>();
#endif
  switch (keys.dtype) {
    case DType::kFloat32:
      return with.template operator()<VectorProducts<Float32>>();
    case DType::kFloat16:
      return with.template operator()<VectorProducts<Float16>>();
    case DType::kBFloat16:
      return with.template operator()<VectorProducts<BFloat16>>();
    case DType::kOpaqueBytes:
      break;
  }
  return 0;
}

// ---- Pass 2

// Means and variances of kLanes columns of one query head. factors: 2^(M of the block - M of the row) / sum of the row.
template <bool kVariance>
HWY_INLINE void statistics_of_columns(const ObservedRows& rows, const float* HWY_RESTRICT exponentials,
                                      std::size_t stride, std::uint32_t count, const float* HWY_RESTRICT factors,
                                      float* HWY_RESTRICT means, float* HWY_RESTRICT variances) {
  const DF d;
  const std::uint32_t vectors = rows.groups_per_head * kGroupVectors;
  VF sums[kLanes];
  for (std::uint32_t c = 0; c < kLanes; ++c) {
    sums[c] = hn::Zero(d);
    if (c >= count) continue;
    for (std::uint32_t v = 0; v < vectors; ++v) {
      const float* at =
          exponentials + v / kGroupVectors * stride + std::size_t{c} * kGroupRows + v % kGroupVectors * kLanes;
      sums[c] = hn::MulAdd(hn::Load(d, at), hn::LoadU(d, factors + v * kLanes), sums[c]);
    }
  }
  HWY_ALIGN float column_means[kLanes];
  hn::Store(hn::Div(sums_of_lanes(sums), hn::Set(d, static_cast<float>(rows.rows_per_head))), d, column_means);
  std::copy_n(column_means, count, means);
  if constexpr (kVariance) {
    const VF index = hn::Iota(d, 0.0F);
    for (std::uint32_t c = 0; c < kLanes; ++c) {
      sums[c] = hn::Zero(d);
      if (c >= count) continue;
      const VF mean = hn::Set(d, column_means[c]);
      for (std::uint32_t v = 0; v < vectors; ++v) {
        const float* at =
            exponentials + v / kGroupVectors * stride + std::size_t{c} * kGroupRows + v % kGroupVectors * kLanes;
        const VF attention = hn::Mul(hn::Load(d, at), hn::LoadU(d, factors + v * kLanes));
        const auto is_row =
            hn::Lt(index, hn::Set(d, static_cast<float>(rows.rows_per_head) - static_cast<float>(v * kLanes)));
        const VF deviation = hn::IfThenElseZero(is_row, hn::Sub(attention, mean));
        sums[c] = hn::MulAdd(deviation, deviation, sums[c]);
      }
    }
    HWY_ALIGN float column_variances[kLanes];
    const float divisor = rows.rows_per_head > 1 ? static_cast<float>(rows.rows_per_head - 1) : 1.0F;
    hn::Store(hn::Div(sums_of_lanes(sums), hn::Set(d, divisor)), d, column_variances);
    std::copy_n(column_variances, count, variances);
  }
}

void column_statistics_any(const ObservedRows& rows, ColumnRange columns, const KeptColumns& kept, const float* finals,
                           const ColumnStatistics& out) {
  const DF d;
  std::vector<float> factors(std::size_t{rows.groups_per_head} * kGroupRows);
  const std::uint32_t count = columns.end - columns.begin;
  for (std::uint32_t head = 0; head * rows.groups_per_head < rows.groups; ++head) {
    const std::size_t first_group = std::size_t{head} * rows.groups_per_head;
    float* means_of_head = out.means + head * out.stride;
    float* variances_of_head = out.variances == nullptr ? nullptr : out.variances + head * out.stride;
    double sum = 0;
    for (std::uint32_t column = 0; column < count; column += kLanes) {
      const std::uint32_t block = column / kBlockColumns;
      if (column % kBlockColumns == 0) {
        for (std::uint32_t i = 0; i < rows.groups_per_head * kGroupRows; i += kLanes) {
          const std::size_t group = first_group + i / kGroupRows;
          const float* of_row = finals + group * 2 * kGroupRows + i % kGroupRows;
          const VF reference = hn::Load(
              d, kept.references + group * kept.reference_stride + std::size_t{block} * kGroupRows + i % kGroupRows);
          const VF power = scale_by_power(hn::Set(d, 1.0F), hn::Sub(reference, hn::Load(d, of_row)));
          hn::StoreU(hn::Mul(power, hn::Load(d, of_row + kGroupRows)), d, factors.data() + i);
        }
      }
      const std::uint32_t used = std::min(kLanes, count - column);
      const float* of_columns = kept.exponentials + first_group * kept.group_stride + std::size_t{column} * kGroupRows;
      if (variances_of_head == nullptr) {
        statistics_of_columns<false>(rows, of_columns, kept.group_stride, used, factors.data(), means_of_head + column,
                                     nullptr);
      } else {
        statistics_of_columns<true>(rows, of_columns, kept.group_stride, used, factors.data(), means_of_head + column,
                                    variances_of_head + column);
        for (std::uint32_t i = 0; i < used; ++i) sum += static_cast<double>(variances_of_head[column + i]);
      }
    }
    out.shifts[head] = sum;
  }
}

// ---- Queries

template <class E>
void pack_queries_as(const HeadRows& queries, std::uint32_t head, float scale, float* HWY_RESTRICT packed) {
  const std::uint32_t groups = (queries.tokens + kGroupRows - 1) / kGroupRows;
  std::fill_n(packed, std::size_t{groups} * kGroupRows * queries.dim, 0.0F);
  for (std::uint32_t row = 0; row < queries.tokens; ++row) {
    const auto* elements = reinterpret_cast<const typename E::Raw*>(queries.row(head, row));
    float* out = packed + std::size_t{row / kGroupRows} * kGroupRows * queries.dim + row % kGroupRows;
    for (std::uint32_t i = 0; i < queries.dim; ++i) out[std::size_t{i} * kGroupRows] = E::to_float(elements[i]) * scale;
  }
}

// bf16 as it is, neighbours of a row side by side: [dim / 2][row][2].
void pack_tiles(const HeadRows& queries, std::uint32_t head, float* packed) {
  const std::size_t floats = group_floats(queries.dim, true);
  const std::uint32_t groups = (queries.tokens + kGroupRows - 1) / kGroupRows;
  std::fill_n(packed, groups * floats, 0.0F);
  for (std::uint32_t row = 0; row < queries.tokens; ++row) {
    const auto* elements = reinterpret_cast<const std::uint16_t*>(queries.row(head, row));
    auto* out = reinterpret_cast<std::uint16_t*>(packed + row / kGroupRows * floats) + row % kGroupRows * 2;
    for (std::uint32_t i = 0; i < queries.dim; ++i) out[std::size_t{i / 2} * 2 * kGroupRows + i % 2] = elements[i];
  }
}

void pack_queries_any(const HeadRows& queries, std::uint32_t head, float scale, bool tiles, float* packed) {
  if (tiles) return pack_tiles(queries, head, packed);
  switch (queries.dtype) {
    case DType::kFloat32:
      return pack_queries_as<Float32>(queries, head, scale, packed);
    case DType::kFloat16:
      return pack_queries_as<Float16>(queries, head, scale, packed);
    case DType::kBFloat16:
      return pack_queries_as<BFloat16>(queries, head, scale, packed);
    case DType::kOpaqueBytes:
      break;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern::evict
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern::evict {

HWY_EXPORT(multiplies_in_tiles_any);
HWY_EXPORT(pack_queries_any);
HWY_EXPORT(observe_columns_any);
HWY_EXPORT(column_statistics_any);

bool multiplies_in_tiles(DType queries, DType keys) {
  return HWY_DYNAMIC_DISPATCH(multiplies_in_tiles_any)(queries, keys);
}

void pack_queries(const HeadRows& queries, std::uint32_t head, float scale, bool tiles, float* packed) {
  HWY_DYNAMIC_DISPATCH(pack_queries_any)(queries, head, scale, tiles, packed);
}

std::uint64_t observe_columns(const ObservedRows& rows, const HeadRows& keys, std::uint32_t kv_head,
                              ColumnRange columns, const KeptColumns& kept, float* totals) {
  return HWY_DYNAMIC_DISPATCH(observe_columns_any)(rows, keys, kv_head, columns, kept, totals);
}

void column_statistics(const ObservedRows& rows, ColumnRange columns, const KeptColumns& kept, const float* finals,
                       const ColumnStatistics& out) {
  HWY_DYNAMIC_DISPATCH(column_statistics_any)
  (rows, columns, kept, finals, out);
}

}  // namespace kvern::evict
#endif
