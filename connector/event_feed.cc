#include "connector/event_feed.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "connector/client.h"

namespace kvern {
namespace {

/// Events that nobody takes are dropped (and reported as lost) beyond this many chunks.
constexpr std::size_t kMaxRemoved = 1U << 16;
constexpr std::size_t kMaxSnapshotRequests = 64;
/// Chunks of one snapshot: a reply of some 40 MiB, within the control plane's limit.
constexpr std::uint64_t kSnapshotLimit = 1U << 16;

std::optional<std::vector<BlockHash>> split_hashes(const std::string& joined, std::uint32_t hash_bytes) {
  if (hash_bytes == 0 || hash_bytes > BlockHash::kMaxBytes || joined.size() % hash_bytes != 0) return std::nullopt;
  std::vector<BlockHash> hashes;
  hashes.reserve(joined.size() / hash_bytes);
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(joined.data());
  for (std::size_t at = 0; at < joined.size(); at += hash_bytes) {
    hashes.emplace_back(std::span<const std::uint8_t>(bytes + at, hash_bytes));
  }
  return hashes;
}

Status call(const Session& session, wire::ControlRequest& request, wire::ControlReply* reply,
            std::uint32_t timeout_ms) {
  request.set_session_token(session.token);
  const Status sent = session.control->call(request, reply, std::chrono::milliseconds(timeout_ms));
  return sent ? to_status(reply->status()) : sent;
}

bool session_ended(const Status& status) {
  return status.code() == Code::kExpired || status.code() == Code::kUnavailable;
}

}  // namespace

RemovedEvents EventFeed::take_removed() {
  const std::lock_guard lock(mutex_);
  wanted_ = true;
  return std::exchange(removed_, {});
}

void EventFeed::request_snapshot(int handle) {
  const std::lock_guard lock(mutex_);
  wanted_ = true;
  const bool waits = std::ranges::find(requested_, handle) != requested_.end();
  if (!waits && requested_.size() < kMaxSnapshotRequests) requested_.push_back(handle);
}

std::optional<NamespaceSnapshot> EventFeed::take_snapshot() {
  const std::lock_guard lock(mutex_);
  if (snapshots_.empty()) return std::nullopt;
  NamespaceSnapshot snapshot = std::move(snapshots_.front());
  snapshots_.pop_front();
  return snapshot;
}

bool EventFeed::wanted() const {
  const std::lock_guard lock(mutex_);
  return wanted_;
}

bool EventFeed::snapshot_wanted() const {
  const std::lock_guard lock(mutex_);
  return !requested_.empty();
}

void EventFeed::reset() {
  const std::lock_guard lock(mutex_);
  cursor_.reset();
  removed_ = {};
  snapshots_.clear();
}

Status EventFeed::refresh(const Session& session, std::uint32_t timeout_ms) {
  std::deque<int> handles;
  {
    const std::lock_guard lock(mutex_);
    if (!wanted_) return Status::ok();
    handles = requested_;
  }
  // Events before snapshots: a removal that is older than the snapshot must not be taken for a newer one.
  if (Status status = fetch_removed(session, timeout_ms); !status) return status;
  for (const int handle : handles) {
    if (Status status = fetch_snapshot(session, handle, timeout_ms); !status) return status;
  }
  return Status::ok();
}

Status EventFeed::fetch_removed(const Session& session, std::uint32_t timeout_ms) {
  wire::ControlRequest request;
  {
    const std::lock_guard lock(mutex_);
    request.mutable_poll_events()->set_cursor(cursor_.value_or(0));
  }
  wire::ControlReply reply;
  if (Status status = call(session, request, &reply, timeout_ms); !status) {
    return session_ended(status) ? status : Status::ok();
  }
  const wire::Events& events = reply.events();
  const std::lock_guard lock(mutex_);
  // What happened before this session's first look is no news to anybody.
  const bool first = !cursor_.has_value();
  cursor_ = events.next_cursor();
  if (first) return Status::ok();
  removed_.lost = removed_.lost || events.lost();
  for (const wire::RemovedChunk& chunk : events.removed()) {
    RemovedBlocks removed;
    auto hashes = split_hashes(chunk.block_hashes(), chunk.hash_bytes());
    if (!hashes || chunk.namespace_id().size() != removed.namespace_id.bytes.size() ||
        removed_.removed.size() >= kMaxRemoved) {
      removed_.lost = true;
      continue;
    }
    std::memcpy(removed.namespace_id.bytes.data(), chunk.namespace_id().data(), removed.namespace_id.bytes.size());
    removed.group = static_cast<std::uint16_t>(chunk.group());
    removed.hashes = std::move(*hashes);
    removed.reason = chunk.reason();
    removed_.removed.push_back(std::move(removed));
  }
  return Status::ok();
}

Status EventFeed::fetch_snapshot(const Session& session, int handle, std::uint32_t timeout_ms) {
  const auto namespace_id = session.namespace_id(handle);
  NamespaceSnapshot snapshot;
  snapshot.handle = handle;
  if (namespace_id) {
    wire::ControlRequest request;
    request.mutable_snapshot()->set_namespace_id(namespace_id->bytes.data(), namespace_id->bytes.size());
    request.mutable_snapshot()->set_limit(kSnapshotLimit);
    wire::ControlReply reply;
    // What could not be had is asked for again: nothing is known, not that there is nothing.
    if (Status status = call(session, request, &reply, timeout_ms); !status) {
      return session_ended(status) ? status : Status::ok();
    }
    snapshot.complete = !reply.snapshot().truncated();
    for (const wire::ChunkDescription& chunk : reply.snapshot().chunks()) {
      auto hashes = split_hashes(chunk.block_hashes(), chunk.hash_bytes());
      if (!hashes) continue;
      snapshot.chunks.push_back({static_cast<std::uint16_t>(chunk.group()), std::move(*hashes), chunk.tokens()});
    }
  }
  const std::lock_guard lock(mutex_);
  std::erase(requested_, handle);
  snapshots_.push_back(std::move(snapshot));
  return Status::ok();
}

}  // namespace kvern
