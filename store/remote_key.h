#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/keys.h"
#include "base/status.h"

namespace kvern {

/// How an object is named in a remote tier: by its key alone, so that daemons that share the remote find what any of
/// them stored without talking to each other. The layout of objects and the version of their containers are part of the
/// name: a daemon never meets bytes there that only a newer one understands.

/// Changes with how a tier lays an object out under its name (redis_object.h).
inline constexpr int kRemoteLayoutVersion = 1;
/// Of ordinary chunks' containers. Those of version 2 lie under the same names: they belong to compact caches, which
/// older daemons do not look for.
inline constexpr int kRemoteContainerVersion = 1;

/// Letters, digits and "._-/", at most 128 of them, neither empty nor with a "/" at an end: safe in Redis patterns, S3
/// keys and URLs alike. kInvalid says what is wrong.
Status check_remote_prefix(std::string_view prefix);

/// "<prefix>/v1.1/<namespace>/<group>/<last block's hash>".
std::string remote_object_name(std::string_view prefix, const ChunkKey& key);

/// The key of an object of that name; nullopt when it is not one of the prefix's.
std::optional<ChunkKey> parse_remote_object_name(std::string_view prefix, std::string_view name);

/// What the names of all objects of these namespaces begin with.
std::string remote_names_of(std::string_view prefix, const NamespaceSet& namespaces);

}  // namespace kvern
