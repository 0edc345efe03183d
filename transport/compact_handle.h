#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/keys.h"
#include "base/slot_layout.h"
#include "base/status.h"

namespace kvern {

/// Names a compact cache and says what it is: "kvc1.<N>.<M>.<expiry>.<64 hexadecimal digits>", N the tokens of the
/// prompt, M <= N the slots that a request claims, expiry in unix seconds. "kvc2" (pool) or "kvc3" (shift) in front:
/// the layers keep different numbers of slots (base/slot_layout.h), so that blocks are not what their numbers say, and
/// who does not know that must not take it. The digits cannot be guessed, so that whoever has the text may use the
/// cache. The blocks of the prompt and of the cache are stored as ordinary chunks under hashes that follow from the
/// whole text: another N, M or expiry is another handle, and misses.
struct CompactHandle {
  static constexpr std::size_t kMaxBytes = 128;       ///< of the text; it also serves as a cache salt
  static constexpr std::uint32_t kMaxHashBytes = 32;  ///< of a SHA-256
  static constexpr std::uint32_t kMinHashBytes = 16;  ///< fewer could meet the hashes of others

  std::string text;
  std::string digits;  ///< the last part of the text
  std::uint32_t prompt_tokens = 0;
  std::uint32_t slots = 0;
  std::int64_t expires_at = 0;
  SlotLayout layout = SlotLayout::kRectangular;

  /// kInvalid unless the text is one that is written like this: no leading zeros, small letters.
  static Result<CompactHandle> parse(std::string_view text);

  /// First hash_bytes (kMinHashBytes to kMaxHashBytes) of SHA-256("kvern compact source" + text + block number as
  /// 32 bits, little-endian), for each block of the prompt; the last may be part of one.
  std::vector<BlockHash> source_hashes(std::uint32_t block_tokens, std::uint32_t hash_bytes) const;
  /// The same of "kvern compact slots", for each block of the slots.
  std::vector<BlockHash> slot_hashes(std::uint32_t block_tokens, std::uint32_t hash_bytes) const;
};

}  // namespace kvern
