#include "service/hazards.h"

namespace kvern {

void HazardRegistry::add(std::uint64_t session_id, const SegmentView& segment) {
  std::lock_guard lock(mutex_);
  segments_.emplace(session_id, segment);
}

void HazardRegistry::remove(std::uint64_t session_id) {
  std::lock_guard lock(mutex_);
  segments_.erase(session_id);
}

void HazardRegistry::collect(std::unordered_set<std::uint32_t>& claimed) const {
  std::lock_guard lock(mutex_);
  for (const auto& [id, segment] : segments_) {
    for (const auto& slot : segment.used_hazards()) {
      if (const std::uint32_t value = slot.load(); value != 0) claimed.insert(value - 1);
    }
  }
}

}  // namespace kvern
