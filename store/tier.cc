#include "store/tier.h"

#include <algorithm>
#include <utility>

namespace kvern {
namespace {

bool aligned(std::uint64_t number) { return number % kTierAlignment == 0; }

Status check(const TierObject& object) {
  if (object.blocks.empty() || !(object.blocks.back() == object.key.last_block)) {
    return Status(Code::kInvalid, "the object's last block is not the one of its key");
  }
  for (const auto& piece : object.pieces) {
    if (!aligned(reinterpret_cast<std::uintptr_t>(piece.data())) || !aligned(piece.size()) || piece.empty()) {
      return Status(Code::kInvalid, "a piece of the object is not aligned");
    }
  }
  return object.pieces.empty() ? Status(Code::kInvalid, "the object has no bytes") : Status::ok();
}

Status check_read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into) {
  if (!aligned(offset) || !aligned(reinterpret_cast<std::uintptr_t>(into.data())) || !aligned(into.size())) {
    return Status(Code::kInvalid, "the read is not aligned");
  }
  if (into.empty() || offset > hit.bytes || into.size() > hit.bytes - offset) {
    return Status(Code::kInvalid, "the read does not lie within the object");
  }
  return Status::ok();
}

Status unavailable(const std::string& tier) {
  return Status(Code::kUnavailable, "the " + tier + " tier is cut off after failures and will be tried again soon");
}

}  // namespace

std::string_view operation_name(TierOperation operation) {
  switch (operation) {
    case TierOperation::kFind:
      return "find";
    case TierOperation::kRead:
      return "read";
    case TierOperation::kWrite:
      return "write";
    case TierOperation::kErase:
      return "erase";
    case TierOperation::kList:
      return "list";
  }
  return "unknown";
}

std::uint64_t TierObject::bytes() const {
  std::uint64_t total = 0;
  for (const auto& piece : pieces) total += piece.size();
  return total;
}

Tier::Tier(std::string name, const BreakerConfig& breaker, const Clock& clock, TierObserver* observer)
    : name_(std::move(name)), clock_(clock), observer_(observer), breaker_(breaker) {}

std::optional<std::uint64_t> Tier::begin(TierOperation operation) {
  const std::int64_t now = clock_.now_ns();
  std::lock_guard lock(mutex_);
  // Only somebody's waiting makes a stall: writes may lie in a queue for as long as the tier likes.
  const auto oldest = std::ranges::find_if(outstanding_, [](const auto& each) {
    return each.second.operation == TierOperation::kFind || each.second.operation == TierOperation::kRead;
  });
  if (!breaker_.allow(now, oldest == outstanding_.end() ? now : oldest->second.started_ns)) return std::nullopt;
  const std::uint64_t id = next_operation_++;
  if (breaker_.state() == BreakerState::kHalfOpen) probe_ = id;
  outstanding_.emplace(id, Outstanding{operation, now});
  return id;
}

void Tier::end(std::uint64_t id, TierOperation operation, const Status& status, std::uint64_t bytes) {
  const std::int64_t now = clock_.now_ns();
  const std::int64_t started = [&] {
    std::lock_guard lock(mutex_);
    const auto ended = outstanding_.extract(id);
    // Half open, only the probe counts, not what began before it opened.
    if (breaker_.state() != BreakerState::kHalfOpen || id == probe_) tell_breaker(status, now);
    return ended.mapped().started_ns;
  }();
  if (observer_ == nullptr) return;
  observer_->finished(name_, operation, status, status ? bytes : 0, static_cast<double>(now - started) * 1e-9);
}

// A miss, a full queue, a refusal or a caller that went away do not say that the tier is broken, and the last three not
// that it is well.
void Tier::tell_breaker(const Status& status, std::int64_t now_ns) {
  switch (status.code()) {
    case Code::kOk:
    case Code::kNotFound:
      return breaker_.succeeded();
    case Code::kUnavailable:
    case Code::kInternal:
    case Code::kCorrupt:
      return breaker_.failed(now_ns);
    case Code::kBusy:
    case Code::kRefused:
    case Code::kInvalid:
    case Code::kExpired:
      return breaker_.undecided();
  }
}

void Tier::find(std::vector<CellQuery> cells, std::stop_token cancel, FindDone done) {
  const auto id = begin(TierOperation::kFind);
  if (!id) return done(failure(unavailable(name_)));
  do_find(std::move(cells), std::move(cancel),
          [this, id = *id, done = std::move(done)](Result<std::vector<TierHit>> hits) {
            end(id, TierOperation::kFind, status_of(hits), 0);
            done(std::move(hits));
          });
}

void Tier::read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
                Done done) {
  if (auto status = check_read(hit, offset, into); !status) return done(std::move(status));
  const auto id = begin(TierOperation::kRead);
  if (!id) return done(unavailable(name_));
  do_read(hit, offset, into, std::move(cancel),
          [this, id = *id, bytes = into.size(), done = std::move(done)](Status status) {
            end(id, TierOperation::kRead, status, bytes);
            done(std::move(status));
          });
}

void Tier::write(TierObject object, Done done) {
  if (auto status = check(object); !status) return done(std::move(status));
  const auto id = begin(TierOperation::kWrite);
  if (!id) return done(unavailable(name_));
  const std::uint64_t bytes = object.bytes();
  do_write(std::move(object), [this, id = *id, bytes, done = std::move(done)](Status status) {
    end(id, TierOperation::kWrite, status, bytes);
    done(std::move(status));
  });
}

void Tier::erase(std::vector<ChunkKey> keys, Done done) {
  const auto id = begin(TierOperation::kErase);
  if (!id) return done(unavailable(name_));
  do_erase(std::move(keys), [this, id = *id, done = std::move(done)](Status status) {
    end(id, TierOperation::kErase, status, 0);
    done(std::move(status));
  });
}

void Tier::list(const NamespaceSet& namespaces, PageDone page, Done done) {
  const auto id = begin(TierOperation::kList);
  if (!id) return done(unavailable(name_));
  do_list(namespaces, std::move(page), [this, id = *id, done = std::move(done)](Status status) {
    end(id, TierOperation::kList, status, 0);
    done(std::move(status));
  });
}

void Tier::erase_all(const NamespaceSet& namespaces, Done done) {
  const auto id = begin(TierOperation::kErase);
  if (!id) return done(unavailable(name_));
  do_erase_all(namespaces, [this, id = *id, done = std::move(done)](Status status) {
    end(id, TierOperation::kErase, status, 0);
    done(std::move(status));
  });
}

TierStats Tier::stats() const {
  TierStats stats = do_stats();
  std::lock_guard lock(mutex_);
  stats.outstanding = outstanding_.size();
  stats.breaker = breaker_.state();
  return stats;
}

}  // namespace kvern
