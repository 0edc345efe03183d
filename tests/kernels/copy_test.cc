#include "kernels/copy.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "base/keys.h"
#include "kernels/checksum.h"
#include "tests/kernels/targets.h"

namespace kvern {
namespace {

std::vector<std::uint8_t> random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<std::uint8_t> bytes(count);
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(generator());
  return bytes;
}

// Around every border of XXH3: the short forms (16, 128, 240), the stripe (64), the block (1024), what is held (256).
const std::vector<std::size_t> kSizes = {
    0,   1,   3,    8,    16,   17,   63,   64,   65,   127,  128,  129,  239,  240,   241,   255,   256,   257,   319,
    320, 321, 1023, 1024, 1025, 1087, 1088, 1089, 2047, 2048, 2049, 4096, 4097, 16384, 20000, 65536, 65537, 131072};

TEST(FastChecksum, EqualsChecksum64AtEverySizeOnEveryTarget) {
  for_each_target([](const char* target) {
    for (const std::size_t size : kSizes) {
      const auto bytes = random_bytes(size, 1);
      EXPECT_EQ(fast_checksum64(bytes.data(), size), checksum64(bytes.data(), size)) << size << " bytes, " << target;
    }
  });
}

TEST(FastChecksum, ReadsUnalignedInput) {
  const auto bytes = random_bytes(5000, 2);
  for (std::size_t offset = 0; offset < 65; ++offset) {
    EXPECT_EQ(fast_checksum64(bytes.data() + offset, 4500), checksum64(bytes.data() + offset, 4500));
  }
}

TEST(StreamCopy, CopiesExactlyTheBytesAtAnyAlignmentOnEveryTarget) {
  for_each_target([](const char* target) {
    const auto source = random_bytes(140000, 3);
    for (const std::size_t size : kSizes) {
      for (const std::size_t offset : {0U, 1U, 31U, 64U}) {
        std::vector<std::uint8_t> destination(size + 192, 0xee);
        stream_copy(destination.data() + offset, source.data() + 7, size);
        EXPECT_EQ(std::memcmp(destination.data() + offset, source.data() + 7, size), 0) << size << " bytes, " << target;
        for (std::size_t i = 0; i < offset; ++i) ASSERT_EQ(destination[i], 0xee);
        for (std::size_t i = offset + size; i < destination.size(); ++i) ASSERT_EQ(destination[i], 0xee);
      }
    }
  });
}

TEST(StreamCopyChecksum, CopiesAndHashesAtAnyAlignmentOnEveryTarget) {
  for_each_target([](const char* target) {
    const auto source = random_bytes(140000, 4);
    for (const std::size_t size : kSizes) {
      for (const std::size_t offset : {0U, 1U, 31U, 64U}) {
        std::vector<std::uint8_t> storage(size + 256, 0xee);
        auto* base = storage.data() + (64 - reinterpret_cast<std::uintptr_t>(storage.data()) % 64) % 64 + offset;
        EXPECT_EQ(stream_copy_checksum(base, source.data() + 3, size), checksum64(source.data() + 3, size))
            << size << " bytes, " << target;
        EXPECT_EQ(std::memcmp(base, source.data() + 3, size), 0) << size << " bytes, " << target;
        EXPECT_EQ(base[size], 0xee);
      }
    }
  });
}

RC_GTEST_PROP(Checksum64, IsTheSameHoweverTheInputIsCutAndCopied, (std::vector<std::uint16_t> cuts)) {
  Checksum64 checksum;
  std::vector<std::uint8_t> all;
  std::vector<std::uint8_t> copies;
  std::uint32_t seed = 0;
  for (const std::uint16_t cut : cuts) {
    // Multiples of 64 take the fast path and are what callers use: half of the pieces.
    const std::size_t size = seed % 2 == 0 ? cut % 4096U : cut % 64U * 64U;
    const auto piece = random_bytes(size, ++seed);
    std::vector<std::uint8_t> copy(size);
    if (seed % 3 == 0) {
      checksum.update(piece.data(), size);
      copy = piece;
    } else if (seed % 3 == 1) {
      checksum.copy(copy.data(), piece.data(), size);
    } else {
      checksum.stream_copy(copy.data(), piece.data(), size);
    }
    all.insert(all.end(), piece.begin(), piece.end());
    copies.insert(copies.end(), copy.begin(), copy.end());
    RC_ASSERT(checksum.digest() == checksum64(all.data(), all.size()));
  }
  RC_ASSERT(all == copies);
}

}  // namespace
}  // namespace kvern
