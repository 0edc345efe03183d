// The store tells its policy which chunk follows which.

#include <gtest/gtest.h>

#include <vector>

#include "tests/store/store_fixture.h"

namespace kvern {
namespace {

using testing::block_hash;
using testing::ChunkSpec;
using testing::namespace_of;
using testing::StoreFixture;

constexpr ChunkSpec kStart{.prompt = 1, .first_block = 0, .blocks = 4};
constexpr ChunkSpec kNext{.prompt = 1, .first_block = 4, .blocks = 4};
constexpr ChunkSpec kOther{.prompt = 2, .first_block = 0, .blocks = 4};
constexpr ChunkSpec kNew{.prompt = 3, .first_block = 0, .blocks = 4};

class ChunkOrder : public ::testing::Test {
 protected:
  ChunkOrder() {
    // The start of the prompt is the oldest.
    for (const ChunkSpec& each : {kStart, kOther, kNext}) EXPECT_TRUE(f.put(each));
  }
  StoreFixture f{StoreFixture::pages(3)};
};

TEST_F(ChunkOrder, IsNotKnownToThePolicyByItself) {
  ASSERT_TRUE(f.put(kNew));
  EXPECT_FALSE(f.has(kStart));
}

TEST_F(ChunkOrder, ALinkedChunkLeavesBeforeItsStart) {
  f.store.link(namespace_of(1), 0, block_hash(1, 3), block_hash(1, 4));
  ASSERT_TRUE(f.put(kNew));
  EXPECT_TRUE(f.has(kStart));
  EXPECT_FALSE(f.has(kNext));
}

TEST_F(ChunkOrder, AMatchLinks) {
  std::vector<BlockHash> prompt;
  for (std::uint64_t block = 0; block < 8; ++block) prompt.push_back(block_hash(1, block));
  ASSERT_EQ(f.store.match(namespace_of(1), 0, prompt), 8U);
  // Now the other one is the oldest; it is used, and then the end of the prompt alone.
  EXPECT_TRUE(f.has(kOther));
  ASSERT_TRUE(f.pin(kNext));
  ASSERT_TRUE(f.put(kNew).has_value()) << "the start is the oldest, and what follows it is pinned";
  EXPECT_TRUE(f.has(kStart));
}

TEST_F(ChunkOrder, ChunksThatCannotBeNeighboursAreNotLinked) {
  f.store.link(namespace_of(1), 0, block_hash(1, 4), block_hash(1, 3));
  f.store.link(namespace_of(1), 0, block_hash(1, 3), block_hash(9, 9));
  f.store.link(namespace_of(2), 0, block_hash(1, 3), block_hash(1, 4));
  f.store.link(namespace_of(1), 0, block_hash(1, 0), block_hash(1, 1));
  ASSERT_TRUE(f.put(kNew));
  EXPECT_FALSE(f.has(kStart));
}

}  // namespace
}  // namespace kvern
