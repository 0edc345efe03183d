#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "tests/kernels/samples.h"

namespace kvern {
namespace {

/// Containers as versions of Kvern wrote them. They stay as they are for ever; a new version of the format adds files.
Bytes golden(const std::string& name) {
  std::ifstream file(std::string(KVERN_GOLDEN_DIR) + "/" + name, std::ios::binary);
  const std::vector<char> chars{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto bytes = std::as_bytes(std::span(chars));
  return {bytes.begin(), bytes.end()};
}

ShardShape golden_shape() { return sample_shape(DType::kBFloat16, 12, 32, 16, 2, 2); }

/// Finite bf16 values by a rule that no library can change.
Bytes golden_canonical() {
  Bytes bytes(golden_shape().raw_bytes());
  std::uint64_t state = 20;
  for (std::size_t i = 0; i < bytes.size() / 2; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    const auto bits = static_cast<std::uint16_t>(state >> 48);
    // Exponents of 2^-3 to 2^4, so that codes of every size occur.
    const auto value = static_cast<std::uint16_t>((bits & 0x807FU) | ((124U + (bits >> 7 & 7U)) << 7));
    std::memcpy(bytes.data() + 2 * i, &value, sizeof value);
  }
  return bytes;
}

struct Sample {
  const char* name;
  const char* spec;
  std::uint64_t decoded;      ///< checksum of what the first version decoded
  bool written_alike = true;  ///< false where another version of a library may write other bytes
  int version = 1;
};

ContainerInfo golden_info(const Sample& sample) {
  ContainerInfo info = sample_info(golden_shape(), 4);
  for (std::uint32_t layer = 0; sample.version == 2 && layer < info.group_layers; ++layer) {
    info.layer_slots.push_back(4 * (layer + 1));
  }
  return info;
}

std::ostream& operator<<(std::ostream& out, const Sample& sample) { return out << sample.spec; }

class GoldenContainer : public ::testing::TestWithParam<Sample> {
 protected:
  Bytes stored() const {
    return golden("container_v" + std::to_string(GetParam().version) + "_" + GetParam().name + ".bin");
  }
};

TEST_P(GoldenContainer, StaysReadable) {
  AlignedBytes bytes(stored());
  ASSERT_FALSE(bytes.span().empty());
  const auto reader = ContainerReader::parse(bytes.span());
  ASSERT_TRUE(reader) << reader.error().to_string();
  EXPECT_EQ(reader->info().shape, golden_shape());
  EXPECT_EQ(reader->info().key, golden_info(GetParam()).key);
  EXPECT_EQ(reader->info().block_hashes, golden_info(GetParam()).block_hashes);
  EXPECT_EQ(reader->info().layer_slots, golden_info(GetParam()).layer_slots);
  CollectingSink sink(golden_shape());
  ASSERT_TRUE(decode_all(*reader, sink));
  EXPECT_TRUE(sink.every_byte_written_once());
  if (reader->codec().lossless()) {
    EXPECT_EQ(sink.bytes(), golden_canonical());
  }
  EXPECT_EQ(checksum64(as_uint8(sink.bytes())), GetParam().decoded);
}

TEST_P(GoldenContainer, IsWhatIsWrittenToday) {
  if (!GetParam().written_alike) GTEST_SKIP() << "depends on the version of a library";
  const Bytes written =
      encode_sample(*make_codec(GetParam().spec).value(), golden_info(GetParam()), golden_canonical());
  EXPECT_EQ(written, stored());
}

INSTANTIATE_TEST_SUITE_P(
    Version1, GoldenContainer,
    ::testing::Values(Sample{"raw", "raw", 0x8bad4f886e34f95aU}, Sample{"int8", "int8", 0xbf06c142fa2c008fU},
                      Sample{"zstd", "raw | zstd", 0x8bad4f886e34f95aU, false},
                      Sample{"unrotate", "unrotate(theta=10000,dim=32) | int8", 0x9e5c4926ec3c6ea5U}));
INSTANTIATE_TEST_SUITE_P(Version2, GoldenContainer,
                         ::testing::Values(Sample{"int8", "int8", 0xbf06c142fa2c008fU, true, 2}));

}  // namespace
}  // namespace kvern
