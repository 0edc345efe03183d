#include "base/keys.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <vector>

namespace kvern {
namespace {

RC_GTEST_PROP(Hex, RoundTrips, (const std::vector<std::uint8_t>& bytes)) {
  const auto back = from_hex(to_hex(bytes));
  RC_ASSERT(back.has_value());
  RC_ASSERT(std::vector<std::uint8_t>(back->begin(), back->end()) == bytes);
}

TEST(Hex, RefusesWhatIsNotHexadecimal) {
  EXPECT_FALSE(from_hex("abc").has_value());
  EXPECT_FALSE(from_hex("zz").has_value());
}

TEST(BlockHash, RefusesEmptyAndTooLong) {
  EXPECT_FALSE(BlockHash::from_bytes({}).has_value());
  EXPECT_FALSE(BlockHash::from_bytes(std::vector<std::uint8_t>(65)).has_value());
  EXPECT_TRUE(BlockHash::from_bytes(std::vector<std::uint8_t>(64)).has_value());
}

TEST(Fingerprint, DependsOnNamespaceGroupAndHash) {
  const std::vector<std::uint8_t> hash(32, 7);
  NamespaceId one;
  NamespaceId other;
  other.bytes[0] = 1;
  const auto fingerprint = block_fingerprint(one, 0, hash);
  EXPECT_NE(fingerprint, block_fingerprint(other, 0, hash));
  EXPECT_NE(fingerprint, block_fingerprint(one, 1, hash));
  EXPECT_NE(fingerprint, block_fingerprint(one, 0, std::vector<std::uint8_t>(32, 8)));
  EXPECT_EQ(fingerprint, block_fingerprint(one, 0, hash));
  EXPECT_GE(fingerprint, 2U);
}

}  // namespace
}  // namespace kvern
