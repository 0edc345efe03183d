#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "kernels/attend.h"
#include "tests/kernels/samples.h"

namespace kvern {

/// Rows of random elements, and their values.
struct Matrix {
  Matrix(DType type, std::uint32_t head_count, std::uint32_t token_count, std::uint32_t dims, std::uint32_t seed)
      : dtype(type), heads(head_count), tokens(token_count), dim(dims) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < std::size_t{heads} * tokens * dim; ++i) set(i, normal(generator));
  }
  void set(std::size_t i, float value) {
    const std::size_t element = dtype_bytes(dtype);
    if (bytes.size() < (i + 1) * element) bytes.resize((i + 1) * element);
    auto bits = std::bit_cast<std::uint32_t>(value);
    if (dtype == DType::kBFloat16) bits = std::isnan(value) ? 0x7FC0 : to_bfloat16(value);
    if (dtype == DType::kFloat16) bits = std::isnan(value) ? 0x7E00 : to_float16(value);
    std::memcpy(&bytes[i * element], &bits, element);
  }
  float at(std::size_t head, std::size_t token, std::size_t column) const {
    return element_at(dtype, bytes.data(), (head * tokens + token) * dim + column);
  }
  HeadRows rows() const { return HeadRows::contiguous(bytes.data(), dtype, heads, tokens, dim); }

  DType dtype;
  std::uint32_t heads, tokens, dim;
  Bytes bytes;
};

/// One entry as the definition has it.
struct Entry {
  std::vector<double> key, value;
  double bias = 0;
  std::int64_t position = std::numeric_limits<std::int64_t>::min();
};

inline Entry entry_of(const Matrix& keys, const Matrix& values, std::uint32_t head, std::uint32_t key_row,
                      std::uint32_t value_row) {
  Entry entry;
  for (std::uint32_t c = 0; c < keys.dim; ++c) entry.key.push_back(keys.at(head, key_row, c));
  for (std::uint32_t c = 0; c < values.dim; ++c) entry.value.push_back(values.at(head, value_row, c));
  return entry;
}

/// A cache with everything: several segments per head, of different lengths.
struct Cache {
  Cache(DType dtype, std::uint32_t kv_heads, std::uint32_t dim, std::uint32_t value_dim,
        const std::vector<std::uint32_t>& lengths, std::uint32_t seed) {
    const std::uint32_t longest = *std::ranges::max_element(lengths) + kv_heads;
    keys = std::make_unique<Matrix>(dtype, kv_heads, longest + 7, dim, seed);
    values = std::make_unique<Matrix>(dtype, kv_heads, longest + 7, value_dim, seed + 1);
    std::mt19937 generator(seed);
    entries.resize(kv_heads);
    segments.resize(kv_heads);
    for (std::uint32_t head = 0; head < kv_heads; ++head) {
      for (std::size_t i = 0; i < lengths.size(); ++i) {
        const std::uint32_t count = lengths[i] == 0 ? 0 : lengths[i] + head;
        AttendSegment segment{count, AttendRows::of(keys->rows(), head), AttendRows::of(values->rows(), head)};
        auto& data = details.emplace_back(std::make_unique<Detail>());
        for (std::uint32_t entry = 0; entry < count; ++entry) {
          data->bias.push_back(std::log(1.0F + static_cast<float>(generator() % 4)));
          data->positions.push_back(static_cast<std::int32_t>(generator() % 64));
          data->index.push_back(entry + (entry > count / 3 ? 5U : 0U) + (entry > count / 2 ? 2U : 0U));
          data->key_lengths.push_back(0.5F + static_cast<float>(generator() % 100) / 100);
          data->value_lengths.push_back(0.5F + static_cast<float>(generator() % 100) / 100);
        }
        if (i % 2 == 1) segment.bias = data->bias.data();
        if (i % 3 == 1) segment.keys.index = data->index.data();
        if (i % 3 == 2) segment.values.index = data->index.data();
        if (i % 4 == 2) segment.keys.lengths = data->key_lengths.data();
        if (i % 4 >= 2) segment.values.lengths = data->value_lengths.data();
        if (i % 2 == 0) segment.positions = data->positions.data();
        segments[head].push_back(segment);
        for (std::uint32_t e = 0; e < count; ++e) {
          Entry entry = entry_of(*keys, *values, head, segment.keys.index != nullptr ? data->index[e] : e,
                                 segment.values.index != nullptr ? data->index[e] : e);
          if (segment.bias != nullptr) entry.bias = double{data->bias[e]};
          if (segment.positions != nullptr) entry.position = data->positions[e];
          for (double& x : entry.key) x *= segment.keys.lengths != nullptr ? double{data->key_lengths[e]} : 1.0;
          for (double& x : entry.value) x *= segment.values.lengths != nullptr ? double{data->value_lengths[e]} : 1.0;
          entries[head].push_back(std::move(entry));
        }
      }
      heads.emplace_back(segments[head]);
    }
  }

  struct Detail {
    std::vector<float> bias, key_lengths, value_lengths;
    std::vector<std::int32_t> positions;
    std::vector<std::uint32_t> index;
  };
  std::unique_ptr<Matrix> keys, values;
  std::vector<std::unique_ptr<Detail>> details;
  std::vector<std::vector<AttendSegment>> segments;
  std::vector<std::span<const AttendSegment>> heads;
  std::vector<std::vector<Entry>> entries;
};

}  // namespace kvern
