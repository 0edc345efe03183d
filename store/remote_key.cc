#include "store/remote_key.h"

#include <algorithm>

#include "kernels/container.h"

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

std::string remote_names_of(std::string_view prefix, const std::optional<NamespaceId>& namespace_id) {
  std::string name(prefix);
  name += "/v" + std::to_string(kRemoteLayoutVersion) + "." + std::to_string(kContainerVersion) + "/";
  if (namespace_id) name += namespace_id->to_hex() + "/";
  return name;
}

std::string remote_object_name(std::string_view prefix, const ChunkKey& key) {
  return remote_names_of(prefix, key.namespace_id) + std::to_string(key.group) + "/" + key.last_block.to_hex();
}

}  // namespace kvern
