#pragma once

#include <cstdint>
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

}  // namespace kvern
