#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/keys.h"

namespace kvern {

/// The last chunks that left the store, numbered. Clients follow it with a cursor; who falls behind is told so and
/// takes a snapshot. Bounded; thread-safe.
class EventLog {
 public:
  struct Removal {
    ChunkKey key;
    std::vector<BlockHash> blocks;
    std::string reason;
    std::int64_t time_ns = 0;
  };
  /// Numbers of removals that are kept: some hundred bytes each, and more than what leaves between two polls.
  static constexpr std::size_t kDefaultCapacity = 1U << 14;

  explicit EventLog(std::size_t capacity = kDefaultCapacity) : capacity_(capacity) {}

  void add(Removal removal);
  /// Something left of which nobody knows what it was: whoever reads on is told that removals were lost.
  void forget();
  /// The cursor that the next removal will have.
  std::uint64_t next_cursor() const;

  struct Page {
    std::uint64_t next_cursor = 0;
    bool lost = false;  ///< removals between the cursor and this page were forgotten
  };
  /// Calls take for each removal from the cursor on, until it returns false: that one is not consumed. Cursor 0 means
  /// now.
  Page read(std::uint64_t cursor, const std::function<bool(const Removal&)>& take) const;
  /// The last removal of a chunk with this block, for explanations.
  std::optional<Removal> last_removal_of(const BlockHash& block) const;

 private:
  const std::size_t capacity_;
  mutable std::mutex mutex_;
  std::uint64_t first_ = 1;  ///< number of removals_.front()
  std::deque<Removal> removals_;
};

}  // namespace kvern
