#include "service/session.h"

#include <cstring>
#include <string>
#include <utility>

#include "service/device.h"

namespace kvern {
namespace {

Status session_closed() { return Status(Code::kExpired, "the session has ended: say hello again"); }

template <typename T>
std::shared_ptr<T> take(std::unordered_map<std::uint64_t, std::shared_ptr<T>>& map, std::uint64_t id) {
  auto node = map.extract(id);
  return node ? std::move(node.mapped()) : nullptr;
}

template <typename T>
std::shared_ptr<T> look_up(const std::unordered_map<std::uint64_t, std::shared_ptr<T>>& map, std::uint64_t id) {
  const auto found = map.find(id);
  return found == map.end() ? nullptr : found->second;
}

}  // namespace

Result<std::shared_ptr<const Namespace>> named_namespace(const Session& session, const std::string& id_bytes,
                                                         std::uint32_t group) {
  NamespaceId id;
  if (id_bytes.size() != id.bytes.size()) return failure(Code::kInvalid, "a namespace id has 16 bytes");
  std::memcpy(id.bytes.data(), id_bytes.data(), id.bytes.size());
  auto space = session.find_namespace(id);
  if (!space) return failure(Code::kInvalid, "this session has not registered the namespace " + id.to_hex());
  if (group > UINT16_MAX) return failure(Code::kInvalid, "there is no group " + std::to_string(group));
  return space;
}

void describe(Span& span, const Session& session) {
  span.set("kvern.session", session.id());
  span.set("kvern.client", session.identity().client_name);
  span.set("kvern.tenant", session.identity().tenant);
}

Session::Session(std::uint64_t id, std::string token, SessionIdentity identity, std::int64_t now_ns)
    : id_(id), token_(std::move(token)), identity_(std::move(identity)), created_ns_(now_ns), last_seen_ns_(now_ns) {
  add_attributes(identity_.attributes);
}

std::map<std::string, std::string> Session::attributes() const {
  const std::lock_guard lock(mutex_);
  return attributes_;
}

void Session::add_attributes(const std::map<std::string, std::string>& told) {
  const std::lock_guard lock(mutex_);
  for (const auto& [name, value] : told) {
    if (attributes_.size() < kMaxAttributes || attributes_.contains(name)) attributes_[name] = value;
  }
}

Status Session::accept_sequence(std::uint64_t sequence) {
  std::lock_guard lock(mutex_);
  if (sequence <= last_sequence_) {
    return Status(Code::kInvalid, "the request has sequence " + std::to_string(sequence) + ", but " +
                                      std::to_string(last_sequence_) + " was there before: repeated or out of order");
  }
  last_sequence_ = sequence;
  return Status::ok();
}

std::int64_t Session::last_seen_ns(std::int64_t now_ns) {
  std::lock_guard lock(mutex_);
  if (local_) {
    const std::int64_t heartbeat = local_->segment.header().client_heartbeat_ns.load(std::memory_order_relaxed);
    if (std::exchange(last_heartbeat_, heartbeat) != heartbeat) touch(now_ns);
  }
  return last_seen_ns_.load(std::memory_order_relaxed);
}

Status Session::add_namespace(std::shared_ptr<const Namespace> space) {
  std::lock_guard lock(mutex_);
  if (closed_) return session_closed();
  if (namespaces_.size() >= kMaxNamespaces && !namespaces_.contains(space->id)) {
    return Status(Code::kRefused, "a session can name at most " + std::to_string(kMaxNamespaces) + " namespaces");
  }
  namespaces_[space->id] = std::move(space);
  return Status::ok();
}

std::shared_ptr<const Namespace> Session::find_namespace(const NamespaceId& id) const {
  std::lock_guard lock(mutex_);
  const auto found = namespaces_.find(id);
  return found == namespaces_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<const Namespace>> Session::namespaces() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<const Namespace>> result;
  for (const auto& [id, space] : namespaces_) result.push_back(space);
  return result;
}

Status Session::add_reservation(const std::shared_ptr<Reservation>& reservation) {
  std::lock_guard lock(mutex_);
  if (closed_) return session_closed();
  if (reservations_.size() >= kMaxReservations) return Status(Code::kBusy, "the session has too many reservations");
  reservation->id = next_id_++;
  reservations_.emplace(reservation->id, reservation);
  return Status::ok();
}

std::shared_ptr<Reservation> Session::find_reservation(std::uint64_t id) const {
  std::lock_guard lock(mutex_);
  return look_up(reservations_, id);
}

std::shared_ptr<Reservation> Session::take_reservation(std::uint64_t id) {
  std::lock_guard lock(mutex_);
  return take(reservations_, id);
}

Result<std::uint64_t> Session::add_lease(std::shared_ptr<Lease> lease) {
  std::lock_guard lock(mutex_);
  if (closed_) return failure(session_closed());
  if (leases_.size() + matched_ >= kMaxLeases) return failure(Code::kBusy, "the session has too many leases");
  const std::uint64_t id = next_id_++;
  leases_.emplace(id, std::move(lease));
  return id;
}

std::shared_ptr<Lease> Session::find_lease(std::uint64_t id) const {
  std::lock_guard lock(mutex_);
  return look_up(leases_, id);
}

std::shared_ptr<Lease> Session::take_lease(std::uint64_t id) {
  std::lock_guard lock(mutex_);
  return take(leases_, id);
}

Status Session::add_match(std::uint64_t match_id, std::vector<std::shared_ptr<Lease>> leases) {
  std::lock_guard lock(mutex_);
  if (closed_) return session_closed();
  if (leases_.size() + matched_ + leases.size() > kMaxLeases || matches_.size() >= kMaxLeases) {
    return Status(Code::kBusy, "the session has too many leases");
  }
  matched_ += leases.size();
  auto& held = matches_[match_id];
  held.insert(held.end(), std::make_move_iterator(leases.begin()), std::make_move_iterator(leases.end()));
  return Status::ok();
}

std::shared_ptr<Prefetch> Session::find_prefetch(std::uint64_t match_id, std::uint16_t group) const {
  std::lock_guard lock(mutex_);
  const auto found = prefetches_.find({match_id, group});
  return found == prefetches_.end() ? nullptr : found->second;
}

Status Session::add_prefetch(std::uint64_t match_id, std::uint16_t group, std::shared_ptr<Prefetch> prefetch) {
  std::lock_guard lock(mutex_);
  if (closed_) return session_closed();
  if (prefetches_.size() >= kMaxPrefetches) return Status(Code::kBusy, "the session has too many prefetches");
  prefetches_.emplace(std::pair(match_id, group), std::move(prefetch));
  return Status::ok();
}

void Session::drop_match(std::uint64_t match_id) {
  // Both go after the lock, since they call the store.
  std::vector<std::shared_ptr<Lease>> dropped;
  std::vector<std::shared_ptr<Prefetch>> ended;
  std::lock_guard lock(mutex_);
  while (true) {
    const auto next = prefetches_.lower_bound({match_id, 0});
    if (next == prefetches_.end() || next->first.first != match_id) break;
    ended.push_back(std::move(next->second));
    prefetches_.erase(next);
  }
  if (auto node = matches_.extract(match_id)) {
    dropped = std::move(node.mapped());
    matched_ -= dropped.size();
  }
}

Status Session::offer(std::vector<UniqueFd> descriptors) {
  std::lock_guard lock(mutex_);
  if (closed_) return session_closed();
  offered_ = std::move(descriptors);
  return Status::ok();
}

std::vector<UniqueFd> Session::take_offered() {
  std::lock_guard lock(mutex_);
  return std::exchange(offered_, {});
}

Result<std::uint64_t> Session::add_pages(std::shared_ptr<DevicePages> pages) {
  std::lock_guard lock(mutex_);
  if (closed_) return failure(session_closed());
  if (pages_.size() >= kMaxDevicePages) {
    return failure(Code::kBusy,
                   "a session can register at most " + std::to_string(kMaxDevicePages) + " groups of pages");
  }
  const std::uint64_t id = next_id_++;
  pages_.emplace(id, std::move(pages));
  return id;
}

std::shared_ptr<DevicePages> Session::find_pages(std::uint64_t id) const {
  std::lock_guard lock(mutex_);
  return look_up(pages_, id);
}

void Session::revoke_pages() {
  decltype(pages_) pages;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;  // or more could be registered
    pages = pages_;
  }
  for (const auto& [id, each] : pages) each->revoke();
}

Status Session::admit(LocalResources resources) {
  std::lock_guard lock(mutex_);
  if (closed_) return session_closed();
  if (local_) return Status(Code::kRefused, "the session was admitted before; it belongs to one process");
  local_ = std::move(resources);
  return Status::ok();
}

void Session::set_staging(std::shared_ptr<Staging> staging) {
  std::lock_guard lock(mutex_);
  staging_ = std::move(staging);
}

std::shared_ptr<Staging> Session::staging() const {
  std::lock_guard lock(mutex_);
  return staging_;
}

const Session::LocalResources* Session::local() const {
  std::lock_guard lock(mutex_);
  return local_ ? &*local_ : nullptr;
}

void Session::close() {
  // Destroyed after the lock, since they call the store.
  decltype(reservations_) reservations;
  decltype(leases_) leases;
  decltype(matches_) matches;
  decltype(prefetches_) prefetches;
  decltype(pages_) pages;
  decltype(offered_) offered;
  std::lock_guard lock(mutex_);
  closed_ = true;
  pages.swap(pages_);
  offered.swap(offered_);
  reservations.swap(reservations_);
  leases.swap(leases_);
  matches.swap(matches_);
  prefetches.swap(prefetches_);
  matched_ = 0;
  namespaces_.clear();
}

bool Session::closed() const {
  std::lock_guard lock(mutex_);
  return closed_;
}

Session::Holdings Session::holdings() const {
  std::lock_guard lock(mutex_);
  std::vector<std::string> devices;
  for (const auto& [id, pages] : pages_) devices.emplace_back(pages->device().memory().uuid());
  return {.namespaces = namespaces_.size(),
          .reservations = reservations_.size(),
          .leases = leases_.size() + matched_,
          .staging_bytes = staging_ ? staging_->capacity_bytes() : 0,
          .staging_used_bytes = staging_ ? staging_->used_bytes() : 0,
          .devices = std::move(devices)};
}

}  // namespace kvern
