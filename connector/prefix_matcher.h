#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/keys.h"
#include "connector/client.h"

namespace kvern {

/// One KV-cache group of the model, as far as look-ups are concerned.
struct GroupWindow {
  std::uint16_t group = 0;
  std::uint32_t window_tokens = 0;  ///< 0: full attention; otherwise the sliding window
};

struct MatcherConfig {
  std::uint32_t block_tokens = 0;
  std::uint32_t chunk_blocks = 1;  ///< blocks per grid cell
  std::vector<GroupWindow> groups;
  std::uint32_t remote_deadline_ms = 50;  ///< a remote answer that is later than this counts as 0
  /// How long a look-up waits for what lower tiers bring up; what has come by then is used. 0: they are not asked.
  std::uint32_t prefetch_deadline_ms = 2000;
  Status validate() const;
};

/// Answers "how many leading tokens of this prompt are stored", and claims them. Local: in microseconds from shared
/// memory, every found chunk published in a hazard slot and re-checked before the answer. Remote, or where lower tiers
/// may have more than the index shows: starts a question and says "not known yet" until the answer or the deadline.
/// Never blocks. Thread-safe.
class PrefixMatcher {
 public:
  PrefixMatcher(std::shared_ptr<Client> client, MatcherConfig config);
  ~PrefixMatcher();

  struct Answer {
    bool known = true;  ///< false: ask again
    /// Leading tokens of the prompt that the engine would have (its own local_tokens and restored ones), a multiple of
    /// block_tokens; 0 when nothing beyond local_tokens can be restored.
    std::uint32_t tokens = 0;
    std::string reason;  ///< for a miss or a cut: "no daemon", "not stored", "window not stored", …
  };

  /// request: caller's id; the claim made under it stands until release(request) and is replaced by a further call.
  /// hashes: all block hashes of the prompt in order, hash_bytes each. local_tokens: the engine has them (no claim
  /// below). max_tokens: cut the answer there. Rule for several groups: T tokens hit when each full-attention group has
  /// all blocks up to T, and each sliding group those from floor(max(0, T - window + 1) / block) on. A prompt of
  /// exactly T tokens has its last one recomputed; where that token's window begins a block earlier (T - window + 1 is
  /// a multiple of the block), the engine holds no page for it and the answer is a smaller T. traceparent: see
  /// StoreJob; a question that the daemon has keeps that of its first call. patience: for who has nothing without what
  /// is stored, how long to wait at least where the daemon is slow, or lower tiers are; 0: as configured.
  Answer match(const std::string& request, int namespace_handle, std::string_view hashes, std::uint32_t hash_bytes,
               std::uint32_t local_tokens, std::uint32_t max_tokens, std::uint32_t prompt_tokens,
               const std::string& traceparent = {}, std::chrono::milliseconds patience = {});
  void release(const std::string& request);
  /// Asks the daemon to keep what it has of these blocks for so long (wire::Retain). A wish: it is lost where no daemon
  /// answers, and when too many wait to be sent.
  void retain(int namespace_handle, std::uint16_t group, std::string_view hashes, std::uint32_t hash_bytes,
              std::uint64_t seconds);
  /// Claims that stand now (for leak checks and metrics).
  std::size_t claims() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kvern
