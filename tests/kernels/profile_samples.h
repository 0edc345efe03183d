#pragma once

#include <cstdint>
#include <random>
#include <string_view>
#include <vector>

#include "samples.h"

namespace kvern {

inline std::vector<float> random_rows(std::size_t count, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count);
  for (float& value : rows) value = normal(generator);
  return rows;
}

/// A product of reflections that leaves no axis near where it was.
inline std::vector<float> orthogonal(std::uint32_t n, std::uint32_t seed) {
  std::vector<float> matrix(std::size_t{n} * n);
  for (std::size_t i = 0; i < n; ++i) matrix[i * n + n - 1 - i] = 1;
  for (std::uint32_t reflection = 0; reflection < 4; ++reflection) {
    const auto axis = random_rows(n, seed * 16 + reflection);
    float square = 0;
    for (const float value : axis) square += value * value;
    for (std::size_t row = 0; row < n; ++row) {
      float product = 0;
      for (std::size_t i = 0; i < n; ++i) product += matrix[row * n + i] * axis[i];
      for (std::size_t i = 0; i < n; ++i) matrix[row * n + i] -= 2 * product / square * axis[i];
    }
  }
  return matrix;
}

template <typename T>
void put(Bytes& bytes, const T& value) {
  const auto* from = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), from, from + sizeof value);
}
inline void put_floats(Bytes& bytes, const std::vector<float>& values) {
  for (const float value : values) put(bytes, value);
}
inline void put_text(Bytes& bytes, std::string_view text) {
  for (const char letter : text) bytes.push_back(static_cast<std::byte>(letter));
}

inline std::uint32_t bitwise_crc(const Bytes& bytes) {
  std::uint32_t crc = 0xFFFFFFFFU;
  for (const std::byte byte : bytes) {
    crc ^= static_cast<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320U : 0U);
  }
  return ~crc;
}

/// A model profile of 12 layers, as kvern.calibrate writes it: orthogonal(heads * dim, layer) for a pair, and
/// orthogonal(dim, layer + head) for a head by itself.
inline Bytes profile_of(const std::vector<std::uint32_t>& layers, std::uint32_t heads = 2, std::uint32_t dim = 16,
                        float stretch = 1) {
  Bytes bytes;
  put_text(bytes, "KVERNPRF");
  for (const std::uint32_t field : {1U, 5U, 12U, heads, dim, static_cast<std::uint32_t>(layers.size())})
    put(bytes, field);
  put_text(bytes, "model");
  for (const std::uint32_t layer : layers) {
    put(bytes, layer);
    put(bytes, 20.5F);
    put(bytes, 25.5F);
    auto whole = orthogonal(heads * dim, layer);
    for (float& value : whole) value *= stretch;
    put_floats(bytes, whole);
    for (std::uint32_t head = 0; head < heads; ++head) put_floats(bytes, orthogonal(dim, layer + head));
  }
  put(bytes, bitwise_crc(bytes));
  return bytes;
}

}  // namespace kvern
