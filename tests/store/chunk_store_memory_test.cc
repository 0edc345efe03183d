#include <gtest/gtest.h>
#include <malloc.h>

#include <cstdio>

#include "tests/store/store_fixture.h"

namespace kvern {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMallocIsReal = false;
#else
constexpr bool kMallocIsReal = true;
#endif

// Bookkeeping for one chunk of 8 blocks with one shard, in private memory and in the index (16 bytes per block).
TEST(ChunkStoreMemory, BookkeepingPerChunkIsSmall) {
  if (!kMallocIsReal) GTEST_SKIP() << "sanitizers have their own malloc";
  constexpr std::uint32_t kChunks = 8192;
  const ChunkStoreConfig config{
      .slab_bytes = std::uint64_t{kChunks} * 4096, .chunk_capacity = kChunks, .index_slots = kChunks * 16};
  const auto before = mallinfo2();
  testing::StoreFixture f(config);
  const std::size_t fixture_bytes = f.slab_memory.span().size() + f.index_memory.span().size();
  for (std::uint64_t prompt = 0; prompt < kChunks; ++prompt) ASSERT_TRUE(f.put({.prompt = prompt, .blocks = 8}));
  ASSERT_EQ(f.store.stats().chunks, kChunks);
  const auto after = mallinfo2();
  const std::size_t all_bytes = (after.uordblks + after.hblkhd) - (before.uordblks + before.hblkhd);
  const std::size_t private_bytes = (all_bytes - fixture_bytes) / kChunks;
  const std::size_t index_bytes = f.store.stats().index_slots_used * 16 / kChunks;
  std::printf("bookkeeping per chunk of 8 blocks: %zu bytes private, %zu bytes index\n", private_bytes, index_bytes);
  EXPECT_EQ(index_bytes, 128U);
  EXPECT_LE(private_bytes, 170U);
}

}  // namespace
}  // namespace kvern
