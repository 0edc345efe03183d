#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace kvern {

/// Element type of cached keys and values. The numbers are part of the container format.
enum class DType : std::uint8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kOpaqueBytes = 3 };

constexpr std::size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kOpaqueBytes:
      return 1;
  }
  return 0;
}

constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kOpaqueBytes:
      return "opaque";
  }
  return "unknown";
}

/// nullopt for a name that is not one of dtype_name()'s.
constexpr std::optional<DType> dtype_from_name(std::string_view name) {
  for (auto dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kOpaqueBytes}) {
    if (dtype_name(dtype) == name) return dtype;
  }
  return std::nullopt;
}

}  // namespace kvern
