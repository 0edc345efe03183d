#include "service/compactions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "store/lease.h"
#include "tests/service/service_fixture.h"

namespace kvern {
namespace {

using testing::as_fields;
using ::testing::HasSubstr;
using testing::kBlockTokens;
using testing::kChunkTokens;
using testing::kHashBytes;
using testing::model_facts;
using testing::ServiceFixture;

constexpr std::uint32_t kTokens = 41;  // two chunks of 16 and a block of 1 token
constexpr std::int64_t kNow = 1'800'000'000;

/// The table with an executor that runs when it is stepped, over a small model of 2 layers and 2 heads.
struct CompactionsTest : ::testing::Test {
  CompactionsTest() { start(); }
  ~CompactionsTest() override {
    table.reset();
    std::filesystem::remove_all(folder);
  }

  void start() { start(executor); }
  void start(Executor& makers) {
    table.reset();
    table = std::make_unique<Compactions>(Compactions::Parts{.store = service.store,
                                                             .tiers = service.tiers,
                                                             .pipeline = service.pipeline,
                                                             .in_flight = service.in_flight,
                                                             .metrics = service.metrics,
                                                             .clock = service.clock,
                                                             .unix_seconds = [this] { return now; },
                                                             .executor = makers,
                                                             .helpers = &helpers,
                                                             .measurers = measurers},
                                          limits, folder);
  }

  CompactHandle handle(const std::string& spec = "streaming(budget=9)", std::int64_t seconds = 100) {
    char digits[65];
    std::snprintf(digits, sizeof digits, "%064x", ++handles);
    const auto plan = CompactionPlan::make(spec, kTokens).value();
    return CompactHandle::parse("kvc1." + std::to_string(kTokens) + "." + std::to_string(plan.slots) + "." +
                                std::to_string(now + seconds) + "." + digits)
        .value();
  }
  wire::Compact request(const CompactHandle& of, const std::string& spec = "streaming(budget=9)") {
    wire::Compact request;
    request.set_handle(of.text);
    request.set_namespace_id(space->id.bytes.data(), space->id.bytes.size());
    request.set_spec(spec);
    request.set_hash_bytes(kHashBytes);
    request.set_group_layers(2);
    request.set_model_heads(2);
    auto* shard = request.mutable_shard();
    shard->set_dtype(static_cast<std::uint32_t>(DType::kBFloat16));
    shard->set_layers(2);
    shard->set_heads(2);
    shard->set_key_dim(8);
    shard->set_value_dim(8);
    request.set_query_rows(CompactionPlan::make(spec, kTokens).value().query_rows);
    request.set_query_heads(4);
    return request;
  }
  Status begin(const wire::Compact& asked) { return table->begin(asker, space, asked); }
  /// The prompt's chunks, as a worker stores them.
  void store_prompt(const CompactHandle& of) {
    const auto hashes = of.source_hashes(kBlockTokens, kHashBytes);
    for (std::size_t block = 0; block < hashes.size(); block += kChunkTokens / kBlockTokens) {
      const std::size_t blocks = std::min<std::size_t>(kChunkTokens / kBlockTokens, hashes.size() - block);
      Reservation reservation;
      reservation.codec = make_codec("raw").value();
      ContainerInfo& info = reservation.info;
      info.shape = testing::model_shape(static_cast<std::uint32_t>(blocks) * kBlockTokens);
      info.block_tokens = kBlockTokens;
      info.group_layers = info.model_heads = 2;
      info.position = block * kBlockTokens;
      info.block_hashes.assign(hashes.begin() + static_cast<std::ptrdiff_t>(block),
                               hashes.begin() + static_cast<std::ptrdiff_t>(block + blocks));
      info.key = {space->id, 0, info.block_hashes.back()};
      info.codec_spec = "raw";
      std::vector<std::byte> rows(info.shape.raw_bytes());
      testing::fill(rows, block);
      ASSERT_TRUE(service.pipeline.store(reservation, [&](std::span<std::byte> out) {
        return encode_container(*reservation.codec, info, rows, {}, out);
      }));
    }
  }
  wire::CompactionReport find(const CompactHandle& of, std::uint64_t wait_ms = 0) {
    wire::CompactionQuery query;
    query.set_handle(of.text);
    query.set_wait_ms(wait_ms);
    wire::CompactionReport report;
    report.set_reason("no answer yet");
    table->find(asker, query, [&](const Result<std::vector<wire::CompactionReport>>& reports) {
      if (reports) report = reports->at(0);
      if (!reports) report.set_reason("unknown");
    });
    return report;
  }
  std::uint64_t chunks() const { return service.store.stats().chunks + service.lower->objects.size(); }

  ServiceFixture service;
  ManualExecutor executor;
  ThreadPool helpers{"helpers", 2, 64};
  Executor* measurers = nullptr;
  CompactionLimits limits{.max_pending = 3, .job_bytes = 1U << 20, .max_handles = 5, .max_ttl_seconds = 1000};
  std::int64_t now = kNow;
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("kvern-compactions-" + std::to_string(::getpid()) + "-" +
                                                ::testing::UnitTest::GetInstance()->current_test_info()->name());
  std::shared_ptr<const Namespace> space = service.namespaces
                                               .add(as_fields([] {
                                                      auto facts = model_facts();
                                                      facts["rotation"] = "style=neox,theta=10000,dim=8";
                                                      return facts;
                                                    }()),
                                                    "default")
                                               .value();
  CompactionAsker asker{.session = 1, .tenant = "default", .client_name = "test", .sees_all = false};
  std::unique_ptr<Compactions> table;
  unsigned handles = 0;
};

TEST_F(CompactionsTest, AReadyCacheHasItsSlotsInAllTiersAndNothingOfThePrompt) {
  const auto of = handle();
  store_prompt(of);
  ASSERT_EQ(chunks(), 2 * 3U);
  ASSERT_TRUE(begin(request(of)));
  EXPECT_EQ(find(of).state(), wire::COMPACTION_PENDING);
  executor.run_all();
  const auto report = find(of);
  EXPECT_EQ(report.state(), wire::COMPACTION_READY) << report.reason();
  EXPECT_EQ(report.raw_bytes(), kTokens * 2 * 2 * 16 * 2U);
  EXPECT_FALSE(report.has_error_mean());
  EXPECT_EQ(chunks(), 2 * 1U);
  EXPECT_EQ(table->figures().ready, 1U);
  EXPECT_EQ(table->figures().stored_bytes, report.stored_bytes());
}

TEST_F(CompactionsTest, ChunksOfARaggedOneSayWhatItsLayersKeep) {
  const std::string spec = "keydiff(budget=50%,sinks=1,recent=3,allocation=pyramid)";
  const auto plan = CompactionPlan::make(spec, kTokens, SlotLayout::kPool, kBlockTokens).value();
  std::string text = handle(spec).text;
  text.replace(0, text.find(std::to_string(now + 100)), "kvc2.41." + std::to_string(plan.slots) + ".");
  const auto of = CompactHandle::parse(text).value();
  store_prompt(of);
  ASSERT_TRUE(begin(request(of, spec)));
  executor.run_all();
  const auto report = find(of);
  ASSERT_EQ(report.state(), wire::COMPACTION_READY) << report.reason();
  ASSERT_EQ(report.layer_slots_size(), 2);
  EXPECT_GT(report.layer_slots(0), report.layer_slots(1));
  for (const BlockHash& block : of.slot_hashes(kBlockTokens, kHashBytes)) {
    const Lease held(service.store, service.store.pin(space->id, 0, block).value(), space->id, 0, block);
    const auto chunk = ContainerReader::parse(service.store.bytes(held.chunk().shards.front()));
    EXPECT_THAT(chunk->info().layer_slots, ::testing::ElementsAreArray(report.layer_slots()));
  }
}

TEST_F(CompactionsTest, OnesWhoWaitAreToldWhenItIsReadyOrTheirTimeIsOver) {
  const auto of = handle();
  store_prompt(of);
  ASSERT_TRUE(begin(request(of)));
  std::vector<int> states;
  const auto wait = [&](std::uint64_t ms) {
    wire::CompactionQuery query;
    query.set_handle(of.text);
    query.set_wait_ms(ms);
    table->find(asker, query, [&](const auto& reports) { states.push_back(reports->at(0).state()); });
  };
  wait(10);
  wait(1000);
  table->tick();
  EXPECT_TRUE(states.empty());
  service.clock.advance(std::chrono::milliseconds(10));
  table->tick();
  EXPECT_EQ(states, (std::vector<int>{wire::COMPACTION_PENDING}));
  executor.run_all();
  EXPECT_EQ(states, (std::vector<int>{wire::COMPACTION_PENDING, wire::COMPACTION_READY}));
  wait(1000);
  EXPECT_EQ(states.size(), 3U);
}

TEST_F(CompactionsTest, AFailedOneLeavesNothingBehindButItsReason) {
  const auto of = handle();
  store_prompt(of);
  service.store.drop({space->id, 0, of.source_hashes(kBlockTokens, kHashBytes).back()});
  service.lower->objects.erase(ChunkKey{space->id, 0, of.source_hashes(kBlockTokens, kHashBytes).back()}.to_string());
  ASSERT_TRUE(begin(request(of)));
  executor.run_all();
  EXPECT_EQ(find(of).state(), wire::COMPACTION_FAILED);
  EXPECT_THAT(find(of).reason(), HasSubstr("from 32 on are not stored any more"));
  EXPECT_EQ(chunks(), 0U);
}

TEST_F(CompactionsTest, APromptThatLiesInALowerTierComesUpFirst) {
  const auto of = handle();
  store_prompt(of);
  service.store.flush(space->id);
  EXPECT_EQ(service.store.stats().chunks, 0U);
  ASSERT_TRUE(begin(request(of)));
  service.movers.run_all();
  // The verification of what comes up runs on another executor, which a thread has to step meanwhile.
  std::atomic<bool> over{false};
  std::thread mover([&] {
    while (!over) service.movers.run_all();
  });
  executor.run_all();
  over = true;
  mover.join();
  EXPECT_EQ(find(of).state(), wire::COMPACTION_READY) << find(of).reason();
}

TEST_F(CompactionsTest, DeletedAtAnyTimeNothingIsLeft) {
  // Before it is made.
  const auto first = handle();
  store_prompt(first);
  ASSERT_TRUE(begin(request(first)));
  EXPECT_TRUE(table->erase(asker, first.text));
  executor.run_all();
  EXPECT_EQ(chunks(), 0U);
  // When it is ready.
  const auto second = handle();
  store_prompt(second);
  ASSERT_TRUE(begin(request(second)));
  executor.run_all();
  EXPECT_EQ(chunks(), 2U);
  EXPECT_TRUE(table->erase(asker, second.text));
  EXPECT_EQ(chunks(), 0U);
  // While it waits for queries.
  const std::string spec = "snapkv(budget=12,window=4)";
  const auto third = handle(spec);
  store_prompt(third);
  ASSERT_TRUE(begin(request(third, spec)));
  EXPECT_TRUE(table->erase(asker, third.text));
  EXPECT_EQ(chunks(), 0U);
  EXPECT_EQ(table->erase(asker, third.text).code(), Code::kNotFound);
  EXPECT_TRUE(std::filesystem::is_empty(folder));
}

TEST_F(CompactionsTest, ExpiryIsADeletion) {
  const auto of = handle();
  const auto later = handle("streaming(budget=9)", 200);
  for (const auto* each : {&of, &later}) {
    store_prompt(*each);
    ASSERT_TRUE(begin(request(*each)));
  }
  executor.run_all();
  now += 100;
  EXPECT_EQ(find(of).reason(), "unknown");
  table->tick();
  EXPECT_EQ(chunks(), 2U);
  EXPECT_EQ(find(later).state(), wire::COMPACTION_READY);
}

TEST_F(CompactionsTest, WhatIsNotWholeInTimeFails) {
  const std::string spec = "snapkv(budget=12,window=4)";
  const auto of = handle(spec);
  store_prompt(of);
  ASSERT_TRUE(begin(request(of, spec)));
  table->tick();
  EXPECT_EQ(find(of).state(), wire::COMPACTION_PENDING);
  service.clock.advance(std::chrono::nanoseconds(limits.collect_ns));
  table->tick();
  EXPECT_EQ(find(of).state(), wire::COMPACTION_FAILED);
  EXPECT_THAT(find(of).reason(), HasSubstr("in time"));
  EXPECT_EQ(chunks(), 0U);
}

TEST_F(CompactionsTest, QueriesComeInOrderAndOnlyFromTheRankThatAnnouncedThem) {
  const std::string spec = "snapkv(budget=12,window=4)";
  const auto of = handle(spec);
  store_prompt(of);
  ASSERT_TRUE(begin(request(of, spec)));
  constexpr std::size_t kBytes = 2 * 4 * 4 * 8 * 2;
  std::vector<std::byte> rows(kBytes);
  testing::fill(rows, 3);
  const std::string bytes(reinterpret_cast<const char*>(rows.data()), rows.size());
  const auto add = [&](std::uint64_t offset, const std::string& data, std::uint64_t session = 1,
                       std::uint32_t head = 0) {
    wire::CompactQueries queries;
    queries.set_handle(of.text);
    queries.set_head_begin(head);
    queries.set_offset(offset);
    queries.set_data(data);
    return table->add_queries({.session = session, .tenant = "default", .client_name = "", .sees_all = false}, queries)
        .code();
  };
  EXPECT_EQ(add(1, bytes.substr(1)), Code::kInvalid);
  EXPECT_EQ(add(0, ""), Code::kInvalid);
  EXPECT_EQ(add(0, bytes + "x"), Code::kInvalid);
  EXPECT_EQ(add(0, bytes, 2), Code::kNotFound);
  EXPECT_EQ(add(0, bytes, 1, 1), Code::kNotFound);
  EXPECT_EQ(add(0, bytes.substr(0, 100)), Code::kOk);
  EXPECT_EQ(add(0, bytes.substr(0, 100)), Code::kInvalid);
  executor.run_all();
  EXPECT_EQ(find(of).state(), wire::COMPACTION_PENDING);
  EXPECT_EQ(add(100, bytes.substr(100)), Code::kOk);
  EXPECT_EQ(add(kBytes, "x"), Code::kNotFound) << "it is handed over";
  executor.run_all();
  EXPECT_EQ(find(of).state(), wire::COMPACTION_READY) << find(of).reason();
  EXPECT_TRUE(find(of).has_error_max());
}

struct MeasuredCompactionsTest : CompactionsTest {
  /// A handle whose cache is about to be made, with two who wait for it: what they are told goes to `told`.
  CompactHandle make() {
    const std::string spec = "snapkv(budget=12,window=4)";
    const auto of = handle(spec);
    store_prompt(of);
    EXPECT_TRUE(begin(request(of, spec)));
    for (const bool early : {false, true}) {
      wire::CompactionQuery query;
      query.set_handle(of.text);
      query.set_wait_ms(1000);
      query.set_early(early);
      table->find(asker, query, [this, early](const Result<std::vector<wire::CompactionReport>>& reports) {
        told.emplace_back(early, reports->at(0));
        if (early && when_ready) when_ready();
      });
    }
    wire::CompactQueries queries;
    queries.set_handle(of.text);
    queries.set_data(std::string(2 * 4 * 4 * 8 * 2, '\x11'));
    EXPECT_TRUE(table->add_queries(asker, queries));
    return of;
  }

  std::function<void()> when_ready;
  std::vector<std::pair<bool, wire::CompactionReport>> told;
};

TEST_F(MeasuredCompactionsTest, WhoAsksEarlyIsToldBeforeTheErrorIsMeasured) {
  const auto of = make();
  when_ready = [&] {
    EXPECT_EQ(find(of).state(), wire::COMPACTION_READY);
    EXPECT_FALSE(find(of).has_error_mean());
    EXPECT_EQ(chunks(), 2 * 1U) << "nothing of the prompt is found any more";
  };
  executor.run_all();
  ASSERT_EQ(told.size(), 2U);
  EXPECT_TRUE(told[0].first);
  EXPECT_EQ(told[0].second.state(), wire::COMPACTION_READY) << told[0].second.reason();
  EXPECT_FALSE(told[0].second.has_error_mean());
  EXPECT_EQ(told[1].second.state(), wire::COMPACTION_READY);
  EXPECT_TRUE(told[1].second.has_error_mean());
  EXPECT_EQ(service.store.stats().pinned_chunks, 0U);
  start();
  EXPECT_EQ(find(of).error_mean(), told[1].second.error_mean()) << "a restart knows it";
}

TEST_F(MeasuredCompactionsTest, ErrorsAreMeasuredOnThreadsOfTheirOwnWhereThereAre) {
  const auto expected = make();
  executor.run_all();
  ManualExecutor apart;
  measurers = &apart;
  start();
  told.clear();
  make();
  executor.run_all();
  ASSERT_EQ(told.size(), 1U) << "only who asks early";
  EXPECT_GT(service.store.stats().pinned_chunks, 0U) << "what it is measured by";
  std::thread([&] { apart.run_all(); }).join();  // it gives its claim to a processor up
  helpers.drain();
  ASSERT_EQ(told.size(), 2U);
  EXPECT_EQ(told[1].second.error_mean(), find(expected).error_mean());
  EXPECT_EQ(service.store.stats().pinned_chunks, 0U);
}

TEST_F(MeasuredCompactionsTest, DeletedWhileItsErrorIsMeasuredNothingIsLeft) {
  const auto of = make();
  when_ready = [&] { EXPECT_TRUE(table->erase(asker, of.text)); };
  executor.run_all();
  ASSERT_EQ(told.size(), 2U);
  EXPECT_EQ(told[1].second.reason(), "it was deleted");
  EXPECT_EQ(find(of).reason(), "unknown");
  EXPECT_EQ(chunks(), 0U);
  EXPECT_EQ(service.store.stats().pinned_chunks, 0U);
}

TEST_F(CompactionsTest, TenantsSeeTheirOwn) {
  const auto of = handle();
  store_prompt(of);
  ASSERT_TRUE(begin(request(of)));
  asker.tenant = "other";
  EXPECT_EQ(find(of).reason(), "unknown");
  EXPECT_EQ(table->erase(asker, of.text).code(), Code::kNotFound);
  asker.sees_all = true;
  EXPECT_EQ(find(of).state(), wire::COMPACTION_PENDING);
  executor.run_all();
}

TEST_F(CompactionsTest, NoMoreThanTheLimitsAllow) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(begin(request(handle())));
  EXPECT_EQ(begin(request(handle())).code(), Code::kBusy);
  executor.run_all();
  EXPECT_EQ(begin(request(handle("streaming(budget=9)", 1001))).code(), Code::kRefused);
}

TEST_F(CompactionsTest, CachesThatFailedMakeWayAndOthersDoNot) {
  limits.max_handles = 3;
  start();
  const auto failed = handle();
  ASSERT_TRUE(begin(request(failed)));
  executor.run_all();  // there is no prompt
  ASSERT_EQ(find(failed).state(), wire::COMPACTION_FAILED);
  for (int i = 0; i < 3; ++i) {
    const auto good = handle();
    store_prompt(good);
    ASSERT_TRUE(begin(request(good)));
    executor.run_all();
    EXPECT_EQ(find(good).state(), wire::COMPACTION_READY);
  }
  EXPECT_EQ(find(failed).reason(), "unknown");
  const auto full = begin(request(handle()));
  EXPECT_EQ(full.code(), Code::kRefused);
  EXPECT_THAT(full.message(), HasSubstr("compact.max_handles"));
  EXPECT_EQ(table->figures().ready, 3U);
}

/// Takes nothing while it is full.
struct FullExecutor final : Executor {
  bool submit(std::function<void()> task) override { return !full && below.submit(std::move(task)); }
  bool full = true;
  ManualExecutor below;
};

TEST_F(CompactionsTest, WhatFindsNoPlaceInTheQueueIsMadeLater) {
  FullExecutor crowded;
  start(crowded);
  const auto of = handle(), other = handle(), third = handle();
  for (const auto* each : {&of, &other, &third}) {
    store_prompt(*each);
    const Status begun = begin(request(*each));
    ASSERT_TRUE(begun) << begun.to_string();
  }
  EXPECT_TRUE(table->erase(asker, other.text)) << "its chunks go with it";
  table->tick();
  EXPECT_EQ(find(of).state(), wire::COMPACTION_PENDING);
  crowded.full = false;
  table->tick();
  crowded.below.run_all();
  EXPECT_EQ(find(of).state(), wire::COMPACTION_READY);
  EXPECT_EQ(find(third).state(), wire::COMPACTION_READY);
  EXPECT_EQ(chunks(), 4U);
  crowded.full = true;
  const auto last = handle();
  store_prompt(last);
  ASSERT_TRUE(begin(request(last)));
  service.clock.advance(std::chrono::nanoseconds(limits.collect_ns));
  table->tick();
  EXPECT_EQ(find(last).state(), wire::COMPACTION_FAILED);
  EXPECT_EQ(chunks(), 4U);
  start();  // the executor goes
}

TEST_F(CompactionsTest, ARankThatComesAfterTheDeletionBringsNothingBack) {
  const std::string spec = "snapkv(budget=12,window=4)";
  const auto of = handle(spec);
  store_prompt(of);
  auto asked = request(of, spec);
  asked.mutable_shard()->set_heads(1);
  asked.set_query_heads(2);
  ASSERT_TRUE(begin(asked));
  ASSERT_TRUE(table->erase(asker, of.text));
  store_prompt(of);
  asked.mutable_shard()->set_head_begin(1);
  EXPECT_EQ(begin(asked).code(), Code::kRefused);
  EXPECT_EQ(find(of).reason(), "unknown");
  EXPECT_EQ(chunks(), 0U);
}

TEST_F(CompactionsTest, APromptOfTooManyBlocksIsRefusedBeforeTheyAreNamed) {
  auto tiny = std::make_shared<Namespace>(*space);
  tiny->shape.block_tokens = tiny->shape.chunk_tokens = 1;
  const auto of = CompactHandle::parse("kvc1.16777216.1." + std::to_string(now + 100) + "." + std::string(64, 'a'));
  auto asked = request(*of);
  asked.set_spec("nonsense");
  EXPECT_FALSE(table->begin(asker, tiny, asked));
  EXPECT_EQ(table->figures().failed, 0U) << "nothing is kept of it";
}

TEST_F(CompactionsTest, NoMoreMemoryThanAllowed) {
  limits.job_bytes = 3000;
  start();
  EXPECT_THAT(begin(request(handle())).message(), HasSubstr("compact.job_bytes"));
}

TEST_F(CompactionsTest, RequestsThatContradictThemselvesAreRefusedAndTheReasonIsKept) {
  const auto refusal = [&](const std::function<void(wire::Compact&)>& change) {
    auto asked = request(handle());
    change(asked);
    const Status refused = begin(asked);
    if (const auto known = CompactHandle::parse(asked.handle()); known && table->figures().failed > 0) {
      EXPECT_EQ(find(*known).reason(), refused.message());
      EXPECT_TRUE(table->erase(asker, known->text));
    }
    return refused.code();
  };
  EXPECT_EQ(refusal([](auto& r) { r.set_handle("kvc1.41.9.1.x"); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_handle(r.handle() + "0"); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_spec("streaming(budget=10)"); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_spec("int8"); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_spec(std::string(5000, 'x')); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_spec("h2o"); }), Code::kRefused);
  EXPECT_EQ(refusal([](auto& r) { r.set_group(1 << 16); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_hash_bytes(33); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_hash_bytes(0); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_query_rows(4); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_group_layers(3); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.set_model_heads(UINT32_MAX); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.mutable_shard()->set_dtype(99); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.mutable_shard()->set_layer_begin(UINT32_MAX); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.mutable_shard()->set_heads(0); }), Code::kInvalid);
  EXPECT_EQ(refusal([](auto& r) { r.mutable_shard()->set_key_dim(9); }), Code::kInvalid);
  const std::string spec = "snapkv(budget=12,window=4)";
  auto asked = request(handle(spec), spec);
  asked.set_query_heads(3);
  EXPECT_EQ(begin(asked).code(), Code::kInvalid);
  asked.set_query_heads(UINT32_MAX - 1);
  EXPECT_EQ(begin(asked).code(), Code::kInvalid);
  EXPECT_EQ(table->figures().pending, 0U);
}

TEST_F(CompactionsTest, TheChunksOfARefusedOneAreDropped) {
  const std::string spec = "snapkv(budget=12,window=4)";
  const auto of = handle(spec);
  store_prompt(of);
  auto asked = request(of, spec);
  asked.set_query_rows(0);
  EXPECT_THAT(begin(asked).message(), HasSubstr("last 4 queries, of which 0 were captured"));
  EXPECT_EQ(chunks(), 0U);
  EXPECT_EQ(find(of).state(), wire::COMPACTION_FAILED);
  start();
  EXPECT_THAT(find(of).reason(), HasSubstr("of which 0 were captured"));
}

TEST_F(CompactionsTest, AModelThatTellsPositionsOtherwiseIsRefused) {
  space = service.namespaces.add(as_fields(model_facts()), "default").value();
  const auto refused = begin(request(handle()));
  EXPECT_EQ(refused.code(), Code::kRefused);
  EXPECT_THAT(refused.message(), HasSubstr("rotation"));
}

TEST_F(CompactionsTest, ARestartKnowsReadyOnesAndClearsUpAfterTheOthers) {
  const auto ready = handle();
  store_prompt(ready);
  ASSERT_TRUE(begin(request(ready)));
  executor.run_all();
  const auto pending = handle();
  store_prompt(pending);
  ASSERT_TRUE(begin(request(pending)));
  const auto short_lived = handle("streaming(budget=9)", 5);
  store_prompt(short_lived);
  ASSERT_TRUE(begin(request(short_lived)));
  executor.step();
  executor.step();
  const auto never_made = handle();
  store_prompt(never_made);
  ASSERT_TRUE(begin(request(never_made)));
  table->stop();
  executor.run_all();
  now += 5;
  start();
  EXPECT_EQ(find(ready).state(), wire::COMPACTION_READY);
  EXPECT_EQ(find(pending).state(), wire::COMPACTION_READY);
  EXPECT_EQ(find(short_lived).reason(), "unknown");
  EXPECT_EQ(find(never_made).state(), wire::COMPACTION_FAILED);
  EXPECT_THAT(find(never_made).reason(), HasSubstr("restarted"));
  EXPECT_EQ(chunks(), 2 * 2U);
}

TEST_F(CompactionsTest, DamagedManifestsAreRemovedAndHarmNobody) {
  const auto ready = handle();
  store_prompt(ready);
  ASSERT_TRUE(begin(request(ready)));
  executor.run_all();
  const auto file = folder / (ready.digits + ".kvc");
  std::string bytes;
  {
    std::ifstream in(file, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(in), {});
  }
  ASSERT_FALSE(bytes.empty());
  std::mt19937 random(1);
  for (int i = 0; i < 200; ++i) {
    std::string damaged = bytes;
    damaged[random() % damaged.size()] ^= static_cast<char>(1 + random() % 255);
    if (i % 4 == 0) damaged.resize(random() % damaged.size());
    std::ofstream(file, std::ios::binary) << damaged;
    start();
    EXPECT_EQ(find(ready).reason(), "unknown");
    EXPECT_FALSE(std::filesystem::exists(file));
  }
}

TEST(CompactHandle, ReadsWhatItIsAndNothingElse) {
  const std::string digits(64, 'a');
  const auto handle = CompactHandle::parse("kvc1.1000.120.1800000000." + digits);
  ASSERT_TRUE(handle);
  EXPECT_EQ(handle->prompt_tokens, 1000U);
  EXPECT_EQ(handle->slots, 120U);
  EXPECT_EQ(handle->expires_at, 1'800'000'000);
  EXPECT_EQ(handle->layout, SlotLayout::kRectangular);
  EXPECT_EQ(CompactHandle::parse("kvc2.1000.128.1800000000." + digits).value().layout, SlotLayout::kPool);
  EXPECT_EQ(CompactHandle::parse("kvc3.1000.128.1800000000." + digits).value().layout, SlotLayout::kShift);
  for (const std::string& wrong :
       {std::string(), std::string("kvc1"), "kvc4.1000.120.18." + digits, "kvc1.1000.1001.18." + digits,
        "kvc1.01000.120.18." + digits, "kvc1.1000.0.18." + digits, "kvc1.1000.120.-18." + digits,
        "kvc1.1000.120.18." + digits + "a", "kvc1.1000.120.18." + std::string(64, 'A'),
        "kvc1.5000000000.120.18." + digits, "kvc1.1000.120.18." + digits + ".1", "kvc1..120.18." + digits}) {
    EXPECT_FALSE(CompactHandle::parse(wrong)) << wrong;
  }
}

TEST(CompactHandle, HashesFollowFromTheWholeText) {
  // SHA-256 of "kvern compact slots" + handle + 01 00 00 00, by another implementation.
  const auto handle = CompactHandle::parse("kvc1.40.20.1800000000." + std::string(64, '0')).value();
  const auto slots = handle.slot_hashes(16, 32);
  ASSERT_EQ(slots.size(), 2U);
  EXPECT_EQ(slots[1].to_hex(), "91e00c0fefc17f79a62b31895853d3cbc4dff1a21b34e39d72dda22e676ed641");
  const auto sources = handle.source_hashes(16, 20);
  ASSERT_EQ(sources.size(), 3U);
  EXPECT_EQ(sources[2].to_hex(), "7de0621da3240d6d374b10c10f6d5ae75b9d76b0");
  const auto other = CompactHandle::parse("kvc1.40.19.1800000000." + std::string(64, '0')).value();
  EXPECT_NE(other.slot_hashes(16, 32)[0], slots[0]);
}

}  // namespace
}  // namespace kvern
