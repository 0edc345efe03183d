#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvern {

/// How an object lies in Redis: pieces of 1 MiB (the last one may be shorter) under "{name}:0", "{name}:1", ..., and
/// under "{name}" a manifest that is written with them in one transaction. The braces put all of them into one slot.
/// Changes with kRemoteLayoutVersion.

/// Larger values stall a server, which copies them at a stretch, and pipelining several of 4 MiB was measured to be
/// three times slower than of 1 MiB.
inline constexpr std::size_t kRedisPieceBytes = std::size_t{1} << 20;

std::string redis_manifest_key(std::string_view object_name);
std::string redis_piece_key(std::string_view object_name, std::size_t piece);

struct RedisManifest {
  std::uint64_t bytes = 0;               ///< of the object
  std::vector<std::uint64_t> checksums;  ///< XXH3-64 of each piece
  bool operator==(const RedisManifest&) const = default;

  std::size_t pieces() const { return checksums.size(); }
  std::size_t piece_bytes(std::size_t piece) const;

  std::string encode() const;
  /// kCorrupt: this is no manifest of this layout. Safe on any input.
  static Result<RedisManifest> decode(std::string_view text);
};

/// The bytes from offset on of what the parts hold one behind the other, as parts.
std::vector<std::span<const std::byte>> slice(std::span<const std::span<const std::byte>> parts, std::uint64_t offset,
                                              std::uint64_t bytes);

/// XXH3-64 of what the parts hold one behind the other.
std::uint64_t checksum_of(std::span<const std::span<const std::byte>> parts);

}  // namespace kvern
