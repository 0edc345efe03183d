#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/element.h"
#include "kernels/head_rows.h"

namespace kvern::golden {

enum class ElementType : std::uint8_t { kF32, kF64, kI32, kU8, kBF16 };

/// Bytes of one element.
constexpr std::size_t element_bytes(ElementType type) {
  switch (type) {
    case ElementType::kF64:
      return 8;
    case ElementType::kF32:
    case ElementType::kI32:
      return 4;
    case ElementType::kBF16:
      return 2;
    case ElementType::kU8:
      return 1;
  }
  return 0;
}

/// A tensor in memory, C order.
struct Tensor {
  ElementType type = ElementType::kF32;
  std::vector<std::size_t> shape;
  std::vector<std::byte> bytes;

  template <typename T>
  static Tensor of(std::span<const T> values, std::vector<std::size_t> shape) {
    Tensor tensor;
    if constexpr (std::is_same_v<T, float>) tensor.type = ElementType::kF32;
    if constexpr (std::is_same_v<T, double>) tensor.type = ElementType::kF64;
    if constexpr (std::is_same_v<T, std::uint8_t>) tensor.type = ElementType::kU8;
    if constexpr (std::is_integral_v<T> && sizeof(T) == 4) tensor.type = ElementType::kI32;
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) != 2));
    tensor.shape = std::move(shape);
    const auto raw = std::as_bytes(values);
    tensor.bytes.assign(raw.begin(), raw.end());
    return tensor;
  }

  std::size_t size() const { return bytes.size() / element_bytes(type); }
  std::size_t columns() const { return shape.empty() ? 1 : shape.back(); }

  double value(std::size_t i) const {
    switch (type) {
      case ElementType::kF32:
        return double{read<float>(i)};
      case ElementType::kF64:
        return read<double>(i);
      case ElementType::kI32:
        return read<std::int32_t>(i);
      case ElementType::kU8:
        return read<std::uint8_t>(i);
      case ElementType::kBF16:
        return double{from_bfloat16(read<std::uint16_t>(i))};
    }
    return 0;
  }
  float number(std::size_t i) const { return static_cast<float>(value(i)); }
  std::int64_t integer(std::size_t i) const { return static_cast<std::int64_t>(value(i)); }

  std::vector<float> floats() const {
    std::vector<float> all(size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = number(i);
    return all;
  }

  /// A tensor [heads][tokens][dim] as the kernels take it; the first `tokens` of it when that is given.
  HeadRows head_rows(std::size_t tokens = 0) const {
    const auto at = [&](std::size_t i) { return static_cast<std::uint32_t>(shape.at(i)); };
    HeadRows rows = HeadRows::contiguous(bytes.data(), type == ElementType::kBF16 ? DType::kBFloat16 : DType::kFloat32,
                                         at(0), at(1), at(2));
    if (tokens != 0) rows.tokens = static_cast<std::uint32_t>(tokens);
    return rows;
  }

 private:
  template <typename T>
  T read(std::size_t i) const {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    return value;
  }
};

using Tensors = std::map<std::string, Tensor>;

}  // namespace kvern::golden
