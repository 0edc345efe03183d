#include "service/event_log.h"

#include <algorithm>
#include <utility>

namespace kvern {

void EventLog::add(Removal removal) {
  std::lock_guard lock(mutex_);
  if (removals_.size() >= capacity_) {
    removals_.pop_front();
    ++first_;
  }
  removals_.push_back(std::move(removal));
}

void EventLog::forget() {
  std::lock_guard lock(mutex_);
  first_ += removals_.size() + 1;
  removals_.clear();
}

std::uint64_t EventLog::next_cursor() const {
  std::lock_guard lock(mutex_);
  return first_ + removals_.size();
}

EventLog::Page EventLog::read(std::uint64_t cursor, const std::function<bool(const Removal&)>& take) const {
  std::lock_guard lock(mutex_);
  const std::uint64_t end = first_ + removals_.size();
  Page page;
  if (cursor == 0) cursor = end;
  // A cursor from the future is one of another daemon.
  page.lost = cursor < first_ || cursor > end;
  page.next_cursor = page.lost ? first_ : cursor;
  while (page.next_cursor < end && take(removals_[page.next_cursor - first_])) ++page.next_cursor;
  return page;
}

std::optional<EventLog::Removal> EventLog::last_removal_of(const BlockHash& block) const {
  std::lock_guard lock(mutex_);
  for (auto removal = removals_.rbegin(); removal != removals_.rend(); ++removal) {
    if (std::ranges::find(removal->blocks, block) != removal->blocks.end()) return *removal;
  }
  return std::nullopt;
}

}  // namespace kvern
