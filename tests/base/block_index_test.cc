#include "base/block_index.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace kvern {
namespace {

class AlignedBytes {
 public:
  explicit AlignedBytes(std::size_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{4096}))) {
    std::memset(data_, 0xab, bytes);
  }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  ~AlignedBytes() { ::operator delete (data_, std::align_val_t{4096}); }
  std::span<std::byte> span() { return {data_, bytes_}; }

 private:
  std::size_t bytes_;
  std::byte* data_;
};

struct Index {
  explicit Index(const BlockIndexConfig& config) : memory(block_index_bytes(config)), writer(memory.span(), config) {}
  AlignedBytes memory;
  BlockIndexWriter writer;
};

constexpr BlockIndexConfig kSmall{.chunk_capacity = 16, .slot_count = 64, .generation = 7};

TEST(BlockIndex, FindsWhatWasPutWhileTheChunkIsLive) {
  Index index(kSmall);
  const auto reader = BlockIndexReader::attach(index.memory.span());
  ASSERT_TRUE(reader.has_value());
  EXPECT_EQ(reader->generation(), 7U);
  ASSERT_TRUE(index.writer.put(100, 3, 5));
  EXPECT_FALSE(reader->find(100).has_value()) << "the chunk is not live yet";
  const auto version = index.writer.make_live(3);
  const auto hit = reader->find(100);
  ASSERT_TRUE(hit.has_value());
  EXPECT_EQ(hit->chunk, 3U);
  EXPECT_EQ(hit->block_in_chunk, 5U);
  EXPECT_EQ(hit->version, version);
  EXPECT_TRUE(reader->still_valid(*hit));
  EXPECT_FALSE(reader->find(101).has_value());
}

TEST(BlockIndex, AHitDiesWithItsChunkAndARetirementCanBeTakenBack) {
  Index index(kSmall);
  const auto reader = index.writer.reader();
  index.writer.make_live(3);
  ASSERT_TRUE(index.writer.put(100, 3, 0));
  const auto hit = reader.find(100);
  ASSERT_TRUE(hit.has_value());
  index.writer.begin_retire(3);
  EXPECT_FALSE(reader.still_valid(*hit));
  EXPECT_FALSE(reader.find(100).has_value());
  index.writer.cancel_retire(3);
  EXPECT_TRUE(reader.still_valid(*hit));
  index.writer.begin_retire(3);
  index.writer.finish_retire(3);
  EXPECT_FALSE(reader.still_valid(*hit));
  index.writer.make_live(3);
  EXPECT_FALSE(reader.still_valid(*hit)) << "another life of the same number";
}

TEST(BlockIndex, ErasesOnlyForTheChunkThatItPointsTo) {
  Index index(kSmall);
  index.writer.make_live(1);
  index.writer.make_live(2);
  ASSERT_TRUE(index.writer.put(100, 1, 0));
  ASSERT_TRUE(index.writer.put(100, 2, 4));
  EXPECT_EQ(index.writer.used_slots(), 1U);
  EXPECT_FALSE(index.writer.erase(100, 1));
  ASSERT_TRUE(index.writer.reader().find(100).has_value());
  EXPECT_EQ(index.writer.reader().find(100)->chunk, 2U);
  EXPECT_TRUE(index.writer.erase(100, 2));
  EXPECT_FALSE(index.writer.erase(100, 2));
  EXPECT_EQ(index.writer.used_slots(), 0U);
}

TEST(BlockIndex, RefusesMoreThanThreeQuartersOfTheSlots) {
  Index index(kSmall);
  for (std::uint64_t i = 0; i < 48; ++i) ASSERT_TRUE(index.writer.put(1000 + i * 7, 0, 0));
  EXPECT_EQ(index.writer.used_slots(), index.writer.slot_limit());
  EXPECT_FALSE(index.writer.put(99'999, 0, 0));
  EXPECT_TRUE(index.writer.put(1000, 1, 0)) << "what is there already can still be pointed elsewhere";
  EXPECT_TRUE(index.writer.erase(1007, 0));
  EXPECT_TRUE(index.writer.put(99'999, 0, 0));
}

TEST(BlockIndex, RefusesFingerprintsThatAllShareOneHome) {
  Index index({.chunk_capacity = 1, .slot_count = 4096, .generation = 1});
  std::uint64_t accepted = 0;
  while (index.writer.put((accepted + 1) * 4096, 0, 0)) ++accepted;
  EXPECT_EQ(accepted, 512U);
  EXPECT_TRUE(index.writer.put(4097 + 2000, 0, 0));
}

TEST(BlockIndex, FindLeadingStopsAtTheFirstMiss) {
  Index index(kSmall);
  index.writer.make_live(2);
  for (std::uint64_t i = 0; i < 40; ++i) {
    if (i == 33) continue;
    ASSERT_TRUE(index.writer.put(500 + i, 2, static_cast<std::uint16_t>(i)));
  }
  std::vector<std::uint64_t> fingerprints(40);
  for (std::uint64_t i = 0; i < 40; ++i) fingerprints[i] = 500 + i;
  std::vector<BlockIndexHit> hits(40);
  const auto reader = index.writer.reader();
  EXPECT_EQ(reader.find_leading(fingerprints, hits), 33U);
  for (std::size_t i = 0; i < 33; ++i) EXPECT_EQ(hits[i].block_in_chunk, i);
  EXPECT_EQ(reader.find_leading(std::span(fingerprints).first(10), hits), 10U);
  EXPECT_EQ(reader.find_leading({}, hits), 0U);
}

TEST(BlockIndex, WriterRefusesMemoryThatDoesNotFit) {
  AlignedBytes memory(block_index_bytes(kSmall));
  EXPECT_THROW(BlockIndexWriter(memory.span().first(memory.span().size() - 1), kSmall), std::invalid_argument);
  EXPECT_THROW(BlockIndexWriter(memory.span().subspan(8), kSmall), std::invalid_argument);
  EXPECT_THROW(BlockIndexWriter(memory.span(), {.chunk_capacity = 1, .slot_count = 60}), std::invalid_argument);
  EXPECT_THROW(BlockIndexWriter(memory.span(), {.chunk_capacity = 0, .slot_count = 64}), std::invalid_argument);
}

TEST(BlockIndex, ReaderRefusesForeignMemory) {
  AlignedBytes memory(block_index_bytes(kSmall));
  EXPECT_FALSE(BlockIndexReader::attach({}).has_value());
  EXPECT_FALSE(BlockIndexReader::attach(memory.span()).has_value());
  BlockIndexWriter writer(memory.span(), kSmall);
  EXPECT_TRUE(BlockIndexReader::attach(memory.span()).has_value());
  EXPECT_FALSE(BlockIndexReader::attach(memory.span().first(memory.span().size() - 16)).has_value());
  for (std::size_t offset : {0U, 8U, 12U, 16U}) {  // magic, layout version, chunk capacity, slot count
    auto& byte = memory.span()[offset + 3];
    const auto before = byte;
    byte ^= std::byte{0xff};
    EXPECT_FALSE(BlockIndexReader::attach(memory.span()).has_value()) << offset;
    byte = before;
  }
}

// Whatever the bytes say, look-ups end and stay inside (AddressSanitizer watches the latter).
RC_GTEST_PROP(BlockIndex, SurvivesAnyBytes, (std::uint64_t seed)) {
  Index index(kSmall);
  const auto reader = BlockIndexReader::attach(index.memory.span());
  RC_ASSERT(reader.has_value());
  std::mt19937_64 random(seed);
  const auto memory = index.memory.span();
  for (std::size_t i = 0; i + 8 <= memory.size(); i += 8) {
    const std::uint64_t word = random() >> (random() % 64);
    std::memcpy(memory.data() + i, &word, 8);
  }
  std::vector<std::uint64_t> fingerprints(64);
  for (auto& fingerprint : fingerprints) fingerprint = random();
  for (std::size_t slot = 0; slot < 32; ++slot) {  // fingerprints that are found
    const std::size_t offset = memory.size() - kSmall.slot_count * 16 + slot * 16;
    std::memcpy(&fingerprints[slot], memory.data() + offset, 8);
  }
  std::vector<BlockIndexHit> hits(64);
  for (auto fingerprint : fingerprints) {
    const auto hit = reader->find(fingerprint);
    if (hit) RC_ASSERT(hit->chunk < kSmall.chunk_capacity);
  }
  const auto found = reader->find_leading(fingerprints, hits);
  for (std::size_t i = 0; i < found; ++i) RC_ASSERT(hits[i].chunk < kSmall.chunk_capacity);
  (void)reader->still_valid({.chunk = 0xffffffff, .version = 2, .block_in_chunk = 0});
}

// Few homes and a small table: long runs that wrap around the end.
RC_GTEST_PROP(BlockIndex, AgreesWithAMap, (const std::vector<std::pair<std::uint8_t, std::uint8_t>>& operations)) {
  Index index(kSmall);
  for (std::uint32_t chunk = 0; chunk < 4; ++chunk) index.writer.make_live(chunk);
  const auto fingerprint_of = [](std::uint8_t code) {
    return std::uint64_t{code % 64U} * 64 + 50 + code % 16U;  // homes 50 .. 65, modulo 64
  };
  std::map<std::uint64_t, std::pair<std::uint32_t, std::uint16_t>> model;
  for (const auto& [code, action] : operations) {
    const auto fingerprint = fingerprint_of(code);
    const std::uint32_t chunk = action % 4U;
    const std::uint16_t block = action / 8U;
    if (action & 4U) {
      const auto it = model.find(fingerprint);
      const bool expected = it != model.end() && it->second.first == chunk;
      RC_ASSERT(index.writer.erase(fingerprint, chunk) == expected);
      if (expected) model.erase(it);
    } else {
      const bool room = model.contains(fingerprint) || model.size() < index.writer.slot_limit();
      RC_ASSERT(index.writer.put(fingerprint, chunk, block) == room);
      if (room) model[fingerprint] = {chunk, block};
    }
    RC_ASSERT(index.writer.used_slots() == model.size());
  }
  const auto reader = index.writer.reader();
  for (unsigned code = 0; code < 256; ++code) {
    const auto fingerprint = fingerprint_of(static_cast<std::uint8_t>(code));
    const auto hit = reader.find(fingerprint);
    const auto it = model.find(fingerprint);
    RC_ASSERT(hit.has_value() == (it != model.end()));
    if (hit) {
      RC_ASSERT(hit->chunk == it->second.first);
      RC_ASSERT(hit->block_in_chunk == it->second.second);
    }
  }
}

// An entry that moves up in its run, because others before it go, is found at every moment.
TEST(BlockIndex, ReadersFindAnEntryWhileItMoves) {
  Index index({.chunk_capacity = 1, .slot_count = 64, .generation = 1});
  index.writer.make_live(0);
  constexpr std::uint64_t kMoving = 64 * 100 + 5;
  constexpr std::uint64_t kOthers = 40;
  const auto other = [](std::uint64_t i) { return 64 * (i + 1) + 5; };
  std::atomic<std::uint64_t> epoch{0};  // odd while kMoving is there
  std::atomic<bool> reading{true};
  std::uint64_t gaps = 0;
  std::thread reading_thread([&] {
    const auto reader = index.writer.reader();
    for (std::uint64_t checked = 0; checked < 600'000;) {
      const auto before = epoch.load();
      const bool found = reader.find(kMoving).has_value();
      if (before % 2 == 0 || epoch.load() != before) continue;
      gaps += !found;
      ++checked;
    }
    reading = false;
  });
  bool put = true;
  while (reading.load()) {
    for (std::uint64_t i = 0; i < kOthers; ++i) put &= index.writer.put(other(i), 0, 0);
    put &= index.writer.put(kMoving, 0, 0);
    ++epoch;
    for (std::uint64_t i = kOthers; i-- > 0;) index.writer.erase(other(i), 0);
    ++epoch;
    index.writer.erase(kMoving, 0);
  }
  reading_thread.join();
  EXPECT_TRUE(put);
  EXPECT_EQ(gaps, 0U);
}

// Chunk c holds the fingerprints of i with i % kChunks == c only, so that a hit shows at once whether it is another's.
// A quarter of the entries stays, and must be found at every look-up although it is pointed elsewhere all the time.
TEST(BlockIndex, ReadersSeeOwnChunksAndNoGapsBesideABusyWriter) {
  constexpr std::uint32_t kChunks = 8;
  constexpr std::uint64_t kFingerprints = 44;
  Index index({.chunk_capacity = kChunks, .slot_count = 64, .generation = 1});
  for (std::uint32_t chunk = 0; chunk < kChunks; ++chunk) index.writer.make_live(chunk);
  const auto fingerprint_of = [](std::uint64_t i) { return i * 64 + 60 + i % 8; };  // one long run
  const auto chunk_of = [](std::uint64_t i) { return static_cast<std::uint32_t>(i % kChunks); };
  const auto stays = [](std::uint64_t i) { return i % 4 == 0; };  // these belong to chunks 0 and 4, which stay live
  for (std::uint64_t i = 0; i < kFingerprints; ++i) {
    ASSERT_TRUE(index.writer.put(fingerprint_of(i), chunk_of(i), static_cast<std::uint16_t>(i)));
  }
  constexpr int kReaders = 3;
  constexpr int kPasses = 20000;
  std::atomic<int> reading{kReaders};
  std::atomic<std::uint64_t> wrong{0};
  std::atomic<std::uint64_t> gaps{0};
  std::vector<std::thread> readers;
  for (int t = 0; t < kReaders; ++t) {
    readers.emplace_back([&] {
      const auto reader = index.writer.reader();
      for (int pass = 0; pass < kPasses; ++pass) {
        for (std::uint64_t i = 0; i < kFingerprints; ++i) {
          const auto hit = reader.find(fingerprint_of(i));
          if (!hit) {
            gaps += stays(i);
          } else if (hit->chunk != chunk_of(i) || hit->version % 2 != 0) {
            ++wrong;
          }
        }
      }
      --reading;
    });
  }
  std::mt19937_64 random(1);
  while (reading.load() > 0) {
    const std::uint64_t i = random() % kFingerprints;
    const auto fingerprint = fingerprint_of(i);
    if (stays(i)) {  // pointed elsewhere and back, without a gap
      ASSERT_TRUE(index.writer.put(fingerprint, chunk_of(i), static_cast<std::uint16_t>(random() % 1000)));
      continue;
    }
    const auto chunk = chunk_of(i);
    index.writer.begin_retire(chunk);
    if (random() % 2 == 0) {
      index.writer.cancel_retire(chunk);
    } else {
      for (std::uint64_t j = chunk; j < kFingerprints; j += kChunks) {
        index.writer.erase(fingerprint_of(j), chunk);
      }
      index.writer.finish_retire(chunk);
      index.writer.make_live(chunk);
      for (std::uint64_t j = chunk; j < kFingerprints; j += kChunks) {
        ASSERT_TRUE(index.writer.put(fingerprint_of(j), chunk, static_cast<std::uint16_t>(j)));
      }
    }
  }
  for (auto& reader : readers) reader.join();
  EXPECT_EQ(wrong.load(), 0U);
  EXPECT_EQ(gaps.load(), 0U);
}

}  // namespace
}  // namespace kvern
