#include "base/keys.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace kvern {

std::string to_hex(std::span<const std::uint8_t> bytes) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  text.reserve(bytes.size() * 2);
  for (auto byte : bytes) {
    text.push_back(kDigits[byte >> 4]);
    text.push_back(kDigits[byte & 15]);
  }
  return text;
}

std::optional<std::string> from_hex(std::string_view text) {
  if (text.size() % 2 != 0) return std::nullopt;
  const auto digit = [](char c) -> int {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
  };
  std::string bytes;
  bytes.reserve(text.size() / 2);
  for (std::size_t i = 0; i < text.size(); i += 2) {
    const int high = digit(text[i]);
    const int low = digit(text[i + 1]);
    if (high < 0 || low < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(high * 16 + low));
  }
  return bytes;
}

std::string NamespaceId::to_hex() const { return kvern::to_hex(bytes); }
std::string BlockHash::to_hex() const { return kvern::to_hex(bytes()); }

std::string ChunkKey::to_string() const {
  return namespace_id.to_hex() + "/" + std::to_string(group) + "/" + last_block.to_hex();
}

std::uint64_t checksum64(const void* data, std::size_t bytes) { return XXH3_64bits(data, bytes); }
std::uint64_t checksum64(std::span<const std::uint8_t> bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::uint64_t block_fingerprint(const NamespaceId& namespace_id, std::uint16_t group,
                                std::span<const std::uint8_t> hash) {
  std::array<std::uint8_t, 16 + 2 + BlockHash::kMaxBytes> input;
  const std::size_t hash_bytes = std::min(hash.size(), BlockHash::kMaxBytes);
  std::memcpy(input.data(), namespace_id.bytes.data(), 16);
  input[16] = static_cast<std::uint8_t>(group & 0xff);
  input[17] = static_cast<std::uint8_t>(group >> 8);
  if (hash_bytes > 0) std::memcpy(input.data() + 18, hash.data(), hash_bytes);
  const std::uint64_t value = XXH3_64bits(input.data(), 18 + hash_bytes);
  return value < 2 ? value + 2 : value;
}

std::uint32_t block_tag(const NamespaceId& namespace_id, std::uint16_t group, std::span<const std::uint8_t> hash) {
  const auto tag = static_cast<std::uint32_t>(block_fingerprint(namespace_id, group, hash));
  return tag == 0 ? 1 : tag;
}

}  // namespace kvern
