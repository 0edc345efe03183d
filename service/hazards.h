#pragma once

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "transport/session_segment.h"

namespace kvern {

/// The hazard slots of all live local sessions: which chunks they claim at this moment. The store asks with its lock
/// held, so nobody may call the store while holding this one's.
class HazardRegistry {
 public:
  /// The segment must stay mapped until remove() returned.
  void add(std::uint64_t session_id, const SegmentView& segment);
  void remove(std::uint64_t session_id);
  /// Adds the chunks that are claimed. Clients write the slots: any number may stand there, and the high-water mark is
  /// bounded by our own copy of the layout.
  void collect(std::unordered_set<std::uint32_t>& claimed) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<std::uint64_t, SegmentView> segments_;
};

}  // namespace kvern
