#pragma once

#include <cstdint>

#include "kernels/cpu/observation.h"
#include "kernels/head_rows.h"

namespace kvern::evict {

/// out[i] = |k|^2 of token tokens.begin + i of one head; not finite where the key is not.
void squared_norms(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, float* out);

/// out[i] = <k, anchor>, likewise.
void dot_products(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, const float* anchor, float* out);

/// sum[dim] += factors[i] * k over the tokens, in their order; keys of factor 0 are left out, whatever they hold.
void add_scaled_rows(const HeadRows& keys, std::uint32_t head, ColumnRange tokens, const float* factors, float* sum);

}  // namespace kvern::evict
