#include "service/remote_data.h"

namespace kvern {
namespace {

/// Whether [offset, offset + bytes) lies in the extent.
bool contains(const Extent& extent, std::uint64_t offset, std::uint64_t bytes) {
  return bytes <= extent.bytes && offset >= extent.offset && offset - extent.offset <= extent.bytes - bytes;
}

Result<std::shared_ptr<Session>> remote_session(Sessions& sessions, const std::string& token) {
  auto session = sessions.authenticate(token);
  if (session && (*session)->identity().plane != SessionPlane::kUcx) {
    return failure(Code::kRefused, "the session moves its bytes through shared memory");
  }
  return session;
}

}  // namespace

Result<std::span<std::byte>> RemoteData::begin_push(const std::string& session_token, std::uint64_t reservation_id,
                                                    std::uint64_t offset, std::size_t bytes) {
  const auto session = remote_session(sessions_, session_token);
  if (!session) return failure(session.error());
  // A commit at the same moment would read bytes that change: its checksums tell. The memory itself is held here.
  auto reservation = (*session)->find_reservation(reservation_id);
  if (!reservation) return failure(Code::kInvalid, "there is no reservation " + std::to_string(reservation_id));
  const Extent& extent = reservation->block.extent();
  if (!contains(extent, offset, bytes)) return failure(Code::kInvalid, "the bytes lie outside of the reserved extent");
  reservation->running_pushes.fetch_add(1);
  const auto place = reservation->block.bytes().subspan(offset - extent.offset, bytes);
  std::lock_guard lock(mutex_);
  pushes_.emplace(Key(session_token, reservation_id), std::move(reservation));
  return place;
}

void RemoteData::pushed(const std::string& session_token, std::uint64_t reservation_id, const Status&) {
  std::shared_ptr<Reservation> ended;  // given back after the lock
  std::lock_guard lock(mutex_);
  const auto found = pushes_.find(Key(session_token, reservation_id));
  if (found == pushes_.end()) return;
  ended = std::move(found->second);
  pushes_.erase(found);
  ended->running_pushes.fetch_sub(1);
}

Result<std::span<const std::byte>> RemoteData::begin_pull(const std::string& session_token, std::uint64_t lease_id,
                                                          std::uint64_t offset, std::size_t bytes) {
  const auto session = remote_session(sessions_, session_token);
  if (!session) return failure(session.error());
  auto lease = (*session)->find_lease(lease_id);
  if (!lease) return failure(Code::kExpired, "there is no lease " + std::to_string(lease_id));
  for (const StoredShard& shard : lease->chunk().shards) {
    if (!contains(shard.extent, offset, bytes)) continue;
    const auto source = store_.bytes(shard).subspan(offset - shard.extent.offset, bytes);
    std::lock_guard lock(mutex_);
    pulls_.emplace(Key(session_token, lease_id), std::move(lease));
    return source;
  }
  return failure(Code::kInvalid, "the bytes lie outside of the leased containers");
}

void RemoteData::pulled(const std::string& session_token, std::uint64_t lease_id, const Status&) {
  std::shared_ptr<Lease> ended;  // unpinned after the lock
  std::lock_guard lock(mutex_);
  const auto found = pulls_.find(Key(session_token, lease_id));
  if (found == pulls_.end()) return;
  ended = std::move(found->second);
  pulls_.erase(found);
}

}  // namespace kvern
