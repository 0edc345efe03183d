#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace kvern {

/// Digest of the canonical text of a namespace, which is all that decides what cached bytes mean. Its first
/// kTenantBytes are the same for all namespaces of one tenant, so that what a tenant has is found wherever ids are kept
/// (service/namespaces.h says how it is made).
struct NamespaceId {
  static constexpr std::size_t kTenantBytes = 4;
  std::array<std::uint8_t, 16> bytes{};
  auto operator<=>(const NamespaceId&) const = default;
  std::string to_hex() const;
};

/// All namespaces, those of one tenant, or one.
class NamespaceSet {
 public:
  static NamespaceSet all() { return {{}, 0}; }
  /// The tenant of this namespace.
  static NamespaceSet of_tenant(const NamespaceId& any) { return {any, NamespaceId::kTenantBytes}; }
  NamespaceSet(const NamespaceId& one) : NamespaceSet(one, one.bytes.size()) {}

  bool contains(const NamespaceId& id) const { return std::memcmp(id.bytes.data(), id_.bytes.data(), bytes_) == 0; }
  bool is_all() const { return bytes_ == 0; }
  /// The one namespace that it is.
  std::optional<NamespaceId> one() const { return bytes_ == id_.bytes.size() ? std::optional(id_) : std::nullopt; }
  /// What the ids of all of them begin with, in hexadecimal digits.
  std::string hex_prefix() const { return id_.to_hex().substr(0, 2 * bytes_); }

 private:
  NamespaceSet(const NamespaceId& id, std::size_t bytes) : id_(id), bytes_(bytes) {}
  NamespaceId id_;
  std::size_t bytes_ = 0;  // of the id that count
};

/// vLLM's block hash: opaque bytes, at most 64 of them. Never recomputed, never interpreted.
class BlockHash {
 public:
  static constexpr std::size_t kMaxBytes = 64;
  BlockHash() = default;
  /// Longer input is cut to kMaxBytes: check from_bytes() where the input is not trusted.
  explicit BlockHash(std::span<const std::uint8_t> bytes)
      : size_(static_cast<std::uint8_t>(std::min(bytes.size(), kMaxBytes))) {
    if (size_ > 0) std::memcpy(bytes_.data(), bytes.data(), size_);
  }
  /// nullopt when the input is empty or longer than kMaxBytes.
  static std::optional<BlockHash> from_bytes(std::span<const std::uint8_t> bytes) {
    if (bytes.empty() || bytes.size() > kMaxBytes) return std::nullopt;
    return BlockHash(bytes);
  }
  std::span<const std::uint8_t> bytes() const { return {bytes_.data(), size_}; }
  std::size_t size() const { return size_; }
  std::string to_hex() const;
  bool operator==(const BlockHash& other) const {
    return size_ == other.size_ && std::memcmp(bytes_.data(), other.bytes_.data(), size_) == 0;
  }

 private:
  std::array<std::uint8_t, kMaxBytes> bytes_{};
  std::uint8_t size_ = 0;
};

/// Names one chunk: a namespace, a KV-cache group in it, and the hash of the chunk's last block (which, as vLLM chains
/// its hashes, names the whole prefix up to there).
struct ChunkKey {
  NamespaceId namespace_id;
  std::uint16_t group = 0;
  BlockHash last_block;
  bool operator==(const ChunkKey&) const = default;
  std::string to_string() const;
};

/// 64-bit name of one block in the shared index: XXH3-64 over (namespace, group, hash). Never 0 or 1, which the index
/// uses for "empty" and "deleted". Equal fingerprints are a hint; full hashes are compared before bytes are used.
std::uint64_t block_fingerprint(const NamespaceId& namespace_id, std::uint16_t group,
                                std::span<const std::uint8_t> hash);

/// A hint of 32 bits at one block, never 0: containers name the block before them by it (ContainerInfo::previous_tag).
std::uint32_t block_tag(const NamespaceId& namespace_id, std::uint16_t group, std::span<const std::uint8_t> hash);

/// XXH3-64 of bytes, seed 0: the checksum of sections, headers and frames.
std::uint64_t checksum64(std::span<const std::uint8_t> bytes);
std::uint64_t checksum64(const void* data, std::size_t bytes);

std::string to_hex(std::span<const std::uint8_t> bytes);
/// nullopt when the text is not an even number of hexadecimal digits.
std::optional<std::string> from_hex(std::string_view text);

}  // namespace kvern

template <>
struct std::hash<kvern::NamespaceId> {
  std::size_t operator()(const kvern::NamespaceId& id) const noexcept {
    std::size_t value = 0;
    std::memcpy(&value, id.bytes.data(), sizeof value);
    return value;
  }
};
template <>
struct std::hash<kvern::ChunkKey> {
  std::size_t operator()(const kvern::ChunkKey& key) const noexcept {
    return kvern::block_fingerprint(key.namespace_id, key.group, key.last_block.bytes());
  }
};
