#include "kernels/cluster.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <random>

#include "base/executor.h"
#include "kernels/attend.h"
#include "samples.h"
#include "targets.h"

namespace kvern::cluster {
namespace {

using testing::ElementsAre;
using testing::FloatNear;
using testing::Pointwise;

HeadRows view(const std::vector<float>& rows, std::uint32_t dim, std::uint32_t heads = 1) {
  const auto tokens = static_cast<std::uint32_t>(rows.size() / dim / heads);
  return HeadRows::contiguous(reinterpret_cast<const std::byte*>(rows.data()), DType::kFloat32, heads, tokens, dim);
}

std::vector<float> random_rows(std::size_t count, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count);
  for (float& value : rows) value = normal(generator);
  return rows;
}

Options whole(std::uint32_t chunk, std::vector<std::uint32_t> merges) {
  Options options;
  options.chunk = chunk;
  options.sinks = 0;
  options.recent = 0;
  options.merges = std::move(merges);
  return options;
}

Clusters compressed(const HeadRows& keys, const HeadRows& values, const Options& options,
                    Executor* executor = nullptr) {
  Clusters clusters;
  const Status status = compress(keys, values, options, clusters, executor);
  EXPECT_TRUE(status) << status.to_string();
  return clusters;
}

std::vector<std::uint32_t> assignment_of(const Clusters& clusters) {
  const auto assignment = clusters.head(0).assignment;
  return {assignment.begin(), assignment.end()};
}

/// Output and log-sum-exp of one query over rows with a bias.
std::pair<std::vector<float>, float> attention(const std::vector<float>& query, std::span<const float> keys,
                                               std::span<const float> values, std::span<const float> bias) {
  const auto dim = static_cast<std::uint32_t>(query.size());
  const auto entries = static_cast<std::uint32_t>(keys.size() / dim);
  const auto rows = [&](std::span<const float> all) {
    return AttendRows{
        DType::kFloat32, reinterpret_cast<const std::byte*>(all.data()), dim * sizeof(float), nullptr, nullptr,
        nullptr};
  };
  const AttendSegment segment[] = {{entries, rows(keys), rows(values), bias.empty() ? nullptr : bias.data(), nullptr}};
  const std::span<const AttendSegment> heads[] = {segment};
  const AttendProblem problem{view(query, dim), dim, 0, nullptr, heads};
  std::vector<float> workspace(attend_workspace_floats(problem));
  std::vector<float> output(dim);
  std::vector<float> lse(1);
  EXPECT_TRUE(attend(problem, workspace, output, lse, nullptr));
  return {output, lse[0]};
}

std::vector<float> log_counts(const HeadClusters& head) {
  std::vector<float> bias;
  for (const Members& members : head.members) bias.push_back(std::log(static_cast<float>(members.count)));
  return bias;
}

TEST(Cluster, K1EightTokensByHand) {
  const std::vector<float> keys = {1, 0, .9F, .1F, 0, 1, .1F, 1, 1, .05F, 0, .9F, -1, 0, .7F, .7F};
  std::vector<float> values;
  for (int i = 0; i < 8; ++i) {
    values.push_back(static_cast<float>(i));
    values.push_back(static_cast<float>(-i));
  }
  const Clusters clusters = compressed(view(keys, 2), view(values, 2), whole(8, {3}));
  const HeadClusters head = clusters.head(0);
  EXPECT_THAT(head.keys, Pointwise(FloatNear(1e-6F), {.966667F, .05F, .1F, 1.0F, 0.0F, .95F, -1.0F, 0.0F, .7F, .7F}));
  EXPECT_THAT(head.values,
              Pointwise(FloatNear(1e-6F), {1.666667F, -1.666667F, 3.0F, -3.0F, 3.5F, -3.5F, 6.0F, -6.0F, 7.0F, -7.0F}));
  EXPECT_THAT(head.members, ElementsAre(Members{3, 1, 0, 4}, Members{1, 3, 3, 3}, Members{2, 5, 2, 5},
                                        Members{1, 6, 6, 6}, Members{1, 7, 7, 7}));
  EXPECT_THAT(head.assignment, ElementsAre(0, 0, 2, 1, 0, 2, 3, 4));

  const std::vector<float> query = {2, 1};
  const auto full = attention(query, keys, values, {});
  EXPECT_NEAR(full.first[0], 3.190137F, 1e-5F);
  EXPECT_NEAR(full.second, 3.140642F, 1e-5F);
  const auto compact = attention(query, head.keys, head.values, log_counts(head));
  EXPECT_NEAR(compact.first[0], 3.176819F, 1e-5F);
  EXPECT_NEAR(compact.second, 3.140026F, 1e-5F);
  const auto without = attention(query, head.keys, head.values, {});
  EXPECT_NEAR(without.first[0], 4.071443F, 1e-5F);
  EXPECT_NEAR(without.second, 2.566231F, 1e-5F);
}

TEST(Cluster, K2EqualKeysMergeWithoutAnError) {
  const std::vector<float> keys = {1, 0, 1, 0, 0, 1, 0, 1, .5F, .5F, -1, 0};
  const std::vector<float> values = {1, 0, 3, 0, 0, 2, 0, 6, 1, 1, 5, 5};
  const Clusters clusters = compressed(view(keys, 2), view(values, 2), whole(6, {2}));
  const HeadClusters head = clusters.head(0);
  const std::vector<float> query = {2, 1};
  for (const auto& [output, lse] :
       {attention(query, keys, values, {}), attention(query, head.keys, head.values, log_counts(head))}) {
    EXPECT_THAT(output, Pointwise(FloatNear(1e-5F), {1.333638F, 1.318841F}));
    EXPECT_NEAR(lse, 2.735284F, 1e-5F);
  }
}

RC_GTEST_PROP(Cluster, K3CountsAndSumsAreConserved, ()) {
  const auto dim = *rc::gen::element(2U, 16U, 64U, 80U);
  const auto tokens = *rc::gen::inRange(1U, 400U);
  const auto seed = *rc::gen::inRange(0U, 1000000U);
  Options options = whole(*rc::gen::element(2U, 8U, 64U, 256U), {});
  options.sinks = *rc::gen::inRange(0U, 8U);
  options.recent = *rc::gen::inRange(0U, 40U);
  for (auto passes = *rc::gen::inRange(1, 4); passes > 0; --passes) {
    options.merges.push_back(*rc::gen::inRange(0U, options.chunk / 2 + 1));
  }
  if (*rc::gen::inRange(0, 4) == 0) options.min_similarity = 0.1F;
  const auto keys = random_rows(std::size_t{tokens} * dim, seed);
  const auto values = random_rows(std::size_t{tokens} * dim, seed + 1);
  const Clusters clusters = compressed(view(keys, dim), view(values, dim), options);
  const HeadClusters head = clusters.head(0);
  std::vector<std::uint32_t> counts(head.entries);
  std::vector<double> key_sums(head.keys.size());
  std::vector<double> value_sums(head.values.size());
  for (std::uint32_t token = 0; token < tokens; ++token) {
    const std::uint32_t entry = head.assignment[token];
    RC_ASSERT(entry < head.entries);
    const Members& members = head.members[entry];
    RC_ASSERT(members.first <= token && token <= members.last);
    ++counts[entry];
    for (std::uint32_t i = 0; i < dim; ++i) {
      key_sums[entry * dim + i] += double{keys[token * dim + i]};
      value_sums[entry * dim + i] += double{values[token * dim + i]};
    }
  }
  for (std::uint32_t entry = 0; entry < head.entries; ++entry) {
    const Members& members = head.members[entry];
    RC_ASSERT(counts[entry] == members.count);
    RC_ASSERT(head.assignment[members.position] == entry);
    if (entry > 0) RC_ASSERT(head.members[entry - 1].position < members.position);
    for (std::size_t i = entry * dim; i < (entry + 1) * dim; ++i) {
      RC_ASSERT(std::abs(double{head.keys[i]} * members.count - key_sums[i]) < 1e-4 * members.count);
      RC_ASSERT(std::abs(double{head.values[i]} * members.count - value_sums[i]) < 1e-4 * members.count);
    }
  }
}

TEST(Cluster, K3TwoPassesWithCountsEqualOneMergeOfTheSameMembers) {
  const auto keys = random_rows(8 * 16, 1);
  const auto values = random_rows(8 * 16, 2);
  const Clusters clusters = compressed(view(keys, 16), view(values, 16), whole(8, {4, 4, 4}));
  const HeadClusters head = clusters.head(0);
  ASSERT_EQ(head.entries, 1U);
  for (std::size_t i = 0; i < 16; ++i) {
    float mean = 0;
    for (std::size_t token = 0; token < 8; ++token) mean += keys[token * 16 + i] / 8;
    EXPECT_NEAR(head.keys[i], mean, 1e-6F);
  }
}

TEST(Cluster, NothingToMergeLeavesEveryTokenBitForBit) {
  const ShardShape shape{DType::kBFloat16, 0, 1, 0, 2, 150, 64, 64};
  const Bytes rows = sample_canonical(shape, 3);
  const HeadRows keys = HeadRows::contiguous(rows.data(), shape.dtype, 2, 150, 64);
  const HeadRows values = HeadRows::contiguous(rows.data() + rows.size() / 2, shape.dtype, 2, 150, 64);
  Options recent = whole(64, {32});
  recent.recent = 150;
  for (const Options& options : {whole(64, {0}), recent}) {
    const Clusters clusters = compressed(keys, values, options);
    for (std::uint32_t head = 0; head < 2; ++head) {
      const HeadClusters entries = clusters.head(head);
      ASSERT_EQ(entries.entries, 150U);
      Bytes back(150 * 128);
      restore_rows(entries.keys, 64, entries.assignment, shape.dtype, back.data());
      EXPECT_TRUE(std::equal(back.begin(), back.end(), rows.begin() + head * 150 * 128));
    }
  }
}

TEST(Cluster, EqualSimilaritiesMergeTheLowestIntoTheLowest) {
  const std::vector<float> rows(9 * 2, 1.0F);
  EXPECT_THAT(assignment_of(compressed(view(rows, 2), view(rows, 2), whole(8, {2}))),
              ElementsAre(0, 0, 0, 1, 2, 3, 4, 5, 6));
}

TEST(Cluster, KeysWithoutADirectionAreNeverMerged) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> keys = {0, 0, 1, 1, 1, 1, kNan, 1, kInfinity, 1, 2, 2, 1, 1, 1e30F, 1e30F};
  const std::vector<float> values(16, 1.0F);
  const Clusters clusters = compressed(view(keys, 2), view(values, 2), whole(8, {4}));
  EXPECT_THAT(clusters.head(0).assignment, ElementsAre(0, 1, 1, 2, 3, 4, 1, 5));
}

TEST(Cluster, ShortChunksHaveTheirShareOfMerges) {
  const auto entries = [](std::size_t tokens, std::uint32_t merges) {
    const auto rows = random_rows(tokens * 16, 4);
    return compressed(view(rows, 16), view(rows, 16), whole(8, {merges})).head(0).entries;
  };
  EXPECT_EQ(entries(1, 4), 1U);
  EXPECT_EQ(entries(2, 4), 1U);
  EXPECT_EQ(entries(7, 3), 5U);  // floor(7 * 3 / 8)
  EXPECT_EQ(entries(9, 4), 5U);
}

TEST(Cluster, UnlikePairsAreLeftAlone) {
  const std::vector<float> keys = {1, 0, 1, .1F, 0, 1, 1, 0};
  Options options = whole(4, {2});
  options.min_similarity = 0.9F;
  EXPECT_THAT(assignment_of(compressed(view(keys, 2), view(keys, 2), options)), ElementsAre(2, 0, 1, 2));
  options.min_similarity = -1;
  EXPECT_THAT(assignment_of(compressed(view(keys, 2), view(keys, 2), options)), ElementsAre(1, 0, 0, 1));
}

TEST(Cluster, SinksAndRecentTokensStandAlone) {
  const auto rows = random_rows(100 * 16, 5);
  Options options = whole(32, {16, 16});
  options.sinks = 5;
  options.recent = 11;
  const Clusters clusters = compressed(view(rows, 16), view(rows, 16), options);
  const HeadClusters head = clusters.head(0);
  EXPECT_EQ(head.entries, 5U + 21U + 11U);
  for (std::uint32_t i = 0; i < 5; ++i) EXPECT_EQ(head.members[i], (Members{1, i, i, i}));
  for (std::uint32_t i = 0; i < 11; ++i) {
    EXPECT_EQ(head.members[head.entries - 1 - i], (Members{1, 99 - i, 99 - i, 99 - i}));
  }
}

TEST(Cluster, AttentionOverRestoredTokensEqualsAttentionOverCentroidsWithLogCounts) {
  const auto keys = random_rows(200 * 64, 6);
  const auto values = random_rows(200 * 64, 7);
  const Clusters clusters = compressed(view(keys, 64), view(values, 64), whole(64, {32, 32}));
  const HeadClusters head = clusters.head(0);
  std::vector<float> all_keys(keys.size());
  std::vector<float> all_values(values.size());
  restore_rows(head.keys, 64, head.assignment, DType::kFloat32, reinterpret_cast<std::byte*>(all_keys.data()));
  restore_rows(head.values, 64, head.assignment, DType::kFloat32, reinterpret_cast<std::byte*>(all_values.data()));
  const auto query = random_rows(64, 8);
  const auto compact = attention(query, head.keys, head.values, log_counts(head));
  const auto full = attention(query, all_keys, all_values, {});
  EXPECT_THAT(compact.first, Pointwise(FloatNear(2e-6F), full.first));
  EXPECT_NEAR(compact.second, full.second, 2e-6F);
}

TEST(Cluster, MergesForARatio) {
  EXPECT_THAT(merges_for(0.5, 64), ElementsAre(32));
  EXPECT_THAT(merges_for(0.25, 64), ElementsAre(32, 32));
  EXPECT_THAT(merges_for(0.75, 64), ElementsAre(16));
  EXPECT_THAT(merges_for(1, 64), ElementsAre(0));
  EXPECT_EQ(merges_for(0, 64).size(), kMaxPasses);
}

TEST(Cluster, OptionsThatMakeNoSenseAreRefused) {
  const std::vector<float> rows(64);
  Clusters clusters;
  for (const Options& options : {whole(7, {1}), whole(0, {0}), whole(258, {1}), whole(8, {5}), whole(8, {}),
                                 whole(8, std::vector<std::uint32_t>(9, 1))}) {
    EXPECT_EQ(compress(view(rows, 2), view(rows, 2), options, clusters, nullptr).code(), Code::kInvalid);
  }
  EXPECT_EQ(compress(view(rows, 16), view(rows, 32), whole(8, {4}), clusters, nullptr).code(), Code::kInvalid);
}

bool same(const Clusters& a, const Clusters& b) {
  if (a.heads() != b.heads()) return false;
  for (std::uint32_t head = 0; head < a.heads(); ++head) {
    const HeadClusters x = a.head(head);
    const HeadClusters y = b.head(head);
    if (!std::ranges::equal(x.keys, y.keys) || !std::ranges::equal(x.values, y.values) ||
        !std::ranges::equal(x.members, y.members) || !std::ranges::equal(x.assignment, y.assignment)) {
      return false;
    }
  }
  return true;
}

RC_GTEST_PROP(Cluster, SameBytesOnEveryInstructionSetAndThreadCount, ()) {
  const auto dim = *rc::gen::element(2U, 16U, 64U, 112U, 256U);
  const auto heads = *rc::gen::inRange(1U, 3U);
  const auto tokens = *rc::gen::element(1U, 31U, 64U, 200U);
  const auto chunk = *rc::gen::element(2U, 34U, 64U, 256U);
  const auto seed = *rc::gen::inRange(0U, 1000000U);
  const DType dtype = *rc::gen::element(DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  const auto keys = sample_canonical({dtype, 0, 1, 0, heads, tokens, dim, 0}, seed);
  const auto values = sample_canonical({dtype, 0, 1, 0, heads, tokens, dim, 0}, seed + 1);
  const auto rows = [&](const Bytes& bytes) { return HeadRows::contiguous(bytes.data(), dtype, heads, tokens, dim); };
  const Options options = whole(chunk, {chunk / 3, chunk / 2});
  std::vector<Clusters> results;
  for_each_target([&](const char*) { results.push_back(compressed(rows(keys), rows(values), options)); });
  ThreadPool pool("cluster", 3, 64);
  results.push_back(compressed(rows(keys), rows(values), options, &pool));
  for (const Clusters& result : results) RC_ASSERT(same(result, results[0]));
}

TEST(Cluster, AReusedResultHoldsTheNewRowsOnly) {
  const auto many = random_rows(300 * 16, 9);
  const auto few = random_rows(20 * 16, 10);
  Clusters reused = compressed(view(many, 16), view(many, 16), whole(64, {32, 32}));
  ASSERT_TRUE(compress(view(few, 16), view(few, 16), whole(16, {4}), reused, nullptr));
  EXPECT_TRUE(same(reused, compressed(view(few, 16), view(few, 16), whole(16, {4}))));
}

TEST(OnlineClusters, StreamStaysWithinItsBudgetAndLosesNothing) {
  OnlineOptions options{.clustering = whole(32, {16}), .body_entries = 96};
  options.clustering.sinks = 4;
  options.clustering.recent = 40;
  ASSERT_TRUE(options.validate());
  const auto keys = random_rows(3 * 1000 * 16, 11);
  OnlineClusters online(options, 3, 16, 16);
  for (std::uint32_t token = 0; token < 1000; token += 8) {
    // Eight tokens of [head][token][dim].
    HeadRows some = view(keys, 16, 3);
    some.data += token * 64;
    some.tokens = 8;
    ASSERT_TRUE(online.append(some, some, nullptr));
    ASSERT_LT(online.recent_tokens(), 40U + 32U + 5U);
    for (std::uint32_t head = 0; head < 3; ++head) {
      const HeadClusters entries = online.head(head);
      ASSERT_LE(entries.entries, 4U + 96U + 72U);
      std::uint32_t tokens = 0;
      for (const Members& members : entries.members) tokens += members.count;
      ASSERT_EQ(tokens, token + 8);
    }
  }
  for (std::uint32_t head = 0; head < 3; ++head) {
    const HeadClusters entries = online.head(head);
    for (std::uint32_t i = 0; i < 4; ++i) EXPECT_EQ(entries.members[i], (Members{1, i, i, i}));
    for (std::uint32_t i = 0; i < 40; ++i) EXPECT_EQ(entries.members[entries.entries - 1 - i].count, 1U);
    for (std::size_t i = 0; i < 16; ++i) {
      double sum = 0;
      double expected = 0;
      for (std::uint32_t e = 0; e < entries.entries; ++e)
        sum += double{entries.keys[e * 16 + i]} * entries.members[e].count;
      for (std::size_t token = 0; token < 1000; ++token) expected += double{keys[(head * 1000 + token) * 16 + i]};
      EXPECT_NEAR(sum, expected, 1e-2);
    }
  }
  EXPECT_EQ(online.tokens(), 1000U);
}

TEST(OnlineClusters, ABodyThatCannotBeMergedGrows) {
  OnlineOptions options{.clustering = whole(8, {4}), .body_entries = 8};
  options.clustering.min_similarity = 2;
  const auto rows = random_rows(100 * 16, 12);
  OnlineClusters online(options, 1, 16, 16);
  ASSERT_TRUE(online.append(view(rows, 16), view(rows, 16), nullptr));
  EXPECT_EQ(online.head(0).entries, 100U);
  EXPECT_EQ(online.append(view(rows, 32), view(rows, 32), nullptr).code(), Code::kInvalid);
}

}  // namespace
}  // namespace kvern::cluster
