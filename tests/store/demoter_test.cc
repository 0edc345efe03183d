#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/container.h"
#include "store/container_map.h"
#include "store/demoter.h"
#include "store/lease.h"
#include "tests/store/store_fixture.h"

namespace kvern {
namespace {

using testing::namespace_of;
using testing::PageAlignedBytes;

constexpr std::uint32_t kBlocks = 4;
constexpr std::uint32_t kBlockTokens = 16;

/// One shard of a chunk of a model with 2 layers and 2 heads of 64.
ContainerInfo chunk_info(std::uint64_t prompt, std::uint32_t head_begin = 0, std::uint32_t heads = 2,
                         std::uint32_t blocks = kBlocks) {
  ContainerInfo info;
  info.block_tokens = kBlockTokens;
  info.group_layers = 2;
  info.model_heads = 2;
  info.shape = {.dtype = DType::kBFloat16,
                .layer_begin = 0,
                .layers = 2,
                .head_begin = head_begin,
                .heads = heads,
                .tokens = blocks * kBlockTokens,
                .key_dim = 64,
                .value_dim = 64};
  for (std::uint32_t block = 0; block < blocks; ++block)
    info.block_hashes.push_back(testing::block_hash(prompt, block));
  info.key = {namespace_of(1), 0, info.block_hashes.back()};
  return info;
}

std::vector<std::byte> canonical_of(const ContainerInfo& info, std::uint64_t seed) {
  std::vector<std::uint16_t> values(info.shape.raw_bytes() / 2);
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (auto& value : values) value = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(normal(random)) >> 16U);
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

std::vector<std::byte> encoded(const char* spec, ContainerInfo info, std::uint64_t seed) {
  const auto codec = make_codec(spec).value();
  info.codec_spec = codec->spec();
  info.lossy_generations = codec->lossless() ? 0 : 1;
  std::vector<std::byte> out(container_max_bytes(*codec, info));
  out.resize(encode_container(*codec, info, canonical_of(info, seed), {}, out).value());
  return out;
}

struct Observer final : DemotionObserver {
  void demoted(std::string_view codec_spec, std::uint64_t, std::uint64_t, double error, double) override {
    ++steps[std::string(codec_spec)];
    worst_error = std::max(worst_error, error);
  }
  void refused(DemotionRefusal why) override { ++refusals[why]; }
  int refused_for(DemotionRefusal why) { return refusals[why]; }

  std::map<std::string, int> steps;
  std::map<DemotionRefusal, int> refusals;
  double worst_error = 0;
};

/// A store whose chunks step down when it has fewer than so many pages free.
struct Fixture {
  explicit Fixture(std::uint64_t slab_pages, std::uint64_t free_pages, std::size_t threads = 0)
      : config({.slab_bytes = slab_pages * 4096,
                .chunk_capacity = 256,
                .index_slots = 4096,
                .demotion_free_bytes = free_pages * 4096}),
        slab_memory(config.slab_bytes),
        index_memory(block_index_bytes({config.chunk_capacity, config.index_slots, config.generation})),
        map_memory((ContainerMap::bytes_for(config.slab_bytes) + 4095) / 4096 * 4096),
        demoter_config{.threads = threads} {
    start();
  }

  /// Again over the same memory, as after kill -9.
  void start() {
    demoter.reset();
    store.reset();
    store = std::make_unique<ChunkStore>(config, slab_memory.span(), index_memory.span(), make_lru_policy(), nullptr,
                                         clock, map_memory.span());
    demoter = std::make_unique<Demoter>(*store, demoter_config, clock, observer, [] { return false; });
    store->set_pressure_listener([this] { demoter->wake(); });
  }
  ~Fixture() { demoter.reset(); }

  void use_ladder(const char* name, double floor = 1) {
    use_ladder(Ladder::make(find_ladder_profile(name).value(), floor).value(), floor);
  }
  void use_ladder(Ladder ladder, double floor = 1) {
    store->set_terms(namespace_of(1), {.ladder = std::move(ladder), .rotation = {}, .max_relative_error = floor});
  }
  Status put(const std::vector<std::byte>& container) {
    const auto info = ContainerReader::parse(container).value().info();
    const auto ticket = store->begin_write(info, container.size());
    if (!ticket) return ticket.error();
    std::ranges::copy(container, store->bytes(*ticket).begin());
    return status_of(store->publish(*ticket, info, container.size()));
  }
  Status put(const char* spec, std::uint64_t prompt) { return put(encoded(spec, chunk_info(prompt), prompt)); }

  std::shared_ptr<Lease> hold(std::uint64_t prompt) {
    const ChunkKey key = chunk_info(prompt).key;
    auto pinned = store->pin(key.namespace_id, key.group, key.last_block, PinFor::kMove);
    if (!pinned) return nullptr;
    return std::make_shared<Lease>(*store, std::move(*pinned), key.namespace_id, key.group, key.last_block);
  }
  /// Of its first shard.
  std::vector<std::byte> bytes_of(const Lease& lease) {
    const auto bytes = store->bytes(lease.chunk().shards.front());
    return {bytes.begin(), bytes.end()};
  }
  /// Whether all shards are whole containers of the chunk, in one form; the form's spec, empty otherwise.
  std::string form_of(std::uint64_t prompt) {
    const auto lease = hold(prompt);
    if (!lease) return "";
    std::string spec;
    for (const StoredShard& shard : lease->chunk().shards) {
      const auto reader = ContainerReader::parse(store->bytes(shard));
      if (!reader || !reader->verify() || !(reader->info().key == chunk_info(prompt).key)) return "";
      if (!spec.empty() && spec != reader->info().codec_spec) return "";
      spec = reader->info().codec_spec;
    }
    return spec;
  }
  void run_demoter() {
    while (demoter->step(transcoder)) {
    }
  }

  ChunkStoreConfig config;
  PageAlignedBytes slab_memory, index_memory, map_memory;
  DemoterConfig demoter_config;
  ManualClock clock;
  Observer observer;
  Transcoder transcoder;
  std::unique_ptr<ChunkStore> store;
  std::unique_ptr<Demoter> demoter;
};

const std::string kInt8r(make_codec("int8r").value()->spec());
const std::string kInt4(make_codec("int4").value()->spec());

TEST(Transcoder, WhatIntFourIsWithoutItsResidualIsIntFour) {
  const auto info = chunk_info(1);
  const auto from = encoded("int8r", info, 1);
  const auto int4 = make_codec("int4").value();
  std::vector<std::byte> out(container_max_bytes(*int4, info));
  const auto made = Transcoder().run(ContainerReader::parse(from).value(), *int4, 1, out);
  ASSERT_TRUE(made) << made.error().message();
  out.resize(made->bytes);
  EXPECT_EQ(out, encoded("int4", info, 1)) << "byte for byte what encoding the original gives";
  EXPECT_GT(made->error, 0.005);
  EXPECT_LT(made->error, 0.3);
}

/// Of a compact cache whose layers have budgets of their own.
ContainerInfo ragged_info() {
  auto info = chunk_info(1);
  info.layer_slots.assign(info.group_layers, 2 * info.block_tokens);
  return info;
}

TEST(Transcoder, SlotsOfLayersOutliveEveryStep) {
  const auto info = ragged_info();
  const auto from = encoded("int8r", info, 1);
  for (const char* to : {"int4", "int2"}) {
    const auto codec = make_codec(to).value();
    std::vector<std::byte> out(container_max_bytes(*codec, info));
    const auto made = Transcoder().run(ContainerReader::parse(from).value(), *codec, 2, out);
    ASSERT_TRUE(made) << made.error().message();
    EXPECT_EQ(ContainerReader::parse(std::span(out).first(made->bytes))->info().layer_slots, info.layer_slots) << to;
  }
}

TEST(Transcoder, PagesOfSeveralLayersAreNotClustered) {
  const auto info = ragged_info();
  const auto from = encoded("int8r", info, 1);
  for (const char* to : {"centroid(ratio=0.5) | int4", "centroid(ratio=0.5) | int4 | zstd"}) {
    const auto codec = make_codec(to).value();
    std::vector<std::byte> out(container_max_bytes(*codec, info));
    EXPECT_EQ(Transcoder().run(ContainerReader::parse(from).value(), *codec, 2, out).error().code(), Code::kRefused);
  }
}

TEST(Transcoder, CountsLossyEncodingsAndFindsDamage) {
  const auto info = chunk_info(1);
  auto from = encoded("int8r", info, 1);
  const auto centroid = make_codec("centroid(ratio=0.5) | int4").value();
  std::vector<std::byte> out(container_max_bytes(*centroid, info));
  const auto made = Transcoder().run(ContainerReader::parse(from).value(), *centroid, 2, out);
  ASSERT_TRUE(made) << made.error().message();
  const auto reader = ContainerReader::parse(std::span(out).first(made->bytes));
  EXPECT_EQ(reader->info().lossy_generations, 2U);
  EXPECT_TRUE(reader->verify());
  from[from.size() - 70] ^= std::byte{1};
  for (const char* to : {"int4", "centroid(ratio=0.5) | int4"}) {
    const auto damaged = Transcoder().run(ContainerReader::parse(from).value(), *make_codec(to).value(), 2, out);
    ASSERT_FALSE(damaged) << to;
    EXPECT_EQ(damaged.error().code(), Code::kCorrupt) << to;
  }
}

TEST(Demoter, ChunksStepDownBeforeAnyIsDropped) {
  // An int8r chunk takes 9 pages, an int4 one 5.
  Fixture f(80, 36);
  f.use_ladder("balanced");
  for (std::uint64_t prompt = 0; prompt < 10; ++prompt) {
    ASSERT_TRUE(f.put("int8r", prompt));
    f.run_demoter();
  }
  const ChunkStoreStats stats = f.store->stats();
  EXPECT_EQ(stats.evicted_chunks, 0U);
  ASSERT_EQ(stats.chunks, 10U);
  EXPECT_GE(stats.demoted_chunks, 6U);
  std::map<std::string, int> forms;
  for (std::uint64_t prompt = 0; prompt < 10; ++prompt) ++forms[f.form_of(prompt)];
  EXPECT_EQ(forms[kInt8r] + forms[kInt4], 10);
  EXPECT_EQ(static_cast<std::uint64_t>(forms[kInt4]), stats.demoted_chunks);
  EXPECT_EQ(f.observer.steps[kInt4], forms[kInt4]);
  EXPECT_EQ(stats.of_lossy_generations[1], 10U) << "nothing was encoded again";
  EXPECT_EQ(f.bytes_of(*f.hold(0)), encoded("int4", chunk_info(0), 0));
}

TEST(Demoter, WithoutALadderNothingChanges) {
  Fixture f(64, 24);
  for (std::uint64_t prompt = 0; prompt < 7; ++prompt) ASSERT_TRUE(f.put("int8r", prompt));
  f.run_demoter();
  EXPECT_EQ(f.store->stats().demoted_chunks, 0U);
  EXPECT_EQ(f.form_of(0), kInt8r);
}

TEST(Demoter, WhoHoldsAChunkKeepsItsOldFormUntilHeLetsGo) {
  Fixture f(64, 60);
  f.use_ladder("balanced");
  ASSERT_TRUE(f.put("int8r", 1));
  ASSERT_TRUE(f.put("int8r", 2));
  auto order = f.store->next_demotion().value();
  const std::uint64_t prompt = order.key == chunk_info(1).key ? 1 : 2;
  auto before = f.hold(prompt);
  const std::uint64_t used_before = f.store->stats().used_bytes;
  // As the demoter does it, with a reader that comes in between.
  const auto made = encoded("int4", chunk_info(prompt), prompt);
  const auto ticket = f.store->begin_load(5 * 4096).value();
  std::ranges::copy(made, f.store->bytes(ticket).begin());
  const std::vector<LoadedShard> shards = {{ContainerReader::parse(made)->info(), 0, made.size()}};
  ASSERT_TRUE(f.store->replace(ticket, order, shards));
  f.store->unpin(order.chunk.pin);
  EXPECT_EQ(f.bytes_of(*before), encoded("int8r", chunk_info(prompt), prompt));
  EXPECT_EQ(f.form_of(prompt), kInt4) << "who comes now gets the new form";
  EXPECT_EQ(f.store->stats().used_bytes, used_before + 5 * 4096);
  EXPECT_EQ(f.store->flush(NamespaceSet::all()).held, 1U) << "it is in use, in whatever form";
  EXPECT_EQ(f.bytes_of(*before), encoded("int8r", chunk_info(prompt), prompt));
  before.reset();
  f.store->sweep();
  EXPECT_EQ(f.store->stats().used_bytes, 0U);
  EXPECT_EQ(f.store->stats().pinned_chunks, 0U);
}

TEST(Demoter, WhatIsInUseStaysAsItIs) {
  Fixture f(64, 60);
  f.use_ladder("balanced");
  ASSERT_TRUE(f.put("int8r", 1));
  ASSERT_TRUE(f.put("int8r", 2));
  const auto one = f.hold(1);
  const auto two = f.hold(2);
  EXPECT_FALSE(f.demoter->step(f.transcoder));
  EXPECT_EQ(f.observer.refused_for(DemotionRefusal::kInUse), 1);
  EXPECT_EQ(f.store->stats().demoted_chunks, 0U);
}

TEST(Demoter, AFormThatCameOutTooWeakIsNotUsedAndNotTriedAgain) {
  // Random keys and values lose more by int4 than text does: more than this floor, which the ladder expects to be kept.
  Fixture f(64, 60);
  f.use_ladder("balanced", 0.0585);
  ASSERT_TRUE(f.put("int8r", 1));
  ASSERT_TRUE(f.put("int8r", 2));
  f.run_demoter();
  EXPECT_EQ(f.observer.refused_for(DemotionRefusal::kError), 2);
  EXPECT_EQ(f.form_of(1), kInt8r);
  EXPECT_EQ(f.store->stats().used_bytes, 18U * 4096);
}

TEST(Demoter, DamagedChunksAreQuarantined) {
  Fixture f(64, 60);
  f.use_ladder("balanced");
  ASSERT_TRUE(f.put("int8r", 1));
  {
    const auto lease = f.hold(1);
    const StoredShard shard = lease->chunk().shards.front();
    f.slab_memory.span()[shard.extent.offset + shard.extent.bytes - 70] ^= std::byte{1};
  }
  f.run_demoter();
  EXPECT_EQ(f.observer.refused_for(DemotionRefusal::kCorrupt), 1);
  EXPECT_EQ(f.hold(1), nullptr);
  f.store->sweep();
  EXPECT_EQ(f.store->stats().used_bytes, 0U);
}

TEST(Demoter, AtMostTwoLossyEncodingsLieBehindAForm) {
  Fixture f(64, 63);
  f.use_ladder(*Ladder::make({.name = "steep",
                              .rungs = {{.codec_spec = "raw", .bytes_share = 1.002},
                                        {.codec_spec = "int8", .bytes_share = 0.533, .error = 0.01},
                                        {.codec_spec = "int4", .bytes_share = 0.283, .error = 0.06},
                                        {.codec_spec = "int2", .bytes_share = 0.16, .error = 0.3}}}));
  for (std::uint64_t prompt = 0; prompt < 3; ++prompt) ASSERT_TRUE(f.put("raw", prompt));
  EXPECT_EQ(f.store->stats().of_lossy_generations[0], 3U);
  f.run_demoter();
  EXPECT_EQ(f.store->stats().of_lossy_generations[2], 3U);
  for (std::uint64_t prompt = 0; prompt < 3; ++prompt) {
    const auto reader = ContainerReader::parse(f.bytes_of(*f.hold(prompt)));
    EXPECT_EQ(reader->info().lossy_generations, 2U);
  }
  EXPECT_GT(f.observer.worst_error, 0.0);
}

TEST(Demoter, AllShardsOfAChunkStepDownTogether) {
  Fixture f(64, 60);
  f.use_ladder("balanced");
  ASSERT_TRUE(f.put(encoded("int8r", chunk_info(1, 0, 1), 1)));
  ASSERT_TRUE(f.put(encoded("int8r", chunk_info(1, 1, 1), 2)));
  EXPECT_EQ(f.form_of(1), kInt8r);
  f.run_demoter();
  EXPECT_EQ(f.form_of(1), kInt4);
  const auto lease = f.hold(1);
  ASSERT_EQ(lease->chunk().shards.size(), 2U);
  EXPECT_EQ(f.bytes_of(*lease), encoded("int4", chunk_info(1, 0, 1), 1));
}

TEST(Demoter, ALongerChunkThatComesMeanwhileWins) {
  Fixture f(64, 60);
  f.use_ladder("balanced");
  ASSERT_TRUE(f.put(encoded("int8r", chunk_info(1, 0, 2, 2), 1)));
  const auto order = f.store->next_demotion().value();
  const auto made = encoded("int4", chunk_info(1, 0, 2, 2), 1);
  ASSERT_TRUE(f.put("int8r", 1));
  const auto ticket = f.store->begin_load(8 * 4096).value();
  const std::vector<LoadedShard> shards = {{ContainerReader::parse(made)->info(), 0, made.size()}};
  EXPECT_EQ(f.store->replace(ticket, order, shards).code(), Code::kNotFound);
  f.store->unpin(order.chunk.pin);
  f.store->sweep();
  EXPECT_EQ(f.form_of(1), kInt8r);
  EXPECT_EQ(f.store->stats().used_bytes, 9U * 4096) << "ticket and shorter chunk are freed";
}

// A process may end after any store to the map. What it leaves are all containers of one form and some of the other.
TEST(Demoter, ARestartAmidAReplacementFindsOneFormWhole) {
  for (int kept_old = 0; kept_old <= 2; ++kept_old) {
    for (int kept_new = 0; kept_new <= 2; ++kept_new) {
      if (kept_old < 2 && kept_new < 2) continue;  // new ones go onto the map before old ones leave it
      Fixture f(64, 60);
      f.use_ladder("balanced");
      ASSERT_TRUE(f.put(encoded("int8r", chunk_info(1, 0, 1), 1)));
      ASSERT_TRUE(f.put(encoded("int8r", chunk_info(1, 1, 1), 2)));
      const auto old_form = f.hold(1)->chunk();
      const std::vector<std::vector<std::byte>> made = {encoded("int4", chunk_info(1, 0, 1), 1),
                                                        encoded("int4", chunk_info(1, 1, 1), 2)};
      const auto order = f.store->next_demotion().value();
      const std::uint64_t first = (made[0].size() + 4095) / 4096 * 4096;
      const auto ticket = f.store->begin_load(2 * first).value();
      std::ranges::copy(made[0], f.store->bytes(ticket).begin());
      std::ranges::copy(made[1], f.store->bytes(ticket).subspan(first).begin());
      const std::vector<LoadedShard> shards = {{ContainerReader::parse(made[0])->info(), 0, made[0].size()},
                                               {ContainerReader::parse(made[1])->info(), first, made[1].size()}};
      ASSERT_TRUE(f.store->replace(ticket, order, shards));
      const std::uint64_t new_offsets[] = {ticket.extent.offset, ticket.extent.offset + first};
      {
        ContainerMap map(f.map_memory.span(), f.config.slab_bytes);
        for (const std::uint64_t offset : map.offsets()) map.clear(offset);
        for (int i = 0; i < kept_old; ++i) map.set(old_form.shards[static_cast<std::size_t>(i)].extent.offset, 0);
        for (int i = 0; i < kept_new; ++i) map.set(new_offsets[i], 0);
      }
      f.start();
      const std::string form = f.form_of(1);
      EXPECT_TRUE(form == kInt8r || form == kInt4) << kept_old << " old, " << kept_new << " new: \"" << form << "\"";
      if (kept_old < 2 || kept_new < 2) {
        EXPECT_EQ(form, kept_new < 2 ? kInt8r : kInt4);
      }
      EXPECT_EQ(f.store->stats().incomplete_chunks, 0U);
      const auto lease = f.hold(1);
      std::uint64_t pages = 0;
      for (const auto& shard : lease->chunk().shards) pages += (shard.extent.bytes + 4095) / 4096;
      EXPECT_EQ(f.store->stats().used_bytes, pages * 4096) << "nothing of the other form is left";
      ContainerMap map(f.map_memory.span(), f.config.slab_bytes);
      EXPECT_EQ(map.offsets().size(), 2U);
    }
  }
}

TEST(Floor, WeakerFormsAreNeitherTakenNorServed) {
  Fixture f(64, 0);
  ASSERT_TRUE(f.put("int4", 1));
  ASSERT_TRUE(f.put("int8r", 2));
  f.use_ladder("balanced", 0.01);
  EXPECT_EQ(f.hold(1), nullptr) << "it was stored before the floor was set";
  EXPECT_EQ(f.form_of(2), kInt8r);
  EXPECT_EQ(f.put("int4", 3).code(), Code::kRefused);
  EXPECT_TRUE(f.put("raw", 4));
  // What a lower tier has.
  const auto object = encoded("int4", chunk_info(5), 5);
  const auto ticket = f.store->begin_load(5 * 4096).value();
  std::ranges::copy(object, f.store->bytes(ticket).begin());
  const std::vector<LoadedShard> shards = {{ContainerReader::parse(object)->info(), 0, object.size()}};
  const std::uint64_t used = f.store->stats().used_bytes;
  EXPECT_EQ(f.store->publish_load(ticket, shards, 1).code(), Code::kRefused);
  EXPECT_EQ(f.hold(5), nullptr);
  EXPECT_EQ(f.store->stats().used_bytes, used - 5 * 4096);
}

TEST(Demoter, ReadersAndWritersNeverMeetATornChunk) {
  Fixture f(160, 60, 2);
  f.use_ladder("compact");
  constexpr std::uint64_t kPrompts = 24;
  std::vector<std::vector<std::byte>> containers;
  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) {
    containers.push_back(encoded("int8r", chunk_info(prompt), prompt));
  }
  std::atomic<int> torn{0};
  std::atomic<int> read{0};
  std::atomic<int> stored{0};
  std::vector<std::thread> threads;
  for (std::uint64_t worker = 0; worker < 3; ++worker) {
    threads.emplace_back([&, worker] {
      std::mt19937_64 random(worker);
      for (int i = 0; i < 400; ++i) {
        const std::uint64_t prompt = random() % kPrompts;
        const auto lease = f.hold(prompt);
        if (!lease) {
          // "Stored already", "in flight" and "no room" are fine.
          stored += f.put(containers[prompt]) ? 1 : 0;
          continue;
        }
        ++read;
        for (const StoredShard& shard : lease->chunk().shards) {
          const auto reader = ContainerReader::parse(f.store->bytes(shard));
          if (!reader || !reader->verify() || !(reader->info().key == chunk_info(prompt).key)) ++torn;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  f.demoter.reset();
  EXPECT_EQ(torn.load(), 0);
  EXPECT_GT(read.load(), 0);
  EXPECT_GT(stored.load(), 0);
  f.store->flush(NamespaceSet::all());
  f.store->sweep();
  EXPECT_EQ(f.store->stats().used_bytes, 0U) << "no extent leaks";
  EXPECT_EQ(f.store->stats().pinned_chunks, 0U);
  EXPECT_TRUE(f.store->forms().empty());
}

}  // namespace
}  // namespace kvern
