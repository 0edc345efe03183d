#include "kernels/container.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "kernels/checksum.h"
#include "tests/kernels/samples.h"

namespace kvern {
namespace {

using ::testing::HasSubstr;

std::shared_ptr<const Codec> codec_of(std::string_view spec) { return make_codec(spec).value(); }

Result<ContainerReader> parse(AlignedBytes& bytes) { return ContainerReader::parse(bytes.span()); }

/// Puts the header's checksum right again after a field was changed.
void seal(std::span<std::byte> container) {
  std::uint32_t header_bytes = 0;
  std::memcpy(&header_bytes, container.data() + 12, sizeof header_bytes);
  const std::uint64_t checksum = checksum64(container.data(), header_bytes - 8);
  std::memcpy(container.data() + header_bytes - 8, &checksum, sizeof checksum);
}

TEST(Container, GivesBackWhatItWasTold) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 96, 64, 64);
  ContainerInfo info = sample_info(shape, 32);
  info.previous_tag = 0x12345678;
  const Bytes canonical = sample_canonical(shape, 1);
  AlignedBytes bytes(encode_sample(*codec_of("raw"), info, canonical));
  const auto reader = parse(bytes);
  ASSERT_TRUE(reader) << reader.error().to_string();
  EXPECT_EQ(reader->info().previous_tag, 0x12345678U);
  EXPECT_EQ(reader->info().key, info.key);
  EXPECT_EQ(reader->info().shape, shape);
  EXPECT_EQ(reader->info().block_tokens, 32U);
  EXPECT_EQ(reader->info().group_layers, info.group_layers);
  EXPECT_EQ(reader->info().model_heads, info.model_heads);
  EXPECT_EQ(reader->info().position, 4096U);
  EXPECT_EQ(reader->info().block_hashes, info.block_hashes);
  EXPECT_EQ(reader->info().codec_spec, "raw");
  EXPECT_EQ(reader->info().lossy_generations, 1U);
  EXPECT_EQ(reader->size_bytes(), bytes.span().size());
  EXPECT_TRUE(reader->verify());
}

TEST(Container, ItsStartTellsWhatItIs) {
  const ContainerInfo info = sample_info(sample_shape(DType::kBFloat16, 96, 64, 64), 32);
  const Bytes container = encode_sample(*codec_of("raw"), info, sample_canonical(info.shape, 1));
  const auto peeked = peek_container_info(std::span(container).first(512));
  ASSERT_TRUE(peeked.has_value());
  EXPECT_EQ(peeked->key, info.key);
  EXPECT_EQ(peeked->position, info.position);
  EXPECT_EQ(peeked->shape, info.shape);
  EXPECT_EQ(peeked->block_hashes, info.block_hashes);
  std::size_t shortest = 0;
  while (!peek_container_info(std::span(container).first(shortest))) ++shortest;
  EXPECT_GT(shortest, 112U);
  EXPECT_LT(shortest, 512U);
  for (std::size_t bit = 0; bit < 8 * shortest; ++bit) {
    Bytes damaged(container.begin(), container.begin() + static_cast<std::ptrdiff_t>(shortest));
    damaged[bit / 8] ^= std::byte{1} << (bit % 8);
    static_cast<void>(peek_container_info(damaged));  // must not read beyond its bytes
  }
}

/// As of a compact cache of which one layer keeps more than the others.
ContainerInfo ragged_info() {
  ContainerInfo info = sample_info(sample_shape(DType::kBFloat16, 96, 64, 64), 32);
  info.layer_slots.assign(info.group_layers, 96);
  info.layer_slots[1] = 160;
  return info;
}

TEST(Container, SlotsOfLayersMakeItVersion2) {
  const ContainerInfo info = ragged_info();
  const auto version_of = [](std::span<const std::byte> container) { return std::to_integer<int>(container[8]); };
  for (const char* spec : {"raw", "int8"}) {
    AlignedBytes bytes(encode_sample(*codec_of(spec), info, sample_canonical(info.shape, 1)));
    EXPECT_EQ(version_of(bytes.span()), 2);
    const auto reader = parse(bytes);
    ASSERT_TRUE(reader) << reader.error().to_string();
    EXPECT_EQ(reader->info().layer_slots, info.layer_slots);
    EXPECT_EQ(reader->info().block_hashes, info.block_hashes);
    EXPECT_TRUE(reader->verify());
    const auto peeked = peek_container_info(bytes.span());
    ASSERT_TRUE(peeked.has_value());
    EXPECT_EQ(peeked->layer_slots, info.layer_slots);
    for (std::size_t cut = 0; cut < 512; ++cut) {
      const auto part = peek_container_info(bytes.span().first(cut));
      EXPECT_TRUE(!part || part->layer_slots == info.layer_slots);
    }
  }
  const ContainerInfo plain = sample_info(info.shape, 32);
  EXPECT_EQ(version_of(encode_sample(*codec_of("raw"), plain, sample_canonical(info.shape, 1))), 1);
}

TEST(Container, SlotsOfLayersThatCannotBeAreRefused) {
  const ContainerInfo good = ragged_info();
  std::vector<std::vector<std::uint32_t>> wrong(4, good.layer_slots);
  wrong[0].pop_back();
  wrong[1].push_back(96);
  wrong[2][0] = 0;
  wrong[3][0] = 95;
  Bytes out(1U << 20);
  for (const auto& slots : wrong) {
    ContainerInfo info = good;
    info.layer_slots = slots;
    const auto made = encode_container(*codec_of("raw"), info, sample_canonical(info.shape, 1), {}, out);
    ASSERT_FALSE(made);
    EXPECT_EQ(made.error().code(), Code::kInvalid);
  }
}

TEST(Container, SectionsAreOnePlaneEachAndAligned) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 5, 80, 48);
  AlignedBytes bytes(encode_sample(*codec_of("raw"), sample_info(shape, 1), sample_canonical(shape, 2)));
  const auto reader = parse(bytes);
  ASSERT_TRUE(reader);
  ASSERT_EQ(reader->sections().size(), plane_count(shape));
  for (const SectionInfo& section : reader->sections()) {
    EXPECT_EQ(section.offset % 64, 0U);
    EXPECT_EQ(section.extent.layers, 1U);
    EXPECT_EQ(section.extent.heads, 1U);
    EXPECT_NE(section.extent.has_key, section.extent.has_value);
  }
}

struct ShapeCase {
  DType dtype;
  std::uint32_t tokens;
  std::uint32_t key_dim;
  std::uint32_t value_dim;
};

const std::vector<ShapeCase> kShapes = {
    {DType::kBFloat16, 1, 64, 64},    {DType::kBFloat16, 65, 80, 80},    {DType::kFloat16, 63, 96, 96},
    {DType::kFloat32, 128, 112, 112}, {DType::kBFloat16, 256, 128, 128}, {DType::kFloat16, 130, 192, 128},
    {DType::kFloat32, 33, 256, 256},  {DType::kBFloat16, 200, 576, 512}, {DType::kFloat16, 7, 20, 35},
    {DType::kBFloat16, 64, 64, 0},    {DType::kOpaqueBytes, 31, 1000, 7}};

TEST(RawContainer, RestoresEveryShapeBitForBit) {
  for (const ShapeCase& c : kShapes) {
    const ShardShape shape = sample_shape(c.dtype, c.tokens, c.key_dim, c.value_dim);
    const Bytes canonical = sample_canonical(shape, c.tokens);
    AlignedBytes bytes(encode_sample(*codec_of("raw"), sample_info(shape, 1), canonical));
    const auto reader = parse(bytes);
    ASSERT_TRUE(reader) << reader.error().to_string();
    for (const std::uint32_t rows : {0U, 1U, 16U, 32U}) {
      CollectingSink sink(shape, rows);
      ASSERT_TRUE(decode_all(*reader, sink));
      EXPECT_EQ(sink.bytes(), canonical);
      EXPECT_TRUE(sink.every_byte_written_once());
      EXPECT_FALSE(sink.misplaced());
    }
  }
}

TEST(RawContainer, CarriesNanAndInfinityBitForBit) {
  const ShardShape shape = sample_shape(DType::kFloat32, 16, 64, 64);
  Bytes canonical = sample_canonical(shape, 5);
  const float values[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          std::bit_cast<float>(0xFFC12345U), -0.0F};
  std::memcpy(canonical.data() + 640, values, sizeof values);
  AlignedBytes bytes(encode_sample(*codec_of("raw"), sample_info(shape, 16), canonical));
  CollectingSink sink(shape);
  ASSERT_TRUE(decode_all(parse(bytes).value(), sink));
  EXPECT_EQ(sink.bytes(), canonical);
}

TEST(Container, DecodesTheAskedLayersHeadsAndTokensOnly) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 96, 64, 80, 4, 4);
  for (const char* spec : {"raw", "int8", "int8(group=16)"}) {
    AlignedBytes bytes(encode_sample(*codec_of(spec), sample_info(shape, 32), sample_canonical(shape, 6)));
    const auto reader = parse(bytes);
    ASSERT_TRUE(reader);
    CollectingSink whole(shape);
    ASSERT_TRUE(decode_all(*reader, whole));
    // Model numbers: the shard holds layers 3 to 6 and heads 4 to 7.
    const std::uint32_t layers[][2] = {{0, 1}, {3, 4}, {0, 5}, {5, 100}, {4, 4}, {7, 9}};
    const std::uint32_t heads[][2] = {{4, 8}, {0, 5}, {6, 7}, {7, 20}, {0, 4}};
    const TokenRange ranges[] = {{0, 96}, {0, 1}, {95, 96}, {31, 65}, {64, 64}, {5, 90}};
    for (const auto& l : layers) {
      for (const auto& h : heads) {
        for (const TokenRange range : ranges) {
          CollectingSink sink(shape, 16);
          ASSERT_TRUE(reader->decode(l[0], l[1], h[0], h[1], range, sink));
          EXPECT_FALSE(sink.misplaced());
          for (std::uint32_t layer = 0; layer < 4; ++layer) {
            for (const Part part : {Part::kKey, Part::kValue}) {
              for (std::uint32_t head = 0; head < 4; ++head) {
                for (std::uint32_t token = 0; token < 96; ++token) {
                  const bool asked = layer + 3 >= l[0] && layer + 3 < l[1] && head + 4 >= h[0] && head + 4 < h[1] &&
                                     token >= range.begin && token < range.end;
                  const std::size_t at = shape.plane_offset(layer, part, head) + token * shape.row_bytes(part);
                  ASSERT_EQ(sink.written()[at], asked ? 1 : 0);
                  if (asked) {
                    ASSERT_EQ(std::memcmp(&sink.bytes()[at], &whole.bytes()[at], shape.row_bytes(part)), 0);
                  }
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(Container, RefusesTokenRangesOutsideTheChunk) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 16, 64, 64);
  AlignedBytes bytes(encode_sample(*codec_of("raw"), sample_info(shape, 16), sample_canonical(shape, 7)));
  const auto reader = parse(bytes);
  CollectingSink sink(shape);
  EXPECT_EQ(reader->decode(0, 9, 0, 9, {0, 17}, sink).code(), Code::kInvalid);
  EXPECT_EQ(reader->decode(0, 9, 0, 9, {9, 8}, sink).code(), Code::kInvalid);
  EXPECT_TRUE(sink.nothing_written());
}

TEST(EncodeContainer, RefusesInputThatDiffersFromItsChecksums) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 64, 64, 64);
  const ContainerInfo info = sample_info(shape, 32);
  for (const std::string& name : sample_specs()) {
    const auto codec = codec_of(name);
    AlignedBytes out(container_max_bytes(*codec, info));
    for (const std::size_t position : {std::size_t{0}, shape.raw_bytes() / 2, shape.raw_bytes() - 1}) {
      Bytes canonical = sample_canonical(shape, 8);
      const auto checksums = sample_checksums(shape, canonical);
      canonical[position] ^= std::byte{1};
      const auto result = encode_container(*codec, info, canonical, checksums, out.span());
      ASSERT_FALSE(result);
      EXPECT_EQ(result.error().code(), Code::kCorrupt);
      EXPECT_THAT(result.error().message(), HasSubstr("layer"));
      EXPECT_TRUE(encode_container(*codec, info, canonical, {}, out.span()));
    }
  }
}

TEST(EncodeContainer, RefusesArgumentsThatContradictEachOther) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 64, 64, 64);
  const Bytes canonical = sample_canonical(shape, 9);
  const auto codec = codec_of("raw");
  AlignedBytes out(container_max_bytes(*codec, sample_info(shape, 32)));
  const auto code = [&](const ContainerInfo& info, std::size_t input, std::size_t output) {
    const auto result = encode_container(*codec, info, std::span(canonical).first(input), {}, out.span().first(output));
    return result ? Code::kOk : result.error().code();
  };
  const std::size_t all = canonical.size();
  const std::size_t room = out.span().size();
  EXPECT_EQ(code(sample_info(shape, 32), all, room), Code::kOk);
  EXPECT_EQ(code(sample_info(shape, 32), all - 1, room), Code::kInvalid);
  EXPECT_EQ(code(sample_info(shape, 32), all, room - 1), Code::kInvalid);
  ContainerInfo info = sample_info(shape, 32);
  info.block_tokens = 16;
  EXPECT_EQ(code(info, all, room), Code::kInvalid);
  info = sample_info(shape, 32);
  info.key.last_block = info.block_hashes.front();
  EXPECT_EQ(code(info, all, room), Code::kInvalid);
  info = sample_info(shape, 32);
  info.group_layers = 4;
  EXPECT_EQ(code(info, all, room), Code::kInvalid);
  info = sample_info(shape, 32);
  info.model_heads = 5;
  EXPECT_EQ(code(info, all, room), Code::kInvalid);
}

TEST(ShardShape, RefusesNumbersWhoseProductWraps) {
  // 2 * layers * heads is 254,112 in 64 bits.
  const ShardShape shape{DType::kBFloat16, 0, 3'037'012'556, 0, 3'036'988'444, 1, 1, 1};
  EXPECT_EQ(shape.validate().code(), Code::kInvalid);
  EXPECT_EQ((ShardShape{DType::kBFloat16, 0, 1, 0, 1U << 19, 1, 1, 1}).validate().code(), Code::kInvalid);
  EXPECT_TRUE((ShardShape{DType::kBFloat16, 0, 1, 0, 1, 1, 1, 1}).validate());
}

TEST(ContainerReader, RefusesANewerVersionInASentence) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 16, 64, 64);
  AlignedBytes bytes(encode_sample(*codec_of("raw"), sample_info(shape, 16), sample_canonical(shape, 10)));
  const auto set_version = [&](std::uint32_t version) {
    std::memcpy(bytes.span().data() + 8, &version, sizeof version);
  };
  set_version(kContainerVersion + 1);
  EXPECT_EQ(parse(bytes).error().code(), Code::kCorrupt) << "a flipped bit is not a newer version";
  set_version(2);
  seal(bytes.span());
  EXPECT_EQ(parse(bytes).error().code(), Code::kCorrupt) << "it has no slots of layers";
  set_version(kContainerVersion + 1);
  seal(bytes.span());
  const auto result = parse(bytes);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), Code::kRefused);
  EXPECT_THAT(result.error().message(), HasSubstr("newer Kvern"));
}

TEST(ContainerReader, RefusesAnUnknownCodecInASentence) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 16, 64, 64);
  AlignedBytes bytes(encode_sample(*codec_of("raw"), sample_info(shape, 16), sample_canonical(shape, 10)));
  bytes.span()[112] = std::byte{'R'};
  seal(bytes.span());
  const auto result = parse(bytes);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), Code::kRefused);
  EXPECT_THAT(result.error().message(), HasSubstr("'Raw'"));
}

TEST(ContainerReader, RefusesEveryTruncation) {
  const ShardShape shape = sample_shape(DType::kFloat16, 3, 16, 16, 1, 1);
  for (const std::string& name : sample_specs()) {
    const Bytes whole = encode_sample(*codec_of(name), sample_info(shape, 1), sample_canonical(shape, 11));
    for (std::size_t size = 0; size < whole.size(); ++size) {
      AlignedBytes bytes(std::span<const std::byte>(whole).first(size));
      const auto result = parse(bytes);
      ASSERT_FALSE(result) << size << " of " << whole.size() << " bytes";
      EXPECT_EQ(result.error().code(), Code::kCorrupt);
    }
  }
}

TEST(ContainerReader, NeverReportsWrongRowsWhateverBitIsFlipped) {
  const ShardShape shape = sample_shape(DType::kFloat16, 3, 16, 16, 2, 1);
  for (const std::string& name : sample_specs()) {
    const Bytes whole = encode_sample(*codec_of(name), sample_info(shape, 1), sample_canonical(shape, 12));
    AlignedBytes bytes(whole);
    CollectingSink right(shape);
    ASSERT_TRUE(decode_all(parse(bytes).value(), right));
    std::size_t harmless = 0;
    for (std::size_t position = 0; position < whole.size(); ++position) {
      for (int bit = 0; bit < 8; ++bit) {
        bytes.span()[position] ^= static_cast<std::byte>(1 << bit);
        if (const auto reader = parse(bytes)) {
          CollectingSink sink(shape);
          if (decode_all(*reader, sink)) {
            ASSERT_EQ(sink.bytes(), right.bytes()) << "byte " << position << " bit " << bit;
            ++harmless;
          }
        }
        bytes.span()[position] ^= static_cast<std::byte>(1 << bit);
      }
    }
    // Only the padding behind a section may change without notice.
    EXPECT_LE(harmless, 8U * 63U * plane_count(shape));
  }
}

TEST(ContainerReader, SurvivesLiesUnderAGoodChecksum) {
  const ShardShape shape = sample_shape(DType::kFloat16, 4, 16, 16, 2, 1);
  for (const std::string& name : sample_specs()) {
    const Bytes whole = encode_sample(*codec_of(name), sample_info(shape, 1), sample_canonical(shape, 13));
    std::uint32_t header_bytes = 0;
    std::memcpy(&header_bytes, whole.data() + 12, sizeof header_bytes);
    for (std::size_t position = 16; position < header_bytes - 8; ++position) {
      for (const int value : {0, 1, 0x7f, 0x80, 0xff}) {
        AlignedBytes bytes(whole);
        bytes.span()[position] = static_cast<std::byte>(value);
        seal(bytes.span());
        const auto reader = parse(bytes);
        if (!reader) continue;
        CollectingSink sink(reader->info().shape);
        const Status decoded = decode_all(*reader, sink);
        EXPECT_TRUE(decoded || decoded.code() == Code::kCorrupt) << decoded.to_string();
        EXPECT_FALSE(sink.misplaced());
      }
    }
  }
}

RC_GTEST_PROP(ContainerReader, RefusesRandomBytes, (std::vector<std::uint8_t> noise, bool with_magic)) {
  AlignedBytes bytes(std::as_bytes(std::span(noise)));
  if (with_magic) std::memcpy(bytes.span().data(), "KVERNBOX", std::min<std::size_t>(8, noise.size()));
  RC_ASSERT(!parse(bytes));
}

TEST(Codec, DecodesNothingOfHeadsThatWereNotAskedFor) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 16, 64, 64);
  for (const std::string& name : sample_specs()) {
    AlignedBytes bytes(encode_sample(*codec_of(name), sample_info(shape, 16), sample_canonical(shape, 15)));
    const auto reader = parse(bytes);
    const SectionInfo& section = reader->sections()[1];
    ASSERT_EQ(section.extent.head, 1U);
    const auto payload = bytes.span().subspan(section.offset, section.bytes);
    for (const auto& [first, last] : {std::pair{0U, 1U}, std::pair{2U, 9U}}) {
      CollectingSink sink(shape);
      EXPECT_TRUE(reader->codec().decode(shape, section.extent, payload, {0, 16}, first, last, sink));
      EXPECT_TRUE(sink.nothing_written());
    }
  }
}

TEST(ContainerReader, NamesTheSectionThatFails) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 16, 64, 64);
  AlignedBytes bytes(encode_sample(*codec_of("raw"), sample_info(shape, 16), sample_canonical(shape, 14)));
  const auto reader = parse(bytes);
  const SectionInfo& section = reader->sections()[6];
  bytes.span()[section.offset + 9] ^= std::byte{4};
  CollectingSink sink(shape);
  const Status status = decode_all(*reader, sink);
  EXPECT_EQ(status.code(), Code::kCorrupt);
  EXPECT_THAT(status.message(), HasSubstr("section 6 (layer 1, V, head 0)"));
  EXPECT_EQ(reader->verify().code(), Code::kCorrupt);
  CollectingSink other(shape);
  EXPECT_TRUE(reader->decode(3, 4, 0, 99, {0, 16}, other)) << "other sections stay readable";
}

}  // namespace
}  // namespace kvern
