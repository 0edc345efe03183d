#include "service/control_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/service/service_fixture.h"

namespace kvern {
namespace {

using testing::block_hash;
using ::testing::HasSubstr;
using testing::kBlockTokens;
using testing::kHashBytes;
using testing::ServiceFixture;

struct ControlServiceTest : ::testing::Test {
  ServiceFixture service;
  ServiceConfig config;
  EventLog events;
  ManualExecutor administration;
  Inspector inspector{{.config = config,
                       .sessions = service.sessions,
                       .namespaces = service.namespaces,
                       .store = service.store,
                       .tiers = service.tiers,
                       .pipeline = service.pipeline,
                       .encoders = nullptr,
                       .in_flight = service.in_flight,
                       .events = events,
                       .clock = service.clock,
                       .epoch = 7,
                       .started_ns = 0}};
  ManualExecutor compactors;
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("kvern-control-" + std::to_string(::getpid()) + "-" +
                                                ::testing::UnitTest::GetInstance()->current_test_info()->name());
  Compactions compactions{{.store = service.store,
                           .tiers = service.tiers,
                           .pipeline = service.pipeline,
                           .in_flight = service.in_flight,
                           .metrics = service.metrics,
                           .clock = service.clock,
                           .unix_seconds = [] { return std::int64_t{1'800'000'000}; },
                           .executor = compactors},
                          {},
                          folder};
  const ControlService::UcxEndpoint ucx{.version = "1.13.1", .host = "", .port = 4711};
  ControlService control{{.config = config,
                          .epoch = 7,
                          .ucx = ucx,
                          .tenants = {{"good key", "team"}, {"tenant's key", "another"}},
                          .admins = {"good key"},
                          .slab_fd = -1,
                          .index_fd = -1,
                          .slab_bytes = 0,
                          .index_bytes = 0,
                          .sessions = service.sessions,
                          .namespaces = service.namespaces,
                          .store = service.store,
                          .tiers = service.tiers,
                          .events = events,
                          .inspector = inspector,
                          .hot = service.hot,
                          .administration = administration,
                          .metrics = service.metrics,
                          .compactions = &compactions}};
  const ControlPeer local{.local = true, .public_key = ""};
  const ControlPeer remote{.local = false, .public_key = "good key"};
  std::uint64_t sequence = 0;

  ~ControlServiceTest() override { std::filesystem::remove_all(folder); }

  void SetUp() override {
    config.server.socket = "/run/kvern/kvernd.sock";
    service.store.set_removal_listener(
        [this](const ChunkKey& key, std::span<const BlockHash> blocks, std::string_view reason) {
          events.add({.key = key,
                      .blocks = {blocks.begin(), blocks.end()},
                      .reason = std::string(reason),
                      .time_ns = service.clock.now_ns()});
        });
  }

  wire::ControlReply ask(const ControlPeer& peer, wire::ControlRequest request) {
    if (request.sequence() == 0) request.set_sequence(++sequence);
    const std::uint64_t asked = request.sequence();
    std::optional<wire::ControlReply> reply;
    control.handle(peer, std::move(request), [&](wire::ControlReply answer) { reply = std::move(answer); });
    administration.run_all();
    EXPECT_TRUE(reply) << "no answer";
    EXPECT_EQ(reply->sequence(), asked);
    return *reply;
  }
  static wire::ControlRequest hello(wire::Role role) {
    wire::ControlRequest request;
    auto* hello = request.mutable_hello();
    hello->mutable_versions()->set_protocol(kProtocolVersion);
    hello->mutable_versions()->set_container(kContainerVersion);
    hello->mutable_versions()->set_ucx("1.13.1");
    hello->set_role(role);
    hello->set_staging_bytes(8192);
    return request;
  }
  wire::ControlRequest with_token(const std::string& token) const {
    wire::ControlRequest request;
    request.set_session_token(token);
    return request;
  }
  std::string open(const ControlPeer& peer, wire::Role role) {
    const auto reply = ask(peer, hello(role));
    EXPECT_TRUE(to_status(reply.status())) << reply.status().message();
    return reply.welcome().session_token();
  }
  NamespaceId register_model(const ControlPeer& peer, const std::string& token) {
    auto request = with_token(token);
    for (const auto& [name, value] : testing::model_facts()) {
      auto* field = request.mutable_register_namespace()->add_fields();
      field->set_name(name);
      field->set_value(value);
    }
    const auto reply = ask(peer, request);
    EXPECT_TRUE(to_status(reply.status())) << reply.status().message();
    NamespaceId id;
    std::memcpy(id.bytes.data(), reply.namespace_registered().namespace_id().data(), id.bytes.size());
    return id;
  }
};

TEST_F(ControlServiceTest, LocalClientsGetSharedMemoryAndRemoteOnesUcx) {
  const auto here = ask(local, hello(wire::ROLE_WORKER)).welcome();
  EXPECT_EQ(here.admission_path(), "/run/kvern/kvernd.sock.fds");
  EXPECT_EQ(here.ucx_port(), 0U);
  EXPECT_EQ(here.epoch(), 7U);
  const auto there = ask(remote, hello(wire::ROLE_WORKER)).welcome();
  EXPECT_EQ(there.admission_path(), "");
  EXPECT_EQ(there.ucx_port(), 4711U);
}

TEST_F(ControlServiceTest, StagingThatAClientPushesIntoIsAllocatedElsewhere) {
  auto request = hello(wire::ROLE_WORKER);
  request.set_sequence(++sequence);
  std::optional<wire::ControlReply> reply;
  control.handle(remote, request, [&](wire::ControlReply answer) { reply = std::move(answer); });
  EXPECT_FALSE(reply);
  EXPECT_TRUE(service.sessions.list().empty());
  administration.run_all();
  ASSERT_TRUE(reply);
  EXPECT_EQ(reply->welcome().staging_bytes(), 8192U);
  EXPECT_EQ(reply->sequence(), sequence);
}

TEST_F(ControlServiceTest, OtherVersionsAreRefusedInASentenceThatNamesBoth) {
  auto request = hello(wire::ROLE_WORKER);
  request.mutable_hello()->mutable_versions()->set_protocol(99);
  EXPECT_THAT(ask(local, request).status().message(), HasSubstr("protocol 99, this daemon 1"));
  request = hello(wire::ROLE_WORKER);
  request.mutable_hello()->mutable_versions()->set_container(99);
  EXPECT_THAT(ask(local, request).status().message(),
              HasSubstr("version 99, this daemon reads up to " + std::to_string(kContainerVersion)));
  request = hello(wire::ROLE_WORKER);
  request.mutable_hello()->mutable_versions()->set_ucx("1.22.0");
  EXPECT_THAT(ask(remote, request).status().message(), HasSubstr("UCX 1.22.0, this daemon 1.13.1"));
  EXPECT_TRUE(to_status(ask(local, request).status())) << "UCX does not matter on this host";
  EXPECT_EQ(service.sessions.list().size(), 1U);
}

TEST_F(ControlServiceTest, ADataPlaneThatCannotBeIsRefusedAndNeverReplaced) {
  auto request = hello(wire::ROLE_WORKER);
  request.mutable_hello()->set_data_plane(wire::DATA_PLANE_SHM);
  EXPECT_EQ(to_status(ask(remote, request).status()).code(), Code::kRefused);
  config.server.data_plane = "ucx";
  EXPECT_THAT(ask(local, request).status().message(), HasSubstr("data_plane"));
  config.server.data_plane = "shm";
  request.mutable_hello()->set_data_plane(wire::DATA_PLANE_UCX);
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kRefused);
}

TEST_F(ControlServiceTest, TheTenantComesFromTheKey) {
  const std::string mine = open(remote, wire::ROLE_WORKER);
  const std::string locals = open(local, wire::ROLE_WORKER);
  EXPECT_NE(register_model(remote, mine), register_model(local, locals));
  EXPECT_EQ(service.sessions.authenticate(mine).value()->identity().tenant, "team");
}

TEST_F(ControlServiceTest, ATokenIsOfNoUseElsewhereOrTwice) {
  const std::string token = open(local, wire::ROLE_WORKER);
  auto request = with_token(token);
  request.mutable_heartbeat();
  EXPECT_EQ(to_status(ask(remote, request).status()).code(), Code::kRefused);
  EXPECT_TRUE(to_status(ask(local, request).status()));
  request.set_sequence(sequence);  // repeated
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kInvalid);
  request.set_sequence(0);
  request.set_session_token("guessed");
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kExpired);
  request.clear_body();
  request.set_session_token(token);
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kInvalid);
}

TEST_F(ControlServiceTest, ATokenIsOfNoUseWithAnotherKey) {
  auto request = with_token(open(remote, wire::ROLE_WORKER));
  request.mutable_heartbeat();
  const ControlPeer other{.local = false, .public_key = "tenant's key"};
  EXPECT_EQ(to_status(ask(other, request).status()).code(), Code::kRefused);
  EXPECT_TRUE(to_status(ask(remote, request).status()));
}

TEST_F(ControlServiceTest, GoodbyeEndsTheSession) {
  const std::string token = open(local, wire::ROLE_SCHEDULER);
  auto request = with_token(token);
  request.mutable_goodbye();
  EXPECT_TRUE(to_status(ask(local, request).status()));
  EXPECT_TRUE(service.sessions.list().empty());
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kExpired);
}

TEST_F(ControlServiceTest, HotMessagesTravelInsideControlMessages) {
  const std::string token = open(remote, wire::ROLE_WORKER);
  const NamespaceId id = register_model(remote, token);
  auto request = with_token(token);
  *request.mutable_hot() = ServiceFixture::reserve_request(id, 1, 2);
  request.mutable_hot()->set_id(55);
  const auto reply = ask(remote, request);
  EXPECT_EQ(reply.hot().id(), 55U);
  ASSERT_EQ(reply.hot().reserved().items_size(), 2);
  EXPECT_EQ(reply.hot().reserved().items(0).outcome(), wire::RESERVED);
}

TEST_F(ControlServiceTest, StatusIsOneJsonObject) {
  const std::string token = open(local, wire::ROLE_TOOL);
  auto named = hello(wire::ROLE_SCHEDULER);
  named.mutable_hello()->set_client_name("engine \x1b[31m\xff");
  (*named.mutable_hello()->mutable_attributes())["vllm"] = "0.32.0";
  ask(local, named);
  auto request = with_token(token);
  request.mutable_status();
  const auto reply = ask(local, request);
  const auto report = nlohmann::json::parse(reply.status_report().json());
  EXPECT_EQ(report.at("store").at("capacity_bytes"), testing::kSlabBytes);
  EXPECT_EQ(report.at("state"), "running");
  ASSERT_EQ(report.at("sessions").size(), 2U);
  EXPECT_EQ(report.at("sessions").at(1).at("client_name"), "engine ?[31m?");
  EXPECT_EQ(report.at("sessions").at(1).at("attributes").at("vllm"), "0.32.0");
}

TEST_F(ControlServiceTest, HeartbeatsTellWhatAClientHasLearntSince) {
  const std::string tool = open(local, wire::ROLE_TOOL);
  auto named = hello(wire::ROLE_WORKER);
  auto& first = *named.mutable_hello()->mutable_attributes();
  first["vllm"] = "0.32.0";
  first["layer_budgets"] = "not known";
  auto beat = with_token(ask(local, named).welcome().session_token());
  auto& told = *beat.mutable_heartbeat()->mutable_attributes();
  told["layer_budgets"] = "self-test passed\n";
  EXPECT_TRUE(to_status(ask(local, beat).status()));
  for (int i = 0; i < 100; ++i) told["flood" + std::to_string(i)] = std::string(10'000, 'x');
  EXPECT_TRUE(to_status(ask(local, beat).status()));
  auto request = with_token(tool);
  request.mutable_status();
  const auto report = nlohmann::json::parse(ask(local, request).status_report().json());
  const auto& attributes = report.at("sessions").at(1).at("attributes");
  EXPECT_EQ(attributes.at("vllm"), "0.32.0");
  EXPECT_EQ(attributes.at("layer_budgets"), "self-test passed?");
  EXPECT_EQ(attributes.size(), Session::kMaxAttributes);
  for (const auto& [name, value] : attributes.items()) EXPECT_LE(value.get<std::string>().size(), 256U) << name;
}

TEST_F(ControlServiceTest, AdministrationIsForThisHostAndForToolsWithAnAdministratorsKey) {
  const ControlPeer keyless{.local = false, .public_key = ""};
  const ControlPeer tenant{.local = false, .public_key = "tenant's key"};
  for (const auto& [peer, role, allowed] :
       {std::tuple(local, wire::ROLE_TOOL, true), std::tuple(remote, wire::ROLE_TOOL, true),
        std::tuple(keyless, wire::ROLE_TOOL, false), std::tuple(tenant, wire::ROLE_TOOL, false),
        std::tuple(remote, wire::ROLE_WORKER, false)}) {
    auto request = with_token(open(peer, role));
    request.mutable_flush();
    EXPECT_EQ(to_status(ask(peer, request).status()).is_ok(), allowed);
  }
}

TEST_F(ControlServiceTest, RemovalsAndSnapshotsTellWhatIsThere) {
  const std::string token = open(remote, wire::ROLE_WORKER);
  const NamespaceId id = register_model(remote, token);
  const auto session = service.sessions.authenticate(token).value();
  service.store_chunks(*session, id, 1, 2);

  auto poll = with_token(token);
  poll.mutable_poll_events()->set_cursor(0);
  const std::uint64_t cursor = ask(remote, poll).events().next_cursor();
  auto snapshot = with_token(token);
  snapshot.mutable_snapshot()->set_namespace_id(id.bytes.data(), id.bytes.size());
  auto chunks = ask(remote, snapshot).snapshot();
  ASSERT_EQ(chunks.chunks_size(), 2);
  EXPECT_FALSE(chunks.truncated());
  EXPECT_EQ(chunks.chunks(0).hash_bytes(), kHashBytes);
  EXPECT_EQ(chunks.chunks(0).block_hashes().size(), 4 * kHashBytes);
  EXPECT_EQ(chunks.chunks(0).codec_spec(), "raw");
  snapshot.mutable_snapshot()->set_limit(1);
  EXPECT_TRUE(ask(remote, snapshot).snapshot().truncated());

  auto flush = with_token(open(local, wire::ROLE_TOOL));
  flush.mutable_flush();
  EXPECT_EQ(ask(local, flush).flushed().chunks(), 2U);
  poll.mutable_poll_events()->set_cursor(cursor);
  const auto seen = ask(remote, poll).events();
  ASSERT_EQ(seen.removed_size(), 2);
  EXPECT_EQ(seen.removed(0).reason(), "flushed");
  EXPECT_FALSE(seen.lost());

  const std::string stranger = open(remote, wire::ROLE_WORKER);
  auto peek = with_token(stranger);
  peek.mutable_poll_events()->set_cursor(cursor);
  EXPECT_EQ(ask(remote, peek).events().removed_size(), 0) << "of a namespace that it has not registered";
  snapshot.set_session_token(stranger);
  EXPECT_EQ(to_status(ask(remote, snapshot).status()).code(), Code::kRefused);
}

TEST_F(ControlServiceTest, AFlushTakesWhatItNames) {
  const std::string token = open(remote, wire::ROLE_WORKER);
  const NamespaceId id = register_model(remote, token);
  const auto session = service.sessions.authenticate(token).value();
  const std::string tenant = session->identity().tenant;
  const std::string tool = open(local, wire::ROLE_TOOL);
  using Answer = std::pair<Code, std::uint64_t>;
  const auto flushed = [&](const std::string& of_namespace, const std::string& of_tenant, const std::string& block) {
    service.store_chunks(*session, id, 1, 2);  // of four blocks each
    auto request = with_token(tool);
    request.mutable_flush()->set_namespace_id(of_namespace);
    request.mutable_flush()->set_tenant(of_tenant);
    request.mutable_flush()->set_block_hash(block);
    const auto reply = ask(local, request);
    return Answer(to_status(reply.status()).code(), reply.flushed().chunks());
  };
  const std::string one(reinterpret_cast<const char*>(id.bytes.data()), id.bytes.size());
  const std::string other(16, 'x');
  EXPECT_EQ(flushed("", tenant, ""), Answer(Code::kOk, 2));
  EXPECT_EQ(flushed("", tenant + "x", ""), Answer(Code::kOk, 0));
  EXPECT_EQ(flushed(one, "", ""), Answer(Code::kOk, 2));
  EXPECT_EQ(flushed(other, "", ""), Answer(Code::kOk, 0));
  EXPECT_EQ(flushed("", "", block_hash(1, 1)), Answer(Code::kOk, 2)) << "what continues the block goes, too";
  EXPECT_EQ(flushed(one, "", block_hash(1, 5)), Answer(Code::kOk, 1));
  EXPECT_EQ(flushed("", tenant, block_hash(9, 1)), Answer(Code::kNotFound, 0));
  EXPECT_EQ(flushed(one, tenant, ""), Answer(Code::kInvalid, 0));
  EXPECT_EQ(flushed("short", "", ""), Answer(Code::kInvalid, 0));
}

TEST_F(ControlServiceTest, ExplanationsSayWhereABlockIsOrWhyItIsNot) {
  const std::string token = open(remote, wire::ROLE_WORKER);
  const NamespaceId id = register_model(remote, token);
  service.store_chunks(*service.sessions.authenticate(token).value(), id, 1, 1);
  auto explain = with_token(open(local, wire::ROLE_TOOL));
  explain.mutable_explain()->set_block_hash(block_hash(1, 2));
  auto answer = ask(local, explain).explanation();
  ASSERT_EQ(answer.lines_size(), 1);
  EXPECT_THAT(answer.lines(0), HasSubstr("model tiny"));
  EXPECT_THAT(answer.lines(0), HasSubstr("codec raw"));

  service.store.flush(NamespaceSet::all());
  answer = ask(local, explain).explanation();
  EXPECT_THAT(answer.lines(answer.lines_size() - 1), HasSubstr("flushed"));
  explain.mutable_explain()->set_block_hash(block_hash(9, 9));
  answer = ask(local, explain).explanation();
  EXPECT_THAT(answer.lines(answer.lines_size() - 1), HasSubstr("never stored"));
}

TEST_F(ControlServiceTest, ARefusedNamespaceIsRefusedInASentence) {
  auto request = with_token(open(local, wire::ROLE_WORKER));
  auto* field = request.mutable_register_namespace()->add_fields();
  field->set_name("model");
  field->set_value("m");
  const auto reply = ask(local, request);
  EXPECT_EQ(to_status(reply.status()).code(), Code::kRefused);
  EXPECT_THAT(reply.status().message(), HasSubstr("missing"));
}

/// For the small model, with a method that needs neither queries nor (since all is kept) the model's rotation.
wire::Compact compact_request(const NamespaceId& id) {
  wire::Compact compact;
  compact.set_handle("kvc1.41.41.1800000100." + std::string(64, 'a'));
  compact.set_namespace_id(id.bytes.data(), id.bytes.size());
  compact.set_spec("streaming(budget=100%)");
  compact.set_hash_bytes(kHashBytes);
  compact.set_group_layers(2);
  compact.set_model_heads(2);
  compact.mutable_shard()->set_dtype(static_cast<std::uint32_t>(DType::kBFloat16));
  compact.mutable_shard()->set_layers(2);
  compact.mutable_shard()->set_heads(2);
  compact.mutable_shard()->set_key_dim(8);
  compact.mutable_shard()->set_value_dim(8);
  return compact;
}

TEST_F(ControlServiceTest, CompactCachesBelongToTheTenantThatAskedForThem) {
  const auto mine = open(local, wire::ROLE_WORKER);
  const auto theirs = open(remote, wire::ROLE_WORKER);
  const auto id = register_model(local, mine);
  auto request = with_token(theirs);
  *request.mutable_compact() = compact_request(id);
  EXPECT_THAT(ask(remote, request).status().message(), HasSubstr("has not registered"));
  request = with_token(mine);
  *request.mutable_compact() = compact_request(id);
  EXPECT_TRUE(to_status(ask(local, request).status()));
  const std::string handle = request.compact().handle();

  const auto asks = [&](const ControlPeer& peer, const std::string& token, const std::string& of) {
    auto query = with_token(token);
    query.mutable_compaction()->set_handle(of);
    return ask(peer, query);
  };
  EXPECT_EQ(asks(local, mine, handle).compactions().items(0).state(), wire::COMPACTION_PENDING);
  EXPECT_EQ(asks(local, mine, "").compactions().items_size(), 1);
  EXPECT_EQ(to_status(asks(remote, theirs, handle).status()).code(), Code::kNotFound);
  EXPECT_EQ(asks(remote, theirs, "").compactions().items_size(), 0);
  EXPECT_EQ(asks(local, open(local, wire::ROLE_TOOL), "").compactions().items_size(), 1);
  EXPECT_EQ(asks(remote, open(remote, wire::ROLE_TOOL), "").compactions().items_size(), 0);
  auto removal = with_token(theirs);
  removal.mutable_delete_compaction()->set_handle(handle);
  EXPECT_EQ(to_status(ask(remote, removal).status()).code(), Code::kNotFound);
  removal.set_session_token(mine);
  EXPECT_TRUE(to_status(ask(local, removal).status()));
  EXPECT_EQ(asks(local, mine, "").compactions().items_size(), 0);
}

TEST_F(ControlServiceTest, SlotsOfLayersAreReadFromAStoredChunkByThoseWhoHaveItsNamespace) {
  const auto mine = open(local, wire::ROLE_SCHEDULER);
  const auto theirs = open(remote, wire::ROLE_SCHEDULER);
  const auto id = register_model(local, mine);
  Reservation reservation;
  reservation.codec = make_codec("raw").value();
  ContainerInfo& info = reservation.info;
  info.shape = testing::model_shape(kBlockTokens);
  info.block_tokens = kBlockTokens;
  info.group_layers = info.model_heads = 2;
  info.layer_slots = {kBlockTokens, 3 * kBlockTokens};
  const auto block = [](std::uint64_t number) {
    const std::string bytes = block_hash(1, number);
    return *BlockHash::from_bytes({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()});
  };
  info.block_hashes = {block(0)};
  info.key = {id, 0, info.block_hashes.back()};
  info.codec_spec = "raw";
  const std::vector<std::byte> rows(info.shape.raw_bytes());
  ASSERT_TRUE(service.pipeline.store(reservation, [&](std::span<std::byte> out) {
    return encode_container(*reservation.codec, info, rows, {}, out);
  }));

  const auto asks = [&](const ControlPeer& peer, const std::string& token, const BlockHash& of, std::uint32_t group) {
    auto request = with_token(token);
    auto* query = request.mutable_layer_slots();
    query->set_namespace_id(id.bytes.data(), id.bytes.size());
    query->set_group(group);
    query->set_block_hash(of.bytes().data(), of.size());
    return ask(peer, request);
  };
  const auto found = asks(local, mine, info.key.last_block, 0);
  EXPECT_THAT(found.layer_slots().slots(), ::testing::ElementsAreArray(info.layer_slots));
  EXPECT_EQ(to_status(asks(local, mine, block(1), 0).status()).code(), Code::kNotFound);
  EXPECT_EQ(to_status(asks(local, mine, BlockHash(), 0).status()).code(), Code::kInvalid);
  EXPECT_EQ(to_status(asks(local, mine, info.key.last_block, 1U << 16).status()).code(), Code::kInvalid);
  EXPECT_THAT(asks(remote, theirs, info.key.last_block, 0).status().message(), HasSubstr("has not registered"));
  EXPECT_EQ(service.store.stats().pinned_chunks, 0U);
}

TEST_F(ControlServiceTest, MessagesOfCompactCachesThatAreEmptyOrWrongAreRefused) {
  const auto token = open(local, wire::ROLE_WORKER);
  const auto id = register_model(local, token);
  auto request = with_token(token);
  request.mutable_compact();
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kInvalid);
  *request.mutable_compact() = compact_request(id);
  request.mutable_compact()->set_namespace_id("short");
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kInvalid);
  *request.mutable_compact() = compact_request(id);
  request.mutable_compact()->set_spec(std::string(1 << 19, '('));
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kInvalid);
  request.mutable_compact_queries()->set_data(std::string(1 << 19, 'x'));
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kNotFound);
  request.mutable_compaction()->set_handle(std::string(1 << 19, 'x'));
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kNotFound);
  request.mutable_delete_compaction();
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kNotFound);
  control.begin_stop();
  *request.mutable_compact() = compact_request(id);
  EXPECT_EQ(to_status(ask(local, request).status()).code(), Code::kUnavailable);
}

}  // namespace
}  // namespace kvern
