#include "store/remote_key.h"

#include <algorithm>
#include <charconv>
#include <cstring>

namespace kvern {
namespace {

constexpr std::size_t kMaxPrefix = 128;

bool plain(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
         c == '-' || c == '/';
}

}  // namespace

Status check_remote_prefix(std::string_view prefix) {
  if (prefix.empty() || prefix.size() > kMaxPrefix) {
    return {Code::kInvalid, "prefix must have 1 to " + std::to_string(kMaxPrefix) + " characters"};
  }
  if (!std::ranges::all_of(prefix, plain)) {
    return {Code::kInvalid, "prefix may hold letters, digits and the characters . _ - / only"};
  }
  if (prefix.front() == '/' || prefix.back() == '/') {
    return {Code::kInvalid, "prefix must not begin or end with /"};
  }
  return Status::ok();
}

std::string remote_names_of(std::string_view prefix, const NamespaceSet& namespaces) {
  std::string name(prefix);
  name += "/v" + std::to_string(kRemoteLayoutVersion) + "." + std::to_string(kRemoteContainerVersion) + "/";
  name += namespaces.hex_prefix();
  if (namespaces.one()) name += "/";
  return name;
}

std::optional<ChunkKey> parse_remote_object_name(std::string_view prefix, std::string_view name) {
  const std::string start = remote_names_of(prefix, NamespaceSet::all());
  if (!name.starts_with(start)) return std::nullopt;
  name.remove_prefix(start.size());
  const std::size_t first = name.find('/');
  const std::size_t second = name.rfind('/');
  if (first == std::string_view::npos || second == first) return std::nullopt;
  ChunkKey key;
  const auto id = from_hex(name.substr(0, first));
  const auto hash = from_hex(name.substr(second + 1));
  const std::string_view group = name.substr(first + 1, second - first - 1);
  const auto [end, error] = std::from_chars(group.data(), group.data() + group.size(), key.group);
  if (!id || id->size() != key.namespace_id.bytes.size() || !hash || error != std::errc() ||
      end != group.data() + group.size()) {
    return std::nullopt;
  }
  std::memcpy(key.namespace_id.bytes.data(), id->data(), id->size());
  const auto block = BlockHash::from_bytes({reinterpret_cast<const std::uint8_t*>(hash->data()), hash->size()});
  if (!block) return std::nullopt;
  key.last_block = *block;
  // One name for each key: digits in upper case or leading zeros are somebody else's.
  if (remote_object_name(prefix, key) != start + std::string(name)) return std::nullopt;
  return key;
}

std::string remote_object_name(std::string_view prefix, const ChunkKey& key) {
  return remote_names_of(prefix, key.namespace_id) + std::to_string(key.group) + "/" + key.last_block.to_hex();
}

}  // namespace kvern
