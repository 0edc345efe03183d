#include "service/hot_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "tests/service/service_fixture.h"

namespace kvern {
namespace {

using testing::block_hash;
using testing::block_hashes;
using ::testing::HasSubstr;
using testing::kBlockTokens;
using testing::kHashBytes;
using testing::ServiceFixture;

struct HotServiceTest : ::testing::Test {
  ServiceFixture service;
  std::shared_ptr<Session> session = service.open_worker();
  NamespaceId id = service.register_model(*session);

  wire::ReservedItem reserve_one(std::uint64_t prompt) {
    return service.ask(session->id(), ServiceFixture::reserve_request(id, prompt, 1))->reserved().items(0);
  }
  wire::HotRequest match_request(std::uint64_t prompt, std::uint64_t blocks, std::uint64_t lease) const {
    wire::HotRequest request;
    request.mutable_match()->set_namespace_id(id.bytes.data(), id.bytes.size());
    request.mutable_match()->set_hash_bytes(kHashBytes);
    request.mutable_match()->set_block_hashes(block_hashes(prompt, 0, blocks));
    request.mutable_match()->set_lease_id(lease);
    return request;
  }
  void expect_nothing_held() {
    service.executor.run_all();
    EXPECT_EQ(service.in_flight.size(), 0U);
    EXPECT_EQ(service.store.stats().pinned_chunks, 0U);
  }
};

TEST_F(HotServiceTest, WhatIsStoredIsFoundAndComesBackAsItWas) {
  for (const Status& status : service.store_chunks(*session, id, 7, 3)) EXPECT_TRUE(status) << status.to_string();
  EXPECT_EQ(session->holdings().staging_used_bytes, 0U);
  EXPECT_EQ(session->holdings().reservations, 0U);
  EXPECT_EQ(service.in_flight.size(), 0U);

  const auto fetched = service.fetch(session->id(), id, block_hash(7, 5))->fetched().items(0);  // in the second chunk
  ASSERT_TRUE(to_status(fetched.status())) << fetched.status().message();
  EXPECT_EQ(fetched.tokens(), testing::kChunkTokens);
  ASSERT_EQ(fetched.shards_size(), 1);
  const auto& where = fetched.shards(0);
  const auto reader =
      ContainerReader::parse(service.slab_memory.bytes().subspan(where.offset(), where.bytes())).value();
  EXPECT_TRUE(reader.verify());
  EXPECT_EQ(reader.info().position, 16U);
  EXPECT_EQ(reader.info().block_hashes.size(), 4U);
  EXPECT_EQ(service.store.stats().pinned_chunks, 1U);

  wire::HotRequest release;
  release.mutable_release()->add_lease_ids(fetched.lease_id());
  EXPECT_TRUE(to_status(service.ask(session->id(), release)->status()));
  expect_nothing_held();
}

TEST_F(HotServiceTest, AStoredChunkNeedsNotBeSentAgain) {
  service.store_chunks(*session, id, 7, 1);
  EXPECT_EQ(reserve_one(7).outcome(), wire::ALREADY_STORED);
  EXPECT_EQ(reserve_one(8).outcome(), wire::RESERVED);
}

TEST_F(HotServiceTest, TwoWritersOfTheSameChunkAreToldApart) {
  EXPECT_EQ(reserve_one(7).outcome(), wire::RESERVED);
  const auto other = service.open_worker();
  service.register_model(*other);
  const auto request = ServiceFixture::reserve_request(id, 7, 1);
  EXPECT_EQ(service.ask(other->id(), request)->reserved().items(0).outcome(), wire::IN_FLIGHT);
  service.sessions.end(session->id(), SessionEnd::kGoodbye);
  EXPECT_EQ(service.ask(other->id(), request)->reserved().items(0).outcome(), wire::RESERVED);
}

TEST_F(HotServiceTest, TheSameChunkTwiceInOneRequestIsReservedOnce) {
  auto request = ServiceFixture::reserve_request(id, 7, 1);
  *request.mutable_reserve()->add_items() = request.reserve().items(0);
  const auto reply = service.ask(session->id(), request)->reserved();
  EXPECT_EQ(reply.items(0).outcome(), wire::RESERVED);
  EXPECT_EQ(reply.items(1).outcome(), wire::IN_FLIGHT);
}

TEST_F(HotServiceTest, FullStagingIsNoRoomUntilSomethingIsGivenBack) {
  wire::HotRequest abandon;
  std::uint64_t prompt = 0;
  while (true) {
    const auto item = reserve_one(++prompt);
    if (item.outcome() == wire::NO_ROOM) break;
    ASSERT_EQ(item.outcome(), wire::RESERVED);
    ASSERT_LT(prompt, 1000U);
    abandon.mutable_abandon()->add_reservation_ids(item.reservation_id());
  }
  EXPECT_EQ(prompt - 1, testing::kStagingBytes / Slab::kAlignment);
  EXPECT_TRUE(to_status(service.ask(session->id(), abandon)->status()));
  EXPECT_EQ(reserve_one(1).outcome(), wire::RESERVED);
}

TEST_F(HotServiceTest, BytesThatChangedAfterTheChecksumAreNotStored) {
  const auto reserved = service.ask(session->id(), ServiceFixture::reserve_request(id, 7, 2))->reserved();
  wire::HotRequest request;
  for (const auto& item : reserved.items()) {
    *request.mutable_commit()->add_items() = ServiceFixture::write(*session, item.reservation_id(), 7);
  }
  session->find_reservation(reserved.items(0).reservation_id())->block.bytes()[100] ^= std::byte{1};
  std::optional<wire::HotReply> reply;
  service.hot.handle(session->id(), request, [&](wire::HotReply answer) { reply = std::move(answer); });
  EXPECT_FALSE(reply) << "answered before the chunks were encoded";
  service.executor.run_all();
  ASSERT_TRUE(reply);
  EXPECT_EQ(to_status(reply->committed().items(0)).code(), Code::kCorrupt);
  EXPECT_TRUE(to_status(reply->committed().items(1)));
  EXPECT_EQ(service.store.stats().chunks, 1U);
  EXPECT_EQ(session->holdings().staging_used_bytes, 0U);
  expect_nothing_held();
}

TEST_F(HotServiceTest, ACommitWithoutItsChecksumsFailsAlone) {
  const auto reserved = service.ask(session->id(), ServiceFixture::reserve_request(id, 7, 2))->reserved();
  wire::HotRequest request;
  for (const auto& item : reserved.items()) {
    *request.mutable_commit()->add_items() = ServiceFixture::write(*session, item.reservation_id(), 7);
  }
  request.mutable_commit()->mutable_items(1)->mutable_plane_checksums()->pop_back();
  request.mutable_commit()->add_items()->set_reservation_id(12345);
  std::optional<wire::HotReply> reply;
  service.hot.handle(session->id(), request, [&](wire::HotReply answer) { reply = std::move(answer); });
  service.executor.run_all();
  ASSERT_TRUE(reply);
  EXPECT_TRUE(to_status(reply->committed().items(0)));
  EXPECT_EQ(to_status(reply->committed().items(1)).code(), Code::kInvalid);
  EXPECT_EQ(to_status(reply->committed().items(2)).code(), Code::kInvalid);
}

TEST_F(HotServiceTest, ASessionThatEndsDuringEncodingHurtsNobody) {
  const auto item = reserve_one(7);
  wire::HotRequest request;
  *request.mutable_commit()->add_items() = ServiceFixture::write(*session, item.reservation_id(), 7);
  const auto answered = std::make_shared<bool>(false);
  service.hot.handle(session->id(), request, [answered](const wire::HotReply&) { *answered = true; });
  service.sessions.end(session->id(), SessionEnd::kDisconnected);
  session.reset();
  service.executor.run_all();
  EXPECT_TRUE(*answered);
  EXPECT_EQ(service.store.stats().chunks, 1U);
  expect_nothing_held();
}

TEST_F(HotServiceTest, LeasesEndWithTheirSession) {
  service.store_chunks(*session, id, 7, 2);
  service.fetch(session->id(), id, block_hash(7, 0));
  service.ask(session->id(), match_request(7, 8, 1));
  EXPECT_EQ(service.store.stats().pinned_chunks, 2U);
  for (int i = 0; i < 5; ++i) {
    service.clock.advance(std::chrono::milliseconds(400));
    service.sessions.tick();
  }
  EXPECT_EQ(service.store.stats().pinned_chunks, 0U);
  EXPECT_EQ(to_status(service.ask(session->id(), match_request(7, 8, 1))->status()).code(), Code::kExpired);
}

TEST_F(HotServiceTest, AWishToRetainIsCheckedAndCounted) {
  service.store_chunks(*session, id, 7, 2);
  wire::HotRequest request;
  wire::Retain& retain = *request.mutable_retain();
  retain.set_namespace_id(id.bytes.data(), id.bytes.size());
  retain.set_hash_bytes(kHashBytes);
  retain.set_block_hashes(block_hashes(7, 0, 12));
  for (const std::uint64_t seconds : {std::uint64_t{0}, HotService::kMaxRetainSeconds + 1, ~std::uint64_t{0}}) {
    retain.set_retain_seconds(seconds);
    const Status refused = to_status(service.ask(session->id(), request)->status());
    EXPECT_EQ(refused.code(), Code::kInvalid);
    EXPECT_THAT(refused.message(), HasSubstr("retain_seconds must be 1 to 604800"));
  }
  retain.set_retain_seconds(60);
  const auto answer = service.ask(session->id(), request);
  ASSERT_TRUE(to_status(answer->status())) << answer->status().message();
  EXPECT_EQ(answer->retained().chunks(), 2U) << "the third chunk of the prompt is not stored";
  EXPECT_EQ(answer->retained().refused(), 0U);
  EXPECT_EQ(service.store.stats().retained_chunks, 2U);
  retain.set_namespace_id(std::string(16, 'x'));
  EXPECT_EQ(to_status(service.ask(session->id(), request)->status()).code(), Code::kInvalid);
}

TEST_F(HotServiceTest, AMatchBringsUpWhatLowerTiersHave) {
  service.store_chunks(*session, id, 7, 3);
  ASSERT_EQ(service.lower->objects.size(), 3U) << "written through";
  service.store.flush(NamespaceSet::all());
  auto request = match_request(7, 12, 5);
  EXPECT_EQ(service.ask(session->id(), request)->matched().present(), std::string(2, '\0')) << "not asked for";
  request.mutable_match()->set_prefetch(true);
  EXPECT_TRUE(service.ask(session->id(), request)->matched().pending());
  EXPECT_TRUE(service.ask(session->id(), request)->matched().pending()) << "nothing is verified yet";
  service.movers.run_all();
  const auto answer = service.ask(session->id(), request);
  EXPECT_FALSE(answer->matched().pending());
  EXPECT_EQ(answer->matched().present(), std::string("\xff\x0f"));
  wire::HotRequest release;
  release.mutable_release_match()->set_lease_id(5);
  service.ask(session->id(), release);
  EXPECT_EQ(service.tiers.stats().prefetches, 0U);
  expect_nothing_held();
}

TEST_F(HotServiceTest, ARequestIsRecordedInTheTraceThatItBelongsTo) {
  const std::string parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
  auto reserve = ServiceFixture::reserve_request(id, 7, 2);
  reserve.set_traceparent(parent);
  const auto reserved = service.ask(session->id(), reserve);
  wire::HotRequest commit;
  commit.set_traceparent(parent);
  for (const auto& item : reserved->reserved().items()) {
    *commit.mutable_commit()->add_items() = ServiceFixture::write(*session, item.reservation_id(), 7);
  }
  service.ask(session->id(), commit);
  EXPECT_TRUE(service.spans.named("kvern.commit").empty()) << "it is under way";
  service.executor.run_all();
  service.store.flush(NamespaceSet::all());
  auto match = match_request(7, 8, 5);
  match.set_traceparent(parent);
  match.mutable_match()->set_prefetch(true);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(service.ask(session->id(), match)->matched().pending());
  service.movers.run_all();
  EXPECT_FALSE(service.ask(session->id(), match)->matched().pending());

  const auto one = [&](const char* name) {
    const auto found = service.spans.named(name);
    EXPECT_EQ(found.size(), 1U) << name;
    return found.at(0);
  };
  const FinishedSpan request = one("kvern.reserve"), committed = one("kvern.commit"), prefetch = one("kvern.prefetch");
  EXPECT_EQ(request.parent_id, TraceContext::parse(parent)->span_id);
  EXPECT_EQ(testing::attribute_of(request, "kvern.client")->text, session->identity().client_name);
  EXPECT_EQ(testing::attribute_of(request, "kvern.namespace")->text, id.to_hex());
  EXPECT_EQ(testing::attribute_of(request, "kvern.reserved")->number, 2U);
  const auto encoded = service.spans.named("kvern.encode"), written = service.spans.named("kvern.tier.write");
  ASSERT_EQ(encoded.size(), 2U);
  EXPECT_EQ(encoded[0].parent_id, committed.context.span_id);
  EXPECT_EQ(testing::attribute_of(encoded[0], "kvern.tokens")->number, testing::kChunkTokens);
  ASSERT_EQ(written.size(), 2U);
  EXPECT_EQ(written[0].parent_id, encoded[0].context.span_id);
  EXPECT_EQ(testing::attribute_of(written[0], "kvern.tier")->text, service.lower->name());
  const auto matches = service.spans.named("kvern.match");
  ASSERT_EQ(matches.size(), 2U) << "the one that began the movement, and the one with the answer";
  EXPECT_EQ(testing::attribute_of(matches[1], "kvern.tokens")->number, 8U * kBlockTokens);
  EXPECT_EQ(prefetch.parent_id, matches[0].context.span_id);
  const auto read = service.spans.named("kvern.tier.read");
  ASSERT_EQ(read.size(), 2U);
  EXPECT_EQ(read[0].parent_id, prefetch.context.span_id);
  for (const FinishedSpan& span : service.spans.spans) {
    EXPECT_EQ(span.context.trace_id, TraceContext::parse(parent)->trace_id) << span.name;
    EXPECT_TRUE(span.status) << span.name;
  }
}

TEST_F(HotServiceTest, WhatFailsIsRecordedWithItsReason) {
  wire::HotRequest request = match_request(7, 8, 5);
  request.set_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
  request.mutable_match()->set_hash_bytes(0);
  service.ask(session->id(), request);
  ASSERT_EQ(service.spans.spans.size(), 1U);
  EXPECT_EQ(service.spans.spans[0].status.code(), Code::kInvalid);
  for (const char* odd : {"", "00-", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", "\xff\xff"}) {
    request.set_traceparent(odd);
    service.ask(session->id(), request);
  }
  EXPECT_EQ(service.spans.spans.size(), 1U);
}

TEST_F(HotServiceTest, AReleasedMatchOrADeadSessionEndsItsPrefetch) {
  service.store_chunks(*session, id, 7, 3);
  service.store.flush(NamespaceSet::all());
  service.lower->immediate = false;
  auto request = match_request(7, 12, 5);
  request.mutable_match()->set_prefetch(true);
  EXPECT_TRUE(service.ask(session->id(), request)->matched().pending());
  EXPECT_EQ(service.tiers.stats().prefetches, 1U);
  wire::HotRequest release;
  release.mutable_release_match()->set_lease_id(5);
  service.ask(session->id(), release);
  EXPECT_TRUE(service.ask(session->id(), request)->matched().pending()) << "a new one";
  session->close();
  while (service.lower->run()) {
  }
  service.movers.run_all();
  EXPECT_EQ(service.tiers.stats().prefetches, 0U);
  EXPECT_EQ(service.store.stats().used_bytes, 0U);
}

TEST_F(HotServiceTest, AMatchTellsEveryBlockAndHoldsOnlyWhatIsNeeded) {
  service.store_chunks(*session, id, 7, 3);
  auto request = match_request(7, 15, 5);
  request.mutable_match()->set_first_block(4);
  const std::string present = service.ask(session->id(), request)->matched().present();
  EXPECT_EQ(present, std::string("\xff\x0f"));  // 12 of 15 blocks
  EXPECT_EQ(service.store.stats().pinned_chunks, 2U) << "the first chunk is the engine's own";
  EXPECT_EQ(session->holdings().leases, 2U);
  wire::HotRequest release;
  release.mutable_release_match()->set_lease_id(5);
  service.ask(session->id(), release);
  EXPECT_EQ(session->holdings().leases, 0U);
  expect_nothing_held();
}

TEST_F(HotServiceTest, NamespacesAreSeenByThoseWhoRegisteredThem) {
  service.store_chunks(*session, id, 7, 1);
  const auto stranger = service.open_worker();
  EXPECT_EQ(to_status(service.fetch(stranger->id(), id, block_hash(7, 0))->status()).code(), Code::kInvalid);
  EXPECT_EQ(to_status(service.ask(stranger->id(), match_request(7, 4, 1))->status()).code(), Code::kInvalid);
  auto facts = testing::model_facts();
  facts["weights"] = "ffff";  // retrained at the same path
  const NamespaceId retrained = service.register_model(*stranger, facts);
  EXPECT_EQ(to_status(service.fetch(stranger->id(), retrained, block_hash(7, 0))->fetched().items(0).status()).code(),
            Code::kNotFound);
}

TEST_F(HotServiceTest, ARequestThatDoesNotFitItsNamespaceIsRefusedWithTheReason) {
  const auto status_after = [&](auto change) {
    auto request = ServiceFixture::reserve_request(id, 7, 1);
    change(*request.mutable_reserve());
    return to_status(service.ask(session->id(), request)->status());
  };
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.mutable_shard()->set_dtype(0); }).message(), HasSubstr("kv_dtype"));
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.mutable_shard()->set_dtype(99); }).message(), HasSubstr("dtype"));
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.set_model_heads(4); }).message(), HasSubstr("KV heads"));
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.set_block_tokens(8); }).message(), HasSubstr("tokens"));
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.set_codec_spec("zip"); }).message(), HasSubstr("zip"));
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.set_codec_spec("cake | int8"); }).message(),
              HasSubstr("compact caches"));
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.set_codec_spec("unrotate | int8"); }).message(),
              HasSubstr("namespace does not say"));
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.clear_items(); }).message(), HasSubstr("items"));
  EXPECT_THAT(status_after([](wire::Reserve& r) { r.set_group(70000); }).message(), HasSubstr("group"));
  const auto item_after = [&](auto change) {
    auto request = ServiceFixture::reserve_request(id, 7, 1);
    change(*request.mutable_reserve()->mutable_items(0));
    return service.ask(session->id(), request)->reserved().items(0);
  };
  EXPECT_EQ(item_after([](wire::ReserveItem& i) { i.set_block_hashes(block_hashes(7, 0, 5)); }).outcome(),
            wire::REFUSED);
  EXPECT_EQ(item_after([](wire::ReserveItem& i) { i.set_block_hashes("abc"); }).outcome(), wire::REFUSED);
  EXPECT_EQ(item_after([](wire::ReserveItem& i) { i.set_position(3); }).outcome(), wire::REFUSED);
  expect_nothing_held();
}

TEST_F(HotServiceTest, AChainLearnsFromTheNamespaceHowKeysTurn) {
  auto facts = testing::model_facts();
  facts["rotation"] = "style=neox,theta=10000,dim=8";
  const NamespaceId turning = service.register_model(*session, facts);
  auto request = ServiceFixture::reserve_request(turning, 7, 1);
  request.mutable_reserve()->set_codec_spec("unrotate | int8 | zstd");
  const auto item = service.ask(session->id(), request)->reserved().items(0);
  ASSERT_EQ(item.outcome(), wire::RESERVED) << item.reason();
  const std::string& spec = session->find_reservation(item.reservation_id())->info.codec_spec;
  EXPECT_EQ(spec, "unrotate(style=neox,theta=10000,dim=8) | int8(group=64,version=1) | zstd(level=3)");
  EXPECT_EQ(codec_label(spec), "unrotate | int8 | zstd");
}

TEST_F(HotServiceTest, OpaqueBytesAreKeptRawWhateverTheNamespacePrefers) {
  auto request = ServiceFixture::reserve_request(id, 7, 1);
  request.mutable_reserve()->mutable_shard()->set_dtype(static_cast<std::uint32_t>(DType::kOpaqueBytes));
  request.mutable_reserve()->mutable_shard()->set_key_dim(24);
  const auto item = service.ask(session->id(), request)->reserved().items(0);
  ASSERT_EQ(item.outcome(), wire::RESERVED) << item.reason();
  EXPECT_EQ(session->find_reservation(item.reservation_id())->info.codec_spec, "raw");
}

TEST_F(HotServiceTest, AFalseAlarmQuarantinesNothingAndARealOneDoes) {
  service.store_chunks(*session, id, 7, 1);
  const auto report_corrupt = [&](std::uint64_t lease) {
    wire::HotRequest request;
    request.mutable_release()->add_corrupt_lease_ids(lease);
    service.ask(session->id(), request);
    service.executor.run_all();
  };
  auto fetched = service.fetch(session->id(), id, block_hash(7, 0))->fetched().items(0);
  report_corrupt(fetched.lease_id());
  EXPECT_EQ(service.store.stats().quarantined_chunks, 0U);

  fetched = service.fetch(session->id(), id, block_hash(7, 0))->fetched().items(0);
  const auto& where = fetched.shards(0);
  service.slab_memory.bytes()[where.offset() + where.bytes() - 1] ^= std::byte{1};
  report_corrupt(fetched.lease_id());
  EXPECT_EQ(service.store.stats().quarantined_chunks, 1U);
  EXPECT_EQ(to_status(service.fetch(session->id(), id, block_hash(7, 0))->fetched().items(0).status()).code(),
            Code::kNotFound);
  expect_nothing_held();
}

TEST_F(HotServiceTest, AFullTierMakesRoomAndHeldChunksStay) {
  ServiceFixture small(64U << 10);
  const auto writer = small.open_worker();
  const NamespaceId space = small.register_model(*writer);
  small.store_chunks(*writer, space, 1, 1);
  const auto held = small.fetch(writer->id(), space, block_hash(1, 0))->fetched().items(0);
  ASSERT_TRUE(to_status(held.status()));
  for (std::uint64_t prompt = 2; prompt < 100; ++prompt) {
    for (const Status& status : small.store_chunks(*writer, space, prompt, 1))
      EXPECT_TRUE(status) << status.to_string();
  }
  EXPECT_GT(small.store.stats().evicted_chunks, 0U);
  EXPECT_TRUE(to_status(small.fetch(writer->id(), space, block_hash(1, 0))->fetched().items(0).status()));
  EXPECT_EQ(to_status(small.fetch(writer->id(), space, block_hash(2, 0))->fetched().items(0).status()).code(),
            Code::kNotFound);
}

TEST_F(HotServiceTest, WhatIsNotReservedYetIsNotWritten) {
  service.usable_bytes = 0;
  for (const Status& status : service.store_chunks(*session, id, 7, 1)) EXPECT_EQ(status.code(), Code::kBusy);
  EXPECT_EQ(service.store.stats().used_bytes, 0U);
  expect_nothing_held();
  service.usable_bytes = testing::kSlabBytes;
  for (const Status& status : service.store_chunks(*session, id, 7, 1)) EXPECT_TRUE(status);
}

TEST_F(HotServiceTest, AStoppingDaemonFinishesWhatWasCommitted) {
  const auto item = reserve_one(7);
  wire::HotRequest commit;
  *commit.mutable_commit()->add_items() = ServiceFixture::write(*session, item.reservation_id(), 7);
  service.hot.begin_stop();
  std::optional<wire::HotReply> reply;
  service.hot.handle(session->id(), commit, [&](wire::HotReply answer) { reply = std::move(answer); });
  service.executor.run_all();
  EXPECT_TRUE(to_status(reply->committed().items(0)));
  const auto refused = service.ask(session->id(), ServiceFixture::reserve_request(id, 8, 1));
  EXPECT_EQ(to_status(refused->status()).code(), Code::kUnavailable);
}

TEST_F(HotServiceTest, CancelledStoresEndUnavailableAndHoldNothing) {
  const auto item = reserve_one(7);
  wire::HotRequest commit;
  *commit.mutable_commit()->add_items() = ServiceFixture::write(*session, item.reservation_id(), 7);
  std::optional<wire::HotReply> reply;
  service.hot.handle(session->id(), commit, [&](wire::HotReply answer) { reply = std::move(answer); });
  service.pipeline.cancel();
  EXPECT_FALSE(service.pipeline.wait_idle(std::chrono::milliseconds(0)));
  service.executor.run_all();
  EXPECT_TRUE(service.pipeline.wait_idle(std::chrono::milliseconds(0)));
  EXPECT_EQ(to_status(reply->committed().items(0)).code(), Code::kUnavailable);
  expect_nothing_held();
}

TEST_F(HotServiceTest, RemoteBytesGoOnlyWhereTheSessionMayWriteAndRead) {
  const auto item = reserve_one(7);
  const std::uint64_t offset = item.extent().offset();
  const std::uint64_t bytes = item.extent().bytes();
  auto& remote = service.remote;
  EXPECT_TRUE(remote.begin_push(session->token(), item.reservation_id(), offset, bytes));
  EXPECT_FALSE(remote.begin_push(session->token(), item.reservation_id(), offset + 1, bytes));
  EXPECT_FALSE(remote.begin_push(session->token(), item.reservation_id(), offset, UINT64_MAX));
  EXPECT_FALSE(remote.begin_push(session->token(), item.reservation_id(), UINT64_MAX, 2));
  EXPECT_FALSE(remote.begin_push(session->token(), 999, offset, bytes));
  EXPECT_FALSE(remote.begin_push(std::string(32, 'x'), item.reservation_id(), offset, bytes));

  wire::HotRequest commit;
  *commit.mutable_commit()->add_items() = ServiceFixture::write(*session, item.reservation_id(), 7);
  // Abandoned while its bytes are on their way: the extent must not be given to the next one before they have arrived.
  wire::HotRequest abandon;
  abandon.mutable_abandon()->add_reservation_ids(item.reservation_id());
  service.ask(session->id(), abandon);
  EXPECT_GT(session->holdings().staging_used_bytes, 0U);
  remote.pushed(session->token(), item.reservation_id(), Status::ok());
  EXPECT_EQ(session->holdings().staging_used_bytes, 0U);

  service.store_chunks(*session, id, 8, 1);
  const auto fetched = service.fetch(session->id(), id, block_hash(8, 0))->fetched().items(0);
  const auto& where = fetched.shards(0);
  EXPECT_TRUE(remote.begin_pull(session->token(), fetched.lease_id(), where.offset(), where.bytes()));
  EXPECT_FALSE(remote.begin_pull(session->token(), fetched.lease_id(), where.offset(), where.bytes() + 1));
  EXPECT_FALSE(remote.begin_pull(session->token(), fetched.lease_id(), where.offset() - 1, 1));
  EXPECT_FALSE(remote.begin_pull(session->token(), fetched.lease_id() + 1, where.offset(), 1));
  // The session ends while the bytes are on their way: they stay until they have left.
  service.sessions.end(session->id(), SessionEnd::kDisconnected);
  EXPECT_EQ(service.store.stats().pinned_chunks, 1U);
  remote.pulled(session->token(), fetched.lease_id(), Status::ok());
  EXPECT_EQ(service.store.stats().pinned_chunks, 0U);
}

TEST_F(HotServiceTest, ReportsBecomeMetricsWithoutLabelsOfTheClientsChoice) {
  wire::HotRequest request;
  auto* report = request.mutable_report();
  report->set_requested_tokens(100);
  report->set_hit_tokens(60);
  report->set_codec_spec("int8(group=32)\n} evil{");
  report->add_load_seconds(0.25);
  report->add_load_seconds(-1);
  report->add_load_seconds(std::numeric_limits<double>::quiet_NaN());
  EXPECT_TRUE(to_status(service.ask(session->id(), request)->status()));
  EXPECT_EQ(service.metrics.hit_tokens.Value(), 60);
  EXPECT_EQ(service.metrics.requested_tokens.Value(), 100);
  EXPECT_EQ(service.metrics.codec("unknown").decode_seconds.Collect().histogram.sample_count, 1U);
}

TEST_F(HotServiceTest, LoadsAreCountedUnderTheCodecOfTheirChunks) {
  const auto load = [&](std::string_view spec) {
    wire::HotRequest request;
    request.mutable_report()->set_codec_spec(std::string(spec));
    request.mutable_report()->add_load_seconds(0.25);
    EXPECT_TRUE(to_status(service.ask(session->id(), request)->status()));
  };
  load("int8(group=64)");
  load("int8(group=128)");
  load("mixed");
  EXPECT_EQ(service.metrics.codec("int8").decode_seconds.Collect().histogram.sample_count, 2U);
  EXPECT_EQ(service.metrics.codec("mixed").decode_seconds.Collect().histogram.sample_count, 1U);
}

}  // namespace
}  // namespace kvern
