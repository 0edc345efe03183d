#include "transport/compact_handle.h"

#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <optional>

namespace kvern {
namespace {

/// By SlotLayout.
constexpr std::array<std::string_view, 3> kPrefixes = {"kvc1", "kvc2", "kvc3"};
constexpr std::size_t kDigits = 64;

/// Up to the next dot, which is taken away too.
std::string_view next_part(std::string_view& text) {
  const auto dot = std::min(text.find('.'), text.size());
  const auto part = text.substr(0, dot);
  text.remove_prefix(std::min(dot + 1, text.size()));
  return part;
}

/// A number above 0 without a sign or leading zeros.
template <typename Number>
std::optional<Number> number_of(std::string_view text) {
  Number value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value <= 0 || text.front() == '0')
    return std::nullopt;
  return value;
}

bool is_digit(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

std::vector<BlockHash> hashes_of(std::string_view purpose, std::string_view handle, std::uint32_t tokens,
                                 std::uint32_t block_tokens, std::uint32_t hash_bytes) {
  const std::uint32_t blocks = tokens / block_tokens + (tokens % block_tokens != 0 ? 1 : 0);
  std::string text = std::string(purpose) + std::string(handle);
  const std::size_t end = text.size();
  text.resize(end + 4);
  std::vector<BlockHash> hashes;
  hashes.reserve(blocks);
  for (std::uint32_t block = 0; block < blocks; ++block) {
    for (std::uint32_t i = 0; i < 4; ++i) text[end + i] = static_cast<char>(block >> (8 * i));
    std::array<std::uint8_t, SHA256_DIGEST_LENGTH> digest{};
    SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
    hashes.emplace_back(std::span(digest).first(hash_bytes));
  }
  return hashes;
}

}  // namespace

Result<CompactHandle> CompactHandle::parse(std::string_view text) {
  std::string_view rest = text;
  const auto prefix = std::ranges::find(kPrefixes, next_part(rest));
  const bool known = text.size() <= kMaxBytes && prefix != kPrefixes.end();
  const auto prompt_tokens = number_of<std::uint32_t>(next_part(rest));
  const auto slots = number_of<std::uint32_t>(next_part(rest));
  const auto expires_at = number_of<std::int64_t>(next_part(rest));
  if (!known || !prompt_tokens || !slots || !expires_at || *slots > *prompt_tokens || rest.size() != kDigits ||
      !std::ranges::all_of(rest, is_digit)) {
    return failure(
        Code::kInvalid,
        "this is no handle of a compact cache: kvc1, kvc2 or kvc3, and .<tokens>.<slots>.<expiry>.<64 digits>");
  }
  return CompactHandle{.text = std::string(text),
                       .digits = std::string(rest),
                       .prompt_tokens = *prompt_tokens,
                       .slots = *slots,
                       .expires_at = *expires_at,
                       .layout = static_cast<SlotLayout>(prefix - kPrefixes.begin())};
}

std::vector<BlockHash> CompactHandle::source_hashes(std::uint32_t block_tokens, std::uint32_t hash_bytes) const {
  return hashes_of("kvern compact source", text, prompt_tokens, block_tokens, hash_bytes);
}

std::vector<BlockHash> CompactHandle::slot_hashes(std::uint32_t block_tokens, std::uint32_t hash_bytes) const {
  return hashes_of("kvern compact slots", text, slots, block_tokens, hash_bytes);
}

}  // namespace kvern
