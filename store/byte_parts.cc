#include "store/byte_parts.h"

#include <xxhash.h>

#include <algorithm>
#include <memory>

#include "base/keys.h"

namespace kvern {

ByteParts slice(std::span<const std::span<const std::byte>> parts, std::uint64_t offset, std::uint64_t bytes) {
  ByteParts slices;
  for (auto part : parts) {
    if (offset >= part.size()) {
      offset -= part.size();
      continue;
    }
    part = part.subspan(offset, std::min<std::uint64_t>(bytes, part.size() - offset));
    offset = 0;
    if (part.empty()) break;
    slices.push_back(part);
    bytes -= part.size();
  }
  return slices;
}

std::uint64_t checksum_of(std::span<const std::span<const std::byte>> parts) {
  if (parts.size() == 1) return checksum64(parts.front().data(), parts.front().size());
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  XXH3_64bits_reset(state.get());
  for (const auto& part : parts) XXH3_64bits_update(state.get(), part.data(), part.size());
  return XXH3_64bits_digest(state.get());
}

std::size_t bytes_of(std::span<const std::span<const std::byte>> parts) {
  std::size_t bytes = 0;
  for (const auto& part : parts) bytes += part.size();
  return bytes;
}

}  // namespace kvern
