#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/container.h"
#include "store/chunk_tree.h"
#include "store/demotion.h"
#include "store/fingerprint_mix.h"
#include "store/ladder.h"
#include "store/quota.h"

namespace kvern {
namespace {

LadderProfile profile(std::string_view name) { return *find_ladder_profile(name); }
Ladder ladder(std::string_view name, double floor = 1) { return *Ladder::make(profile(name), floor); }

TEST(LadderProfiles, AreValid) {
  ASSERT_EQ(ladder_profiles().size(), 3U);
  for (const LadderProfile& each : ladder_profiles()) EXPECT_TRUE(each.validate()) << each.validate().message();
  const auto unknown = find_ladder_profile("tiny");
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().message(), "no ladder is called \"tiny\": use one of exact, balanced, compact");
}

TEST(LadderProfiles, ExactLosesNothing) {
  for (const Rung& rung : profile("exact").rungs) EXPECT_EQ(rung.error, 0) << rung.codec_spec;
}

// What the codecs write for a chunk of a common shape: no share in the profiles is far from it. zstd's depends on the
// data, and is left out.
TEST(LadderProfiles, SharesAreThoseOfRealContainers) {
  constexpr std::uint32_t kTokens = 256;
  ContainerInfo info;
  info.shape.layers = 30;
  info.shape.heads = 3;
  info.shape.key_dim = info.shape.value_dim = 64;
  info.shape.tokens = kTokens;
  info.block_tokens = 16;
  info.group_layers = 30;
  info.model_heads = 3;
  for (std::uint8_t block = 0; block < kTokens / 16; ++block) {
    info.block_hashes.emplace_back(std::vector<std::uint8_t>(32, block));
  }
  info.key.last_block = info.block_hashes.back();
  std::vector<std::uint16_t> values(info.shape.raw_bytes() / 2);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (auto& value : values) {
    const float number = normal(random);
    value = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(number) >> 16U);
  }
  for (const LadderProfile& each : ladder_profiles()) {
    for (const Rung& rung : each.rungs) {
      if (rung.codec_spec.find("zstd") != std::string::npos) continue;
      const auto codec = *make_codec(rung.codec_spec);
      info.codec_spec = codec->spec();
      std::vector<std::byte> out(container_max_bytes(*codec, info));
      const auto bytes = encode_container(*codec, info, std::as_bytes(std::span(values)), {}, out);
      ASSERT_TRUE(bytes) << rung.codec_spec << ": " << bytes.error().message();
      const double share = static_cast<double>(*bytes) / static_cast<double>(info.shape.raw_bytes());
      EXPECT_NEAR(rung.bytes_share, share, 0.02 * share + 0.008) << rung.codec_spec;
    }
  }
}

TEST(LadderProfile, RefusesWhatIsNoLadder) {
  const auto message = [](std::vector<Rung> rungs) {
    return LadderProfile{.name = "own", .rungs = std::move(rungs)}.validate().message();
  };
  const Rung raw{.codec_spec = "raw", .bytes_share = 1};
  const Rung int8{.codec_spec = "int8", .bytes_share = 0.5, .error = 0.01};
  const Rung int4{.codec_spec = "int4", .bytes_share = 0.25, .error = 0.05};
  EXPECT_EQ(message({raw, int8, int4}), "");
  EXPECT_EQ(message({}), "ladder own: it has no rung");
  EXPECT_EQ(message({int4, int8}), "ladder own: rung 1 (int8): it must be smaller than the rung before");
  EXPECT_EQ(message({int8, {.codec_spec = "int4", .bytes_share = 0.25, .error = 0.001}}),
            "ladder own: rung 1 (int4): it is smaller and more exact than the rung before: leave that one out");
  EXPECT_EQ(message({{.codec_spec = "raw", .bytes_share = 0}}),
            "ladder own: rung 0 (raw): bytes_share must be above 0");
  EXPECT_EQ(message({{.codec_spec = "raw", .bytes_share = std::nan("")}}),
            "ladder own: rung 0 (raw): bytes_share must be above 0");
  EXPECT_EQ(message({{.codec_spec = "raw", .error = -1}}), "ladder own: rung 0 (raw): error must not be negative");
  EXPECT_EQ(message({{.codec_spec = "raw", .is_part_of_previous = true}}),
            "ladder own: rung 0 (raw): there is no rung before it");
  EXPECT_NE(message({{.codec_spec = "int5"}}).find("ladder own: rung 0 (int5): "), std::string::npos);
}

TEST(Ladder, CutsOffWhatMissesTheFloor) {
  EXPECT_EQ(ladder("compact", 0.06).rungs().size(), 2U);
  EXPECT_EQ(ladder("compact", 0.01).rungs().size(), 1U);
  EXPECT_EQ(ladder("exact", 0).rungs().size(), 2U);
  const auto none = Ladder::make(profile("compact"), 0.001);
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code(), Code::kRefused);
  EXPECT_FALSE(Ladder::make(profile("compact"), std::nan("")));
}

TEST(Ladder, StepsDownOnly) {
  const Ladder compact = ladder("compact");
  EXPECT_FALSE(compact.step({1, 1}, 1));
  EXPECT_FALSE(compact.step({1, 1}, 0));
  EXPECT_FALSE(compact.step({0, 1}, 4));
}

TEST(Ladder, DroppingAResidualIsNoEncoding) {
  const Ladder compact = ladder("compact");
  EXPECT_EQ(compact.first(), (StoredForm{0, 1}));
  EXPECT_EQ(compact.step(compact.first(), 1), (StoredForm{1, 1}));
}

TEST(Ladder, CentroidsAreMadeFromInt8OrBetter) {
  const Ladder compact = ladder("compact");
  EXPECT_EQ(compact.step({0, 1}, 2), (StoredForm{2, 2}));
  EXPECT_EQ(compact.step({0, 1}, 3), (StoredForm{3, 2}));
  EXPECT_FALSE(compact.step({1, 1}, 2)) << "from int4";
  EXPECT_FALSE(compact.step({2, 2}, 3)) << "from other centroids";
}

TEST(Ladder, BoundsLossyGenerations) {
  const Ladder own = *Ladder::make({.name = "own",
                                    .rungs = {{.codec_spec = "raw", .bytes_share = 1},
                                              {.codec_spec = "raw | zstd", .bytes_share = 0.7},
                                              {.codec_spec = "int8", .bytes_share = 0.5, .error = 0.01},
                                              {.codec_spec = "int4", .bytes_share = 0.3, .error = 0.05},
                                              {.codec_spec = "int2", .bytes_share = 0.2, .error = 0.3}}});
  EXPECT_EQ(own.first(), (StoredForm{0, 0}));
  EXPECT_EQ(own.step({0, 0}, 1), (StoredForm{1, 0}));
  EXPECT_EQ(own.step({1, 0}, 2), (StoredForm{2, 1}));
  EXPECT_EQ(own.step({2, 1}, 3), (StoredForm{3, 2}));
  EXPECT_FALSE(own.step({3, 2}, 4)) << "a third lossy encoding";
  EXPECT_EQ(own.step({0, 0}, 4), (StoredForm{4, 1})) << "from the exact form at once";
}

TEST(Ladder, AStricterReaderGetsNoWeakerForm) {
  const Ladder compact = ladder("compact");
  EXPECT_TRUE(compact.may_serve({1, 1}, 0.06));
  EXPECT_FALSE(compact.may_serve({1, 1}, 0.05));
  EXPECT_TRUE(compact.may_serve({0, 1}, 0.05));
  EXPECT_FALSE(compact.may_serve({0, 1}, 0));
}

/// Knows how much use each chunk has: any amount is as likely.
class KnownUse final : public EvictionPolicy {
 public:
  std::string_view name() const override { return "known"; }
  void inserted(std::uint32_t chunk, const ChunkTraits& traits) override { by_use_.insert({use(traits), chunk}); }
  void follows(std::uint32_t, std::uint32_t) override {}
  void touched(std::uint32_t) override {}
  void erased(std::uint32_t chunk) override { by_use_.erase({expected_use(chunk), chunk}); }
  std::vector<std::uint32_t> victims(std::size_t) override {
    return by_use_.empty() ? std::vector<std::uint32_t>{} : std::vector<std::uint32_t>{by_use_.begin()->second};
  }
  void skipped(std::uint32_t) override {}
  void withhold(std::uint32_t, bool) override {}
  const ChunkTree& tree() const override { return tree_; }
  double expected_use(std::uint32_t chunk) const override { return use({.bytes = 100, .fingerprint = chunk}); }

 private:
  static double use(const ChunkTraits& traits) {
    return static_cast<double>(mix_fingerprint(traits.fingerprint, 1) >> 11U) / 9007199254740992.0;
  }
  std::set<std::pair<double, std::uint32_t>> by_use_;
  ChunkTree tree_;
};

/// Chunks of 100 raw bytes in an LRU store: the lower the number, the longer unused.
struct Store {
  Store(const Ladder& rules, std::uint32_t chunks, DemotionConfig config = {}) : demotion(config) {
    number = demotion.add_ladder(rules);
    for (std::uint32_t chunk = 0; chunk < chunks; ++chunk) {
      policy->inserted(chunk, {.bytes = 100, .fingerprint = chunk});
      demotion.entered(chunk, number, rules.first(), 100);
    }
  }
  double bytes() const {
    double sum = 0;
    for (std::size_t rung = 0; rung < demotion.ladder(number).rungs().size(); ++rung) {
      sum += demotion.figures(number, rung).bytes;
    }
    return sum;
  }
  /// Until so many bytes are left.
  void press(double bytes_left) {
    while (bytes() > bytes_left) {
      const auto step = demotion.next(*policy);
      ASSERT_TRUE(step);
      const double before = bytes();
      if (step->to) {
        ASSERT_TRUE(demotion.ladder(number).step(demotion.form(step->chunk), step->to->rung));
        demotion.stepped(step->chunk, *step->to);
      } else {
        demotion.left(step->chunk);
        policy->erased(step->chunk);
      }
      EXPECT_NEAR(before - bytes(), step->freed_bytes, 1e-6);
    }
  }
  /// Chunks come, one after another, into so many bytes.
  void pass_through(std::uint32_t chunks_in_all, double capacity_bytes) {
    const StoredForm form = demotion.ladder(number).first();
    for (std::uint32_t chunk = 0; chunk < chunks_in_all; ++chunk) {
      press(capacity_bytes - 100 * demotion.ladder(number).rung(form).bytes_share);
      policy->inserted(chunk, {.bytes = 100, .fingerprint = chunk});
      demotion.entered(chunk, number, form, 100);
    }
  }
  std::uint64_t chunks() const {
    std::uint64_t sum = 0;
    for (std::size_t rung = 0; rung < demotion.ladder(number).rungs().size(); ++rung) sum += chunks(rung);
    return sum;
  }
  std::uint64_t chunks(std::size_t rung) const { return demotion.figures(number, rung).chunks; }

  std::unique_ptr<EvictionPolicy> policy = make_lru_policy();
  Demotion demotion;
  std::size_t number = 0;
};

TEST(Demotion, StepsDownBeforeAnythingLeaves) {
  Store store(ladder("balanced"), 100);
  store.press(3500);
  EXPECT_EQ(store.chunks(0) + store.chunks(1), 100U);
  EXPECT_GT(store.chunks(1), 70U);
}

TEST(Demotion, TheColdestStepDownFirst) {
  Store store(ladder("balanced"), 100, {.sample_chunks = 400});
  store.press(5330 - 10 * 25);
  EXPECT_EQ(store.chunks(1), 10U);
  for (std::uint32_t chunk = 0; chunk < 10; ++chunk) EXPECT_EQ(store.demotion.form(chunk).rung, 1) << chunk;
}

TEST(Demotion, AllOfOneRungLeaveInThePolicysOrder) {
  Store store(ladder("balanced", 0.01), 100);
  store.press(53.3 * 60 + 1);
  EXPECT_EQ(store.chunks(0), 60U);
  EXPECT_EQ(store.policy->victims(1).at(0), 40U);
}

TEST(Demotion, UnderHeavyPressureGoesFarDown) {
  Store store(ladder("compact"), 0);
  store.policy = std::make_unique<KnownUse>();
  store.pass_through(4000, 20'000);
  EXPECT_GT(store.chunks(2) + store.chunks(3), store.chunks() / 4);
  EXPECT_GT(store.chunks(), 20'000U / 28) << "more than int4 alone could hold";
}

TEST(Demotion, PriceOfErrorsKeepsThemOut) {
  Store cheap(ladder("compact"), 0, {.error_price = 0.25});
  Store dear(ladder("compact"), 0, {.error_price = 4});
  for (Store* each : {&cheap, &dear}) {
    each->policy = std::make_unique<KnownUse>();
    each->pass_through(4000, 20'000);
  }
  EXPECT_GT(cheap.chunks(3), dear.chunks(3));
  EXPECT_GT(cheap.chunks(), dear.chunks());
}

TEST(Demotion, EmptiesTheTierAndThenNamesNothing) {
  Store store(ladder("compact"), 50);
  store.press(0);
  EXPECT_FALSE(store.demotion.next(*store.policy));
}

TEST(Demotion, EveryNamespaceHasItsOwnLadder) {
  Store store(ladder("balanced"), 50);
  const std::size_t exact = store.demotion.add_ladder(ladder("exact", 0));
  for (std::uint32_t chunk = 50; chunk < 100; ++chunk) {
    store.policy->inserted(chunk, {.bytes = 100, .fingerprint = chunk});
    store.demotion.entered(chunk, exact, {}, 100);
  }
  for (int step = 0; step < 100; ++step) {
    const auto next = store.demotion.next(*store.policy);
    ASSERT_TRUE(next && next->to);
    store.demotion.stepped(next->chunk, *next->to);
  }
  EXPECT_EQ(store.chunks(1), 50U);
  EXPECT_EQ(store.demotion.figures(exact, 1).chunks, 50U);
  EXPECT_EQ(store.demotion.figures(exact, 1).steps_to, 50U);
}

TEST(Demotion, RefusesConfigurationsThatMeanNothing) {
  EXPECT_THROW(Demotion({.error_price = -1}), std::invalid_argument);
  EXPECT_THROW(Demotion({.sample_chunks = 0}), std::invalid_argument);
}

TEST(TenantQuotas, AreChargedBeforehandAndRefunded) {
  TenantQuotas quotas(100);
  EXPECT_TRUE(quotas.charge("a", 60));
  const Status refused = quotas.charge("a", 41);
  EXPECT_EQ(refused.code(), Code::kRefused);
  EXPECT_EQ(refused.message(), "tenant a holds 60 of 100 bytes: 41 more do not fit");
  EXPECT_EQ(quotas.used("a"), 60U);
  EXPECT_TRUE(quotas.charge("a", 40));
  EXPECT_TRUE(quotas.charge("b", 100)) << "another tenant";
  quotas.refund("a", 10);
  EXPECT_EQ(quotas.used("a"), 90U);
  quotas.refund("a", 1000);
  EXPECT_EQ(quotas.used("a"), 0U);
  quotas.refund("nobody", 5);
}

TEST(TenantQuotas, SayHowMuchHasToLeave) {
  TenantQuotas quotas;
  EXPECT_EQ(quotas.over("a", ~std::uint64_t{0}), 0U) << "no limit";
  quotas.set_limit("a", 100);
  EXPECT_TRUE(quotas.charge("a", 90));
  EXPECT_EQ(quotas.over("a", 10), 0U);
  EXPECT_EQ(quotas.over("a", 30), 20U);
  EXPECT_EQ(quotas.over("a", 100), 90U);
  EXPECT_GT(quotas.over("a", 101), quotas.used("a")) << "never";
  EXPECT_GT(quotas.over("a", ~std::uint64_t{0}), quotas.used("a"));
  quotas.set_limit("a", 50);
  EXPECT_EQ(quotas.over("a", 10), 50U);
  EXPECT_FALSE(quotas.charge("a", 1));
  EXPECT_TRUE(quotas.charge("a", 0));
  quotas.set_limit("a", 0);
  EXPECT_TRUE(quotas.charge("a", 1000));
}

}  // namespace
}  // namespace kvern
