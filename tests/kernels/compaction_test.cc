#include "kernels/compaction.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>

#include "base/executor.h"
#include "kernels/slot_pages.h"
#include "tests/kernels/evict_samples.h"

namespace kvern {
namespace {

using evict::SampleRows;

constexpr std::uint32_t kQueryHeads = 4, kHeads = 2, kDim = 16;
const std::array kMethods = {"cake(budget=25%,window=8)",    "snapkv(budget=25%,window=8)",
                             "windowkv(budget=25%,alpha=8)", "streaming(budget=25%)",
                             "knorm(budget=25%,recent=8)",   "keydiff(budget=25%,recent=8)"};

CompactionPlan plan_of(std::string_view spec, std::uint32_t tokens) {
  auto plan = CompactionPlan::make(spec, tokens);
  if (!plan) throw std::runtime_error(plan.error().to_string());
  return std::move(*plan);
}

Status status_of_plan(std::string_view spec, std::uint32_t tokens = 1000) {
  return status_of(CompactionPlan::make(spec, tokens));
}

/// A layer of random rows.
struct Prompt {
  Prompt(std::uint32_t tokens, std::uint32_t rows, DType dtype = DType::kFloat32, std::uint32_t seed = 1)
      : keys(dtype, kHeads, tokens, kDim, seed),
        values(dtype, kHeads, tokens, kDim, seed + 1),
        queries(dtype, kQueryHeads, std::max(rows, 1U), kDim, seed + 2) {}
  PromptLayer layer() const { return {keys.view(), values.view(), queries.view()}; }
  SampleRows keys, values, queries;
};

TEST(CompactionPlan, SaysTheSlotsBeforeAnythingIsScored) {
  EXPECT_EQ(plan_of("cake(budget=12%)", 1000).slots, 120U);
  EXPECT_EQ(plan_of("snapkv(budget=100) | int8", 1000).slots, 100U);
  EXPECT_EQ(plan_of("streaming(budget=25%)", 1001).slots, 251U);
  EXPECT_EQ(plan_of("cake(budget=2000)", 1000).slots, 1000U);
  // 1000 - 16 = 123 windows of 8 and no rest: 16 + 10 * 8 is the most that fits 100.
  EXPECT_EQ(plan_of("windowkv(budget=100)", 1000).slots, 96U);
}

TEST(CompactionPlan, NeedsQueriesOnlyWhereTheMethodReadsThem) {
  EXPECT_EQ(plan_of("cake(budget=12%)", 1000).query_rows, 32U);
  EXPECT_EQ(plan_of("windowkv(budget=12%)", 1000).query_rows, 16U);
  EXPECT_EQ(plan_of("keydiff(budget=12%)", 1000).query_rows, 0U);
  EXPECT_EQ(plan_of("cake(budget=100%)", 1000).query_rows, 0U);
}

TEST(CompactionPlan, RefusesWhatItDoesNotMake) {
  EXPECT_EQ(status_of_plan("h2o").code(), Code::kRefused);
  EXPECT_EQ(status_of_plan("snapkv(allocation=cake)").code(), Code::kRefused);
  EXPECT_EQ(status_of_plan("keydiff(allocation=heads)").code(), Code::kRefused);
  EXPECT_EQ(status_of_plan("windowkv(group=2)").code(), Code::kRefused);
  EXPECT_EQ(status_of_plan("int8").code(), Code::kInvalid);
  EXPECT_EQ(status_of_plan("cake(budget=32)").code(), Code::kInvalid);
  EXPECT_EQ(status_of_plan("cake(budget=12%)", 0).code(), Code::kInvalid);
  EXPECT_NE(status_of_plan("cake(budget=20)").message().find("more than the 32"), std::string::npos);
}

const std::array kRagged = {
    "cake(budget=25%,window=8,allocation=cake)", "snapkv(budget=25%,window=8,allocation=pyramid)",
    "windowkv(budget=25%,alpha=8,allocation=pyramid)", "windowkv(budget=25%,alpha=8,allocation=printed)",
    "knorm(budget=25%,recent=8,allocation=pyramid)"};

TEST(CompactionPlan, IsRaggedInWholePagesWhereTheEngineCanReadIt) {
  const auto plan =
      CompactionPlan::make("cake(budget=12%,allocation=cake) | int8", 1000, SlotLayout::kPool, 32).value();
  EXPECT_TRUE(plan.ragged() && plan.reads_preferences());
  EXPECT_EQ(plan.slots, 128U);  // 120 in whole pages
  EXPECT_EQ(plan.mean_slots, 128U);
  EXPECT_NE(plan.chain.spec.find("allocation=cake"), std::string::npos);
  EXPECT_EQ(plan.query_rows, 32U);
}

TEST(CompactionPlan, TheShiftClaimsTwiceTheMeanAndNoLayerKeepsMore) {
  const auto plan = CompactionPlan::make("cake(budget=320,allocation=cake)", 2000, SlotLayout::kShift, 32).value();
  EXPECT_EQ(plan.mean_slots, 320U);
  EXPECT_EQ(plan.slots, 640U);
  EXPECT_EQ(plan.shift(0), 640 - 2000);
  // 18 : 1 : 1 would be 27 pages for the first.
  EXPECT_EQ(plan.layer_pages(std::array{18.0, 1.0, 1.0}, 3), (std::vector<std::uint32_t>{20, 5, 5}));
  EXPECT_EQ(CompactionPlan::make("cake(budget=320,allocation=cake)", 500, SlotLayout::kShift, 32).value().slots, 480U);
}

TEST(CompactionPlan, ThePeakOfTheShiftCutsNoPyramid) {
  for (const char* method : {"snapkv(budget=25%,allocation=pyramid)", "windowkv(budget=25%,allocation=pyramid)",
                             "windowkv(budget=25%,allocation=printed)"}) {
    const auto pool = CompactionPlan::make(method, 4000, SlotLayout::kPool, 32).value();
    const auto shift = CompactionPlan::make(method, 4000, SlotLayout::kShift, 32).value();
    EXPECT_EQ(pool.layer_pages({}, 24), shift.layer_pages({}, 24)) << method;
  }
}

TEST(CompactionPlan, GivesAllLayersTheSameWhereTheEngineCannotOrThereIsNoChoice) {
  const auto cannot = plan_of("cake(budget=12%,allocation=cake) | int8", 1000);
  EXPECT_FALSE(cannot.ragged());
  EXPECT_EQ(cannot.slots, 120U);
  EXPECT_EQ(cannot.chain.spec, plan_of("cake(budget=12%) | int8", 1000).chain.spec);
  const auto pyramid = plan_of("snapkv(budget=25%,allocation=pyramid)", 1000);
  EXPECT_EQ(pyramid.chain.spec, plan_of("snapkv(budget=25%)", 1000).chain.spec);
  // 63 tokens are one whole page and a rest: no layer could have more than another.
  EXPECT_FALSE(
      CompactionPlan::make("keydiff(budget=60,allocation=pyramid)", 95, SlotLayout::kPool, 32).value().ragged());
  EXPECT_FALSE(CompactionPlan::make("cake(budget=100%,allocation=cake)", 1000, SlotLayout::kPool, 32).value().ragged());
  EXPECT_FALSE(CompactionPlan::make("cake(budget=12%)", 1000, SlotLayout::kPool, 32).value().ragged());
}

TEST(CompactionPlan, GivesAllLayersTheSameWhereRowsAreClustered) {
  const auto clustered =
      CompactionPlan::make("cake(budget=12%,allocation=cake) | centroid(ratio=0.5) | int8", 1000, SlotLayout::kPool, 32)
          .value();
  EXPECT_FALSE(clustered.ragged());
  EXPECT_EQ(clustered.chain.spec, plan_of("cake(budget=12%) | centroid(ratio=0.5) | int8", 1000).chain.spec);
}

TEST(CompactionPlan, KnowsThePromptsLastTokensAmongItsSlots) {
  EXPECT_EQ(plan_of("cake(budget=12%)", 1000).recent_slots(), 32U);
  EXPECT_EQ(plan_of("snapkv(budget=12%,window=8)", 1000).recent_slots(), 8U);
  EXPECT_EQ(plan_of("keydiff(budget=12%,recent=5)", 1000).recent_slots(), 5U);
  EXPECT_EQ(plan_of("windowkv(budget=12%)", 1001).recent_slots(), 17U);
  EXPECT_EQ(plan_of("streaming(budget=12%)", 1000).recent_slots(), 0U);
  EXPECT_EQ(plan_of("cake(budget=100%)", 1000).recent_slots(), 0U);
}

TEST(CompactionPlan, TheWorkspaceGrowsWithTheWindowTimesThePrompt) {
  const ShardShape layer{DType::kBFloat16, 0, 1, 0, 8, 32, 128, 128};
  const auto bytes = [&](const char* spec) { return workspace_bytes(plan_of(spec, 131'072), layer, 32); };
  EXPECT_LT(bytes("snapkv(budget=10%)"), std::uint64_t{64} << 20);
  // Exponentials of 1,024 rows over all columns, a query head at a time.
  EXPECT_GT(bytes("snapkv(budget=10%,window=1024)"), std::uint64_t{500} << 20);
}

TEST(CompactionPlan, GivesLayersThatClaimMoreMorePages) {
  const auto plan = CompactionPlan::make("cake(budget=320,allocation=cake)", 2000, SlotLayout::kPool, 32).value();
  EXPECT_EQ(plan.layer_pages(std::array{1.0, 1.0, 1.0}, 3), (std::vector<std::uint32_t>{10, 10, 10}));
  // (320 - 32) * 3 tokens as 4 : 1 : 1, and the window's page for each.
  EXPECT_EQ(plan.layer_pages(std::array{4.0, 1.0, 1.0}, 3), (std::vector<std::uint32_t>{19, 6, 5}));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(plan.layer_pages(std::array{nan, nan, nan}, 3), (std::vector<std::uint32_t>{10, 10, 10}));
}

RC_GTEST_PROP(Compaction, RaggedLayersKeepTheirOwnNumberOfTokensAndThePlansOnAverage, ()) {
  const auto tokens = *rc::gen::inRange<std::uint32_t>(200, 500);
  constexpr std::uint32_t kLayers = 5, kPage = 16;
  const auto layout = *rc::gen::element(SlotLayout::kPool, SlotLayout::kShift);
  for (const char* method : kRagged) {
    const auto plan = CompactionPlan::make(method, tokens, layout, kPage).value();
    RC_ASSERT(plan.layout == layout && plan.slots <= tokens);
    std::vector<Prompt> layers;
    std::vector<double> preferences;
    for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
      layers.emplace_back(tokens, plan.query_rows, DType::kFloat32, tokens + 10 * layer);
      if (plan.reads_preferences()) {
        preferences.push_back(layer_preference(plan, layers[layer].layer(), nullptr).value());
        RC_ASSERT(preferences.back() > 0);
      }
    }
    const auto pages = plan.layer_pages(preferences, kLayers);
    RC_ASSERT(std::accumulate(pages.begin(), pages.end(), 0U) * kPage == plan.mean_slots * kLayers);
    RC_ASSERT(slot_pages(layout, pages, plan.slots / kPage).has_value());
    for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
      const auto made = compact_layer(plan, layers[layer].layer(), pages[layer] * kPage, nullptr);
      RC_ASSERT(made.has_value());
      for (std::size_t head = 0; head < kHeads; ++head) {
        const auto kept = made->kept.of(head);
        RC_ASSERT(kept.size() == pages[layer] * kPage);
        RC_ASSERT(std::ranges::is_sorted(kept, std::less_equal{}) && kept.back() == tokens - 1);
      }
    }
    RC_ASSERT(!compact_layer(plan, layers[0].layer(), plan.slots + 1, nullptr).has_value());
  }
}

RC_GTEST_PROP(Compaction, EveryHeadKeepsThePlansSlotsAndTheirBytes, ()) {
  const auto tokens = *rc::gen::inRange<std::uint32_t>(80, 400);
  const auto dtype = *rc::gen::element(DType::kFloat32, DType::kBFloat16, DType::kFloat16);
  for (const char* method : kMethods) {
    const auto plan = plan_of(method, tokens);
    const Prompt prompt(tokens, plan.query_rows, dtype, tokens);
    const auto made = compact_layer(plan, prompt.layer(), nullptr);
    RC_ASSERT(made.has_value());
    const std::size_t row = kDim * dtype_bytes(dtype);
    RC_ASSERT(made->keys.size() == kHeads * plan.slots * row);
    for (std::size_t head = 0; head < kHeads; ++head) {
      const auto kept = made->kept.of(head);
      RC_ASSERT(kept.size() == plan.slots);
      RC_ASSERT(std::ranges::is_sorted(kept, std::less_equal{}) && kept.back() == tokens - 1);
      for (std::size_t i = 0; i < kept.size(); ++i) {
        const std::size_t at = (head * plan.slots + i) * row;
        RC_ASSERT(std::memcmp(made->keys.data() + at, prompt.keys.view().row(head, kept[i]), row) == 0);
        RC_ASSERT(std::memcmp(made->values.data() + at, prompt.values.view().row(head, kept[i]), row) == 0);
      }
    }
  }
}

TEST(Compaction, SinksAndRecentTokensStayWhateverTheyScore) {
  Prompt prompt(200, 0);
  const auto plan = plan_of("knorm(budget=20,sinks=4,recent=8)", 200);
  for (std::uint32_t token : {0U, 3U, 192U, 199U}) prompt.keys.set_row(0, token, 1000);  // the largest norms: worst
  const auto made = compact_layer(plan, prompt.layer(), nullptr);
  ASSERT_TRUE(made);
  const auto kept = made->kept.of(0);
  const std::set<std::uint32_t> set(kept.begin(), kept.end());
  for (std::uint32_t token : {0U, 1U, 2U, 3U, 192U, 199U}) EXPECT_TRUE(set.contains(token)) << token;
}

TEST(Compaction, KeepsTheTokenThatTheQueriesLookAt) {
  for (const char* method :
       {"cake(budget=25%,window=8)", "snapkv(budget=25%,window=8)", "windowkv(budget=25%,alpha=8)"}) {
    Prompt prompt(200, 8);
    for (std::uint32_t row = 0; row < 8; ++row) {
      for (std::uint32_t head = 0; head < kQueryHeads; ++head) prompt.queries.set_row(head, row, 2);
    }
    for (std::uint32_t head = 0; head < kHeads; ++head) prompt.keys.set_row(head, 77, 2);
    const auto made = compact_layer(plan_of(method, 200), prompt.layer(), nullptr);
    ASSERT_TRUE(made) << method;
    for (std::size_t head = 0; head < kHeads; ++head) {
      EXPECT_TRUE(std::ranges::binary_search(made->kept.of(head), 77U)) << method;
    }
    // The one that matters is kept, so the outputs hardly change.
    EXPECT_LT(attention_error(prompt.layer(), made->kept, nullptr).value(), 1e-3) << method;
  }
}

TEST(Compaction, TheSameBytesForAnyExecutor) {
  ThreadPool threads("test", 2, 64);
  for (const char* method : kMethods) {
    const auto plan = plan_of(method, 300);
    const Prompt prompt(300, plan.query_rows);
    const auto alone = compact_layer(plan, prompt.layer(), nullptr);
    const auto shared = compact_layer(plan, prompt.layer(), &threads);
    ASSERT_TRUE(alone && shared);
    EXPECT_EQ(alone->kept, shared->kept) << method;
    EXPECT_EQ(alone->keys, shared->keys) << method;
  }
}

TEST(Compaction, RefusesRowsOfAnotherPrompt) {
  const auto plan = plan_of("cake(budget=25%,window=8)", 200);
  EXPECT_EQ(compact_layer(plan, Prompt(199, 8).layer(), nullptr).error().code(), Code::kInvalid);
  EXPECT_EQ(compact_layer(plan, Prompt(200, 7).layer(), nullptr).error().code(), Code::kInvalid);
}

TEST(Compaction, TheErrorIsZeroWhereAllIsKeptAndGrowsAsTheCacheShrinks) {
  const Prompt prompt(400, 8);
  double last = 0;
  for (const char* budget : {"100%", "50%", "10%"}) {
    const auto plan = plan_of("snapkv(window=8,budget=" + std::string(budget) + ")", 400);
    const auto made = compact_layer(plan, prompt.layer(), nullptr);
    ASSERT_TRUE(made);
    const auto error = attention_error(prompt.layer(), made->kept, nullptr);
    ASSERT_TRUE(error);
    if (plan.slots == 400) {
      EXPECT_EQ(*error, 0);
    } else {
      EXPECT_GT(*error, last);
    }
    last = *error;
  }
}

TEST(Compaction, TheErrorRefusesTokensThatAreNotThere) {
  const Prompt prompt(100, 8);
  auto kept = evict::select_sinks_and_recent(kHeads, 100, 4, 10);
  kept.tokens.back() = 100;
  EXPECT_EQ(attention_error(prompt.layer(), kept, nullptr).error().code(), Code::kInvalid);
}

/// <q, k> of a query at N + ahead over a kept key, as the full cache has it, and as decode has it on the compact cache
/// placed at a base: query at base + M + ahead, key turned by the constant shift.
RC_GTEST_PROP(Compaction, PlacedKeysAreAtTheirTrueDistanceFromEveryLaterQuery, ()) {
  const auto tokens = *rc::gen::inRange<std::uint32_t>(20, 3000);
  const auto base = *rc::gen::inRange<std::int64_t>(0, 2000);
  const auto ahead = *rc::gen::inRange<std::int64_t>(0, 500);
  const auto style = *rc::gen::element(rope::Style::kNeox, rope::Style::kInterleaved);
  rope::Parameters rotation;
  rotation.style = style;
  rotation.rotary_dim = kDim;
  if (*rc::gen::arbitrary<bool>()) {
    rotation.scaling = rope::Scaling::kYarn;
    rotation.factor = 4;
    rotation.original_positions = 1024;
  }
  const auto plan = plan_of("streaming(budget=50%)", tokens);
  const auto frequencies = rotation.inverse_frequencies();
  const auto turned = [&](const SampleRows& rows, std::span<const std::int64_t> positions) {
    SampleRows out = rows;
    RC_ASSERT(rope::rotate(rows.view(), rope::Turns::at(frequencies, positions), style, rope::Direction::kForward,
                           DType::kFloat32, const_cast<std::byte*>(out.view().data)));
    return out;
  };
  std::vector<std::int64_t> positions(tokens);
  std::iota(positions.begin(), positions.end(), 0);
  Prompt prompt(tokens, 0);
  prompt.keys = turned(prompt.keys, positions);
  const auto made = compact_layer(plan, prompt.layer(), nullptr);
  RC_ASSERT(made.has_value());
  std::vector<std::byte> placed(made->keys.size());
  RC_ASSERT(place_keys(HeadRows::contiguous(made->keys.data(), DType::kFloat32, kHeads, plan.slots, kDim),
                       plan.shift(base), rotation, placed.data(), nullptr));
  const SampleRows query(DType::kFloat32, 1, 1, kDim, 9);
  const auto in_prompt = turned(query, std::array{std::int64_t{tokens} + ahead});
  const auto in_decode = turned(query, std::array{base + plan.slots + ahead});
  for (std::size_t slot = 0; slot < plan.slots; ++slot) {
    double exact = 0, got = 0;
    for (std::size_t i = 0; i < kDim; ++i) {
      float key = 0;
      std::memcpy(&key, placed.data() + (slot * kDim + i) * sizeof(float), sizeof key);
      exact += double{in_prompt.at(0, 0, i)} * prompt.keys.at(0, made->kept.of(0)[slot], i);
      got += double{in_decode.at(0, 0, i)} * key;
    }
    RC_ASSERT(std::abs(exact - got) < 2e-5);
  }
}

}  // namespace
}  // namespace kvern
