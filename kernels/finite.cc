#include "kernels/finite.h"

#include <cstdint>

namespace kvern {
namespace {

/// The exponent of NaN and infinity is all ones.
template <typename Raw>
bool none_has(Raw exponent, std::span<const std::byte> elements) {
  const auto* raw = reinterpret_cast<const Raw*>(elements.data());
  Raw found = 0;
  for (std::size_t i = 0; i < elements.size() / sizeof(Raw); ++i) {
    found = static_cast<Raw>(found | ((raw[i] & exponent) == exponent));
  }
  return found == 0;
}

}  // namespace

bool all_finite(DType dtype, std::span<const std::byte> elements) {
  switch (dtype) {
    case DType::kFloat32:
      return none_has<std::uint32_t>(0x7F800000U, elements);
    case DType::kFloat16:
      return none_has<std::uint16_t>(0x7C00U, elements);
    case DType::kBFloat16:
      return none_has<std::uint16_t>(0x7F80U, elements);
    case DType::kOpaqueBytes:
      return true;
  }
  return true;
}

}  // namespace kvern
