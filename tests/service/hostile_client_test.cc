#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <deque>
#include <string>

#include "tests/service/service_fixture.h"

namespace kvern {
namespace {

using testing::ServiceFixture;

/// A number that is often near something that exists.
std::uint64_t odd_number() {
  return *rc::gen::weightedOneOf<std::uint64_t>(
      {{8, rc::gen::inRange<std::uint64_t>(0, 12)},
       {1, rc::gen::arbitrary<std::uint64_t>()},
       {1, rc::gen::element<std::uint64_t>(UINT64_MAX, UINT32_MAX, 1ULL << 40)}});
}
std::uint32_t odd_number32() { return static_cast<std::uint32_t>(odd_number()); }
bool rarely() { return *rc::gen::weightedElement<bool>({{9, false}, {1, true}}); }

/// Requests of a client that knows the protocol and keeps to it only now and then.
class HostileClient {
 public:
  HostileClient(ServiceFixture& service, Session& session, NamespaceId id)
      : service_(service), session_(session), id_(id) {}

  void act() {
    wire::HotRequest request;
    request.set_id(odd_number());
    switch (*rc::gen::inRange(0, 10)) {
      case 0:
        match(*request.mutable_match());
        break;
      case 1:
      case 2:
        reserve(request);
        break;
      case 3:
        commit(*request.mutable_commit());
        break;
      case 4:
        for (int i = *rc::gen::inRange(0, 4); i > 0; --i) request.mutable_abandon()->add_reservation_ids(odd_number());
        break;
      case 5:
        fetch(*request.mutable_fetch());
        break;
      case 6:
        for (int i = *rc::gen::inRange(0, 4); i > 0; --i) request.mutable_release()->add_lease_ids(odd_number());
        for (int i = *rc::gen::inRange(0, 2); i > 0; --i)
          request.mutable_release()->add_corrupt_lease_ids(odd_number());
        break;
      case 7:
        request.mutable_release_match()->set_lease_id(odd_number());
        break;
      case 8:
        retain(*request.mutable_retain());
        break;
      default:
        break;  // no body
    }
    ++asked_;
    service_.hot.handle(session_.id(), request, [this, id = request.id()](const wire::HotReply& reply) {
      ++answered_;
      RC_ASSERT(reply.id() == id);
      for (const auto& item : reply.reserved().items()) {
        if (item.outcome() != wire::RESERVED) continue;
        RC_ASSERT(item.extent().offset() + item.extent().bytes() <= testing::kStagingBytes);
      }
    });
    if (*rc::gen::arbitrary<bool>()) service_.executor.step();
  }
  bool all_answered() const { return asked_ == answered_; }

 private:
  std::string namespace_bytes() const {
    return rarely() ? *rc::gen::arbitrary<std::string>()
                    : std::string(reinterpret_cast<const char*>(id_.bytes.data()), 16);
  }
  std::string hashes() const {
    return rarely() ? *rc::gen::arbitrary<std::string>()
                    : testing::block_hashes(*rc::gen::inRange<std::uint64_t>(0, 6),
                                            *rc::gen::inRange<std::uint64_t>(0, 3) * 4,
                                            *rc::gen::inRange<std::uint64_t>(0, 6));
  }
  static std::uint32_t hash_bytes() { return rarely() ? odd_number32() : testing::kHashBytes; }

  void match(wire::Match& match) const {
    match.set_namespace_id(namespace_bytes());
    match.set_hash_bytes(hash_bytes());
    match.set_block_hashes(hashes());
    match.set_lease_id(odd_number());
    match.set_first_block(odd_number32());
    if (rarely()) match.set_group(odd_number32());
  }
  void retain(wire::Retain& retain) const {
    retain.set_namespace_id(namespace_bytes());
    retain.set_hash_bytes(hash_bytes());
    retain.set_block_hashes(hashes());
    retain.set_retain_seconds(rarely() ? odd_number() : *rc::gen::inRange<std::uint64_t>(1, 10));
    if (rarely()) retain.set_group(odd_number32());
  }
  void reserve(wire::HotRequest& request) const {
    const std::uint64_t id = request.id();
    request = ServiceFixture::reserve_request(id_, *rc::gen::inRange<std::uint64_t>(0, 6),
                                              *rc::gen::inRange<std::uint64_t>(0, 4));
    request.set_id(id);
    auto& reserve = *request.mutable_reserve();
    if (rarely()) reserve.set_namespace_id(namespace_bytes());
    if (rarely()) reserve.set_hash_bytes(hash_bytes());
    if (rarely()) reserve.set_block_tokens(odd_number32());
    if (rarely()) reserve.set_model_heads(odd_number32());
    if (rarely()) reserve.set_group_layers(odd_number32());
    if (rarely()) reserve.set_group(odd_number32());
    if (rarely())
      reserve.set_codec_spec(*rc::gen::element<std::string>("raw", "int8", "int8(group=0)", "zip", "|", "raw|raw"));
    auto& shard = *reserve.mutable_shard();
    if (rarely()) shard.set_dtype(odd_number32());
    if (rarely()) shard.set_layer_begin(odd_number32());
    if (rarely()) shard.set_layers(odd_number32());
    if (rarely()) shard.set_head_begin(odd_number32());
    if (rarely()) shard.set_heads(odd_number32());
    if (rarely()) shard.set_key_dim(odd_number32());
    if (rarely()) shard.set_value_dim(odd_number32());
    if (rarely()) {
      auto* item = reserve.add_items();
      item->set_block_hashes(hashes());
      item->set_position(odd_number());
    }
  }
  void commit(wire::Commit& commit) const {
    for (int i = *rc::gen::inRange(0, 4); i > 0; --i) {
      const std::uint64_t id = odd_number();
      auto* item = commit.add_items();
      if (const auto reservation = session_.find_reservation(id); reservation && !rarely()) {
        // Whatever lies there, sometimes under the right checksum.
        item->set_plane_checksums(testing::plane_checksums(
            reservation->info.shape, reservation->block.bytes().first(reservation->info.shape.raw_bytes())));
      } else {
        item->set_plane_checksums(*rc::gen::arbitrary<std::string>());
      }
      item->set_reservation_id(id);
    }
  }
  void fetch(wire::Fetch& fetch) const {
    fetch.set_namespace_id(namespace_bytes());
    if (rarely()) fetch.set_group(odd_number32());
    for (int i = *rc::gen::inRange(0, 4); i > 0; --i) {
      fetch.add_items()->set_block_hash(rarely() ? *rc::gen::arbitrary<std::string>()
                                                 : testing::block_hash(*rc::gen::inRange<std::uint64_t>(0, 6),
                                                                       *rc::gen::inRange<std::uint64_t>(0, 12)));
    }
  }

  ServiceFixture& service_;
  Session& session_;
  const NamespaceId id_;
  std::size_t asked_ = 0;
  std::size_t answered_ = 0;
};

RC_GTEST_PROP(HostileClients, EveryRequestIsAnsweredOnceAndNothingIsLeftBehind, ()) {
  ServiceFixture service(256U << 10);
  auto one = service.open_worker();
  auto other = service.open_worker();
  const NamespaceId id = service.register_model(*one);
  service.register_model(*other);
  HostileClient first(service, *one, id);
  HostileClient second(service, *other, id);
  const int steps = *rc::gen::inRange(1, 120);
  for (int step = 0; step < steps; ++step) (*rc::gen::arbitrary<bool>() ? first : second).act();

  service.sessions.end(one->id(),
                       *rc::gen::element(SessionEnd::kGoodbye, SessionEnd::kDisconnected, SessionEnd::kExpired));
  service.executor.run_all();
  service.sessions.end(other->id(), SessionEnd::kDisconnected);
  RC_ASSERT(first.all_answered());
  RC_ASSERT(second.all_answered());
  for (const auto& session : {one, other}) {
    const auto holdings = session->holdings();
    RC_ASSERT(holdings.leases == 0U && holdings.reservations == 0U && holdings.staging_used_bytes == 0U);
  }
  RC_ASSERT(service.in_flight.size() == 0U);
  RC_ASSERT(service.store.stats().pinned_chunks == 0U);
  // What was stored is whole, and can all be let go.
  for (const auto& chunk : service.store.snapshot(NamespaceSet::all(), 1000)) {
    const auto pinned = service.store.pin(chunk.key.namespace_id, chunk.key.group, chunk.key.last_block);
    RC_ASSERT(pinned.has_value());
    for (const StoredShard& shard : pinned->shards) {
      const auto reader = ContainerReader::parse(service.store.bytes(shard));
      RC_ASSERT(reader.has_value());
      RC_ASSERT(reader->verify().is_ok());
    }
    service.store.unpin(pinned->pin);
  }
  service.store.flush(NamespaceSet::all());
  service.clock.advance(std::chrono::minutes(2));
  service.store.sweep();
  RC_ASSERT(service.store.stats().used_bytes == 0U);
}

}  // namespace
}  // namespace kvern
