#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/element.h"
#include "kernels/head_rows.h"
#include "kernels/observation.h"

namespace kvern::evict {

/// Rows [head][token][dim] of any dtype, with gaps between tokens and heads where asked for.
class SampleRows {
 public:
  SampleRows(DType dtype, std::uint32_t heads, std::uint32_t tokens, std::uint32_t dim, std::uint32_t seed = 1,
             std::size_t gap_elements = 0) {
    view_ = HeadRows::contiguous(nullptr, dtype, heads, tokens, dim);
    const std::size_t element = dtype_bytes(dtype);
    view_.token_stride_bytes += gap_elements * element;
    view_.head_stride_bytes = view_.token_stride_bytes * tokens + 3 * gap_elements * element;
    // One element before the first row, so that nothing is aligned beyond its own size where there are gaps.
    offset_ = gap_elements > 0 ? element : 0;
    bytes_.resize(offset_ + view_.head_stride_bytes * heads);
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (std::uint32_t head = 0; head < heads; ++head) {
      for (std::uint32_t token = 0; token < tokens; ++token) {
        for (std::uint32_t i = 0; i < dim; ++i) set(head, token, i, normal(generator));
      }
    }
  }

  HeadRows view() const {
    HeadRows view = view_;
    view.data = bytes_.data() + offset_;
    return view;
  }
  float at(std::size_t head, std::size_t token, std::size_t i) const {
    const std::byte* from = view().row(head, token) + i * dtype_bytes(view_.dtype);
    std::uint32_t bits = 0;
    std::memcpy(&bits, from, dtype_bytes(view_.dtype));
    if (view_.dtype == DType::kBFloat16) return from_bfloat16(static_cast<std::uint16_t>(bits));
    if (view_.dtype == DType::kFloat16) return from_float16(static_cast<std::uint16_t>(bits));
    return std::bit_cast<float>(bits);
  }
  void set(std::size_t head, std::size_t token, std::size_t i, float value) {
    auto bits = std::bit_cast<std::uint32_t>(value);
    const bool finite = std::isfinite(value);
    if (view_.dtype == DType::kBFloat16) bits = finite ? to_bfloat16(value) : bits >> 16;
    if (view_.dtype == DType::kFloat16) bits = finite ? to_float16(value) : std::isnan(value) ? 0x7E00 : 0x7C00;
    const std::size_t offset = static_cast<std::size_t>(view().row(head, token) - bytes_.data());
    std::memcpy(bytes_.data() + offset + i * dtype_bytes(view_.dtype), &bits, dtype_bytes(view_.dtype));
  }
  void set_row(std::size_t head, std::size_t token, float value) {
    for (std::uint32_t i = 0; i < view_.dim; ++i) set(head, token, i, value);
  }

 private:
  HeadRows view_;
  std::size_t offset_ = 0;
  std::vector<std::byte> bytes_;
};

/// The definition of an Observation, in double precision, element by element.
struct ExpectedObservation {
  ExpectedObservation(const SampleRows& queries, const SampleRows& keys, std::uint32_t columns, double scale = 0) {
    const HeadRows q = queries.view();
    const HeadRows k = keys.view();
    const std::size_t w = q.tokens;
    if (scale == 0) scale = 1 / std::sqrt(static_cast<double>(k.dim));
    for (std::size_t head = 0; head < q.heads; ++head) {
      const std::size_t kv_head = head / (q.heads / k.heads);
      std::vector<std::vector<double>> attention;
      for (std::size_t row = 0; row < w; ++row) {
        std::vector<double> of_row(k.tokens);
        double sum = 0;
        for (std::size_t j = 0; j < k.tokens; ++j) {
          if (j > k.tokens - w + row) continue;
          double logit = 0;
          for (std::size_t i = 0; i < k.dim; ++i) {
            logit += static_cast<double>(queries.at(head, row, i)) * static_cast<double>(keys.at(kv_head, j, i));
          }
          of_row[j] = std::exp(logit * scale);
          sum += of_row[j];
        }
        for (double& a : of_row) a /= sum;
        lse.push_back(std::log(sum));
        attention.push_back(std::move(of_row));
      }
      for (std::size_t j = 0; j < columns; ++j) {
        double total = 0;
        double squares = 0;
        for (const auto& of_row : attention) total += of_row[j];
        for (const auto& of_row : attention) {
          squares += std::pow(of_row[j] - total / static_cast<double>(w), 2);
          dispersion -= of_row[j] * std::log(of_row[j] + 1e-10);
        }
        mean.push_back(total / static_cast<double>(w));
        variance.push_back(w > 1 ? squares / static_cast<double>(w - 1) : 0);
        shift += variance.back();
      }
    }
  }

  std::vector<double> lse;
  std::vector<double> mean;
  std::vector<double> variance;
  double dispersion = 0;
  double shift = 0;
};

/// observe() of arguments that fit.
inline Observation observed(const HeadRows& queries, const HeadRows& keys, const ObservationOptions& options = {},
                            Executor* executor = nullptr) {
  ObservationWorkspace workspace;
  Observation observation;
  const Status status = observe(queries, keys, options, workspace, executor, observation);
  if (!status) throw std::runtime_error(status.to_string());
  return observation;
}

}  // namespace kvern::evict
