#include "store/redis_object.h"

#include <algorithm>
#include <cstring>

#include "base/keys.h"

namespace kvern {
namespace {

constexpr std::string_view kMagic = "kvernRM1";
constexpr std::size_t kMaxPieces = 1U << 16;  // 64 GiB

// The manifest's numbers are little-endian, as all that Kvern stores, and so is every machine that it runs on.
void append(std::string& text, std::uint64_t number) {
  char bytes[sizeof number];
  std::memcpy(bytes, &number, sizeof number);
  text.append(bytes, sizeof number);
}

std::uint64_t number_at(std::string_view text, std::size_t offset) {
  std::uint64_t number = 0;
  std::memcpy(&number, text.data() + offset, sizeof number);
  return number;
}

std::size_t pieces_of(std::uint64_t bytes) {
  return static_cast<std::size_t>((bytes + kRedisPieceBytes - 1) / kRedisPieceBytes);
}

constexpr std::size_t kChecksumsAt = kMagic.size() + sizeof(std::uint64_t);

}  // namespace

std::string redis_manifest_key(std::string_view object_name) { return "{" + std::string(object_name) + "}"; }

std::string redis_piece_key(std::string_view object_name, std::size_t piece) {
  return redis_manifest_key(object_name) + ":" + std::to_string(piece);
}

std::size_t RedisManifest::piece_bytes(std::size_t piece) const {
  return static_cast<std::size_t>(std::min<std::uint64_t>(kRedisPieceBytes, bytes - piece * kRedisPieceBytes));
}

std::string RedisManifest::encode() const {
  std::string text(kMagic);
  append(text, bytes);
  for (const auto checksum : checksums) append(text, checksum);
  append(text, checksum64(text.data(), text.size()));
  return text;
}

Result<RedisManifest> RedisManifest::decode(std::string_view text) {
  const auto corrupt = [] { return failure(Code::kCorrupt, "the object's manifest in Redis is damaged"); };
  constexpr std::size_t kNumber = sizeof(std::uint64_t);
  if (text.size() < kChecksumsAt + kNumber || text.size() % kNumber != 0 || !text.starts_with(kMagic)) return corrupt();
  const std::size_t end = text.size() - kNumber;
  if (number_at(text, end) != checksum64(text.data(), end)) return corrupt();
  RedisManifest manifest{.bytes = number_at(text, kMagic.size()), .checksums = {}};
  const std::size_t pieces = (end - kChecksumsAt) / kNumber;
  if (manifest.bytes == 0 || manifest.bytes > kMaxPieces * kRedisPieceBytes || pieces != pieces_of(manifest.bytes)) {
    return corrupt();
  }
  for (std::size_t i = 0; i < pieces; ++i) manifest.checksums.push_back(number_at(text, kChecksumsAt + i * kNumber));
  return manifest;
}

}  // namespace kvern
