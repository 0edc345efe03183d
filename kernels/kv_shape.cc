#include "kernels/kv_shape.h"

#include <string>

namespace kvern {
namespace {

// Far beyond any model, and small enough that the bytes of a shard stay below 2^57.
constexpr std::uint32_t kMaxTokens = 1U << 20;
constexpr std::uint32_t kMaxDim = 1U << 16;
constexpr std::uint64_t kMaxPlanes = 1U << 18;

Status refuse(const char* what, std::uint64_t value, std::uint64_t least, std::uint64_t most) {
  return {Code::kInvalid, "shard shape: " + std::string(what) + " must be " + std::to_string(least) + " to " +
                              std::to_string(most) + ", not " + std::to_string(value)};
}

}  // namespace

Status ShardShape::validate() const {
  if (dtype_bytes(dtype) == 0) return {Code::kInvalid, "shard shape: unknown dtype"};
  if (tokens == 0 || tokens > kMaxTokens) return refuse("tokens", tokens, 1, kMaxTokens);
  if (key_dim == 0 || key_dim > kMaxDim) return refuse("key_dim", key_dim, 1, kMaxDim);
  if (value_dim > kMaxDim) return refuse("value_dim", value_dim, 0, kMaxDim);
  // Each alone first: their product could wrap.
  if (layers > kMaxPlanes) return refuse("layers", layers, 1, kMaxPlanes);
  if (heads > kMaxPlanes) return refuse("heads", heads, 1, kMaxPlanes);
  const std::uint64_t planes = 2 * static_cast<std::uint64_t>(layers) * heads;
  if (planes == 0 || planes > kMaxPlanes) return refuse("2 * layers * heads", planes, 2, kMaxPlanes);
  return Status::ok();
}

}  // namespace kvern
