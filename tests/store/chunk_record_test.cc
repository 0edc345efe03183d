#include "store/chunk_record.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <array>
#include <utility>
#include <vector>

#include "tests/store/store_fixture.h"

namespace kvern {
namespace {

using testing::ChunkSpec;

ShardRange range_of(std::uint32_t layer, std::uint32_t layers, std::uint32_t head, std::uint32_t heads) {
  ShardShape shape;
  shape.layer_begin = layer;
  shape.layers = layers;
  shape.head_begin = head;
  shape.heads = heads;
  return ShardRange::of(shape);
}

ChunkRecord record_with(const std::vector<ShardRange>& ranges) {
  ChunkRecord record;
  for (const auto& range : ranges) record.shards.push_back({{}, range, 0});
  return record;
}

TEST(ShardCoverage, NeedsEveryLayerAndHead) {
  const ShardRange whole{0, 4, 0, 8};
  EXPECT_FALSE(record_with({}).covers(whole));
  EXPECT_TRUE(record_with({whole}).covers(whole));
  EXPECT_TRUE(record_with({{0, 4, 0, 4}, {0, 4, 4, 4}}).covers(whole));
  EXPECT_FALSE(record_with({{0, 4, 0, 4}, {0, 4, 5, 3}}).covers(whole));
  EXPECT_TRUE(record_with({{0, 2, 0, 8}, {2, 2, 0, 5}, {1, 3, 3, 5}}).covers(whole));
  EXPECT_FALSE(record_with({{0, 2, 0, 8}, {2, 2, 0, 5}, {3, 1, 3, 5}}).covers(whole));
  EXPECT_TRUE(record_with({range_of(0, 0xffffffff, 0, 0xffffffff)}).covers(whole));
}

using Rectangle = std::array<std::uint8_t, 4>;

RC_GTEST_PROP(ShardCoverage, AgreesWithAGrid, (const std::vector<Rectangle>& rectangles)) {
  std::vector<ShardRange> ranges;
  std::array<std::array<bool, 6>, 6> grid{};
  for (const auto& [layer, layers, head, heads] : rectangles) {
    const ShardRange range = range_of(layer % 6U, 1U + layers % 6U, head % 6U, 1U + heads % 6U);
    ranges.push_back(range);
    for (unsigned l = range.layer_begin; l < std::min(6U, 0U + range.layer_begin + range.layers); ++l) {
      for (unsigned h = range.head_begin; h < std::min(6U, 0U + range.head_begin + range.heads); ++h) grid[l][h] = true;
    }
  }
  const auto record = record_with(ranges);
  for (std::uint32_t layers = 1; layers <= 6; ++layers) {
    for (std::uint32_t heads = 1; heads <= 6; ++heads) {
      bool all = true;
      for (std::uint32_t l = 6 - layers; l < 6; ++l) {
        for (std::uint32_t h = 0; h < heads; ++h) all = all && grid[l][h];
      }
      RC_ASSERT(record.covers(range_of(6 - layers, layers, 0, heads)) == all);
    }
  }
}

TEST(ContainerInfoCheck, RefusesWhatDoesNotAddUp) {
  EXPECT_TRUE(check_container_info(ChunkSpec{}.info()).is_ok());
  const auto refused = [](auto change) {
    auto info = ChunkSpec{}.info();
    change(info);
    return check_container_info(info).code() == Code::kInvalid;
  };
  EXPECT_TRUE(refused([](auto& info) { info.block_hashes.clear(); }));
  EXPECT_TRUE(refused([](auto& info) { info.block_hashes.resize(5000, info.key.last_block); }));
  EXPECT_TRUE(refused([](auto& info) { info.block_hashes[1] = BlockHash(std::vector<std::uint8_t>(16)); }));
  EXPECT_TRUE(refused([](auto& info) { info.key.last_block = info.block_hashes[0]; }));
  EXPECT_TRUE(refused([](auto& info) { info.shape.tokens -= 1; }));
  EXPECT_TRUE(refused([](auto& info) { info.block_tokens = 0; }));
  EXPECT_TRUE(refused([](auto& info) { info.shape.layers = 0; }));
  EXPECT_TRUE(refused([](auto& info) { info.shape.heads = 0; }));
  EXPECT_TRUE(refused([](auto& info) { info.shape.layer_begin = 1; }));
  EXPECT_TRUE(refused([](auto& info) { info.shape.head_begin = 0xffffffff; }));
  EXPECT_TRUE(refused([](auto& info) { info.group_layers = 65'536; }));
  EXPECT_TRUE(refused([](auto& info) { info.model_heads = 65'536; }));
}

TEST(ShardList, KeepsAnyNumberInOrderAndMoves) {
  for (std::uint32_t count = 0; count < 20; ++count) {
    ShardList shards;
    for (std::uint32_t i = 0; i < count; ++i) shards.push_back({{i, i}, range_of(i, 1, 0, 1), i});
    ShardList moved = std::move(shards);
    ShardList assigned;
    assigned.push_back({});
    assigned.push_back({});
    assigned = std::move(moved);
    ASSERT_EQ(assigned.size(), count);
    for (std::uint32_t i = 0; i < count; ++i) {
      EXPECT_EQ(assigned[i].extent.offset, i);
      EXPECT_EQ(assigned[i].range, range_of(i, 1, 0, 1));
    }
    assigned.push_back({{count, count}, {}, count});
    EXPECT_EQ(assigned[count].raw_bytes, count);
  }
}

TEST(FamilyTable, KeepsOneCopyForAsLongAsItIsUsed) {
  FamilyTable families;
  const ChunkFamily family{.namespace_id = testing::namespace_of(1), .codec_spec = "raw"};
  const auto* first = families.acquire(family);
  EXPECT_EQ(families.acquire(family), first);
  EXPECT_NE(families.acquire({.namespace_id = testing::namespace_of(1), .codec_spec = "int8"}), first);
  families.release(first);
  EXPECT_EQ(first->codec_spec, "raw");
  families.release(first);
}

}  // namespace
}  // namespace kvern
