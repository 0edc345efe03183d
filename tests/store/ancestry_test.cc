#include "store/ancestry.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "tests/store/store_fixture.h"

namespace kvern {
namespace {

using testing::block_hash;
using testing::ChunkSpec;

ChunkSpec cell(std::uint64_t prompt, std::uint64_t number, std::uint32_t blocks = 4) {
  return {.prompt = prompt, .first_block = 4 * number, .blocks = blocks};
}

std::vector<bool> gone(const std::vector<ChunkSpec>& specs, const BlockHash& block) {
  std::vector<ChunkAncestry> chunks;
  for (const auto& spec : specs) chunks.push_back(ChunkAncestry::of(spec.info(), block));
  return continue_prefix(chunks, block);
}

using Goes = std::vector<bool>;

TEST(Ancestry, TheChunkThatHoldsTheBlockAndWhatFollowsItGo) {
  std::vector<ChunkSpec> specs{cell(1, 0), cell(1, 1), cell(1, 2), cell(1, 3, 2), cell(2, 0), cell(2, 1)};
  EXPECT_EQ(gone(specs, block_hash(1, 5)), (Goes{false, true, true, true, false, false}));
  EXPECT_EQ(gone(specs, block_hash(1, 0)), (Goes{true, true, true, true, false, false}));
  EXPECT_EQ(gone(specs, block_hash(1, 13)), (Goes{false, false, false, true, false, false}));
  EXPECT_EQ(gone(specs, block_hash(9, 0)), Goes(6, false));
  std::ranges::reverse(specs);
  EXPECT_EQ(gone(specs, block_hash(1, 5)), (Goes{false, false, true, true, true, false})) << "in any order";
}

TEST(Ancestry, ABranchThatLeavesBeforeTheBlockStays) {
  // Two prompts that share their first cell: the second one's chunks follow the first one's.
  ContainerInfo branch = cell(2, 1).info();
  branch.previous_tag = block_tag(branch.key.namespace_id, 0, block_hash(1, 3).bytes());
  const BlockHash block = block_hash(1, 4);
  const std::vector<ChunkAncestry> chunks{ChunkAncestry::of(cell(1, 0).info(), block),
                                          ChunkAncestry::of(cell(1, 1).info(), block), ChunkAncestry::of(branch, block),
                                          ChunkAncestry::of(cell(2, 2).info(), block)};
  EXPECT_EQ(continue_prefix(chunks, block), (Goes{false, true, false, false}));
}

TEST(Ancestry, WhatFollowsAMissingChunkGoesWithABlockThatIsFoundBeforeIt) {
  const std::vector<ChunkSpec> specs{cell(1, 0), cell(1, 2), cell(1, 3), cell(2, 0), cell(2, 2)};
  EXPECT_EQ(gone(specs, block_hash(1, 0)), (Goes{true, true, true, false, true})) << "cell 2 of prompt 2 may be of 1";
  EXPECT_EQ(gone(specs, block_hash(1, 9)), (Goes{false, true, true, false, false}))
      << "it stands where the block does, and is another";
  EXPECT_EQ(gone(specs, block_hash(1, 7)), (Goes{false, true, true, false, false}))
      << "the block's chunk is missing; what follows names it";
}

TEST(Ancestry, NamespacesAndGroupsAreApart) {
  const BlockHash block = block_hash(1, 1);
  ContainerInfo other_namespace = cell(1, 1).info();
  other_namespace.key.namespace_id = testing::namespace_of(9);
  ContainerInfo other_group = cell(1, 0).info();
  other_group.key.group = 3;
  const std::vector<ChunkAncestry> chunks{ChunkAncestry::of(cell(1, 0).info(), block),
                                          ChunkAncestry::of(other_namespace, block),
                                          ChunkAncestry::of(other_group, block)};
  EXPECT_EQ(continue_prefix(chunks, block), (Goes{true, false, true})) << "the block means the same in all groups";
}

// Against the definition, on random forests of prompts with all chunks present.
TEST(Ancestry, AgreesWithTheDefinitionOnRandomTrees) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<ContainerInfo> infos;
    std::vector<std::size_t> parents;
    const std::size_t count = 1 + random() % 30;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t parent = i == 0 || random() % 4 == 0 ? count : random() % i;
      const std::uint64_t number = parent == count ? 0 : infos[parent].position / 64 + 1;
      infos.push_back(cell(i, number).info());
      parents.push_back(parent);
      infos.back().previous_tag =
          parent == count ? 0 : block_tag(infos[parent].key.namespace_id, 0, infos[parent].key.last_block.bytes());
    }
    const std::size_t chosen = random() % count;
    const BlockHash block = infos[chosen].block_hashes[random() % 4];
    std::vector<ChunkAncestry> chunks;
    for (const auto& info : infos) chunks.push_back(ChunkAncestry::of(info, block));
    const auto goes = continue_prefix(chunks, block);
    for (std::size_t i = 0; i < count; ++i) {
      std::size_t at = i;
      while (at != count && at != chosen) at = parents[at];
      EXPECT_EQ(goes[i], at == chosen) << "chunk " << i << " of round " << round;
    }
  }
}

}  // namespace
}  // namespace kvern
