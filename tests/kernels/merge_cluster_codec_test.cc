#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "kernels/align.h"
#include "kernels/codec.h"
#include "kernels/container.h"
#include "profile_samples.h"
#include "samples.h"
#include "targets.h"

namespace kvern {
namespace {

using testing::HasSubstr;

std::shared_ptr<const Codec> codec_of(const std::string& spec) {
  auto codec = make_codec(spec);
  if (!codec) throw std::runtime_error(codec.error().to_string());
  return *codec;
}

/// Layers whose values differ by a little noise, so that pairs pass the gate.
Bytes similar_layers(const ShardShape& shape, std::uint32_t seed, float noise = 0.3F) {
  Bytes bytes = sample_canonical(shape, seed);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  const std::size_t element = dtype_bytes(shape.dtype);
  const std::size_t layer = shape.layer_bytes();
  for (std::size_t i = layer; i < bytes.size(); i += element) {
    const float value = element_at(shape.dtype, bytes.data(), i % layer / element) + noise * normal(generator);
    std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    if (shape.dtype == DType::kBFloat16) bits = to_bfloat16(value);
    if (shape.dtype == DType::kFloat16) bits = to_float16(value);
    std::memcpy(bytes.data() + i, &bits, element);
  }
  return bytes;
}

std::vector<float> floats_of(const ShardShape& shape, const Bytes& bytes, std::uint32_t layer, Part part) {
  std::vector<float> out(shape.heads * shape.plane_bytes(part) / dtype_bytes(shape.dtype));
  const std::byte* from = bytes.data() + shape.plane_offset(layer, part, 0);
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = element_at(shape.dtype, from, i);
  return out;
}

/// Frobenius norm of the difference over that of the original.
float relative_error(const std::vector<float>& got, const std::vector<float>& expected) {
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(double{got[i]} - double{expected[i]}, 2);
    norm += std::pow(double{expected[i]}, 2);
  }
  return static_cast<float>(std::sqrt(difference / norm));
}

Bytes round_trip(const Codec& codec, const ShardShape& shape, const Bytes& canonical) {
  const ContainerInfo info = sample_info(shape, shape.tokens);
  AlignedBytes container(encode_sample(codec, info, canonical));
  const auto reader = ContainerReader::parse(container.span());
  if (!reader) throw std::runtime_error(reader.error().to_string());
  CollectingSink sink(shape);
  const Status status = decode_all(*reader, sink);
  EXPECT_TRUE(status) << status.to_string();
  EXPECT_TRUE(sink.every_byte_written_once());
  return sink.bytes();
}

/// One section's bytes, as encode() writes them.
Bytes encoded(const Codec& codec, const ShardShape& shape, const SectionPlan& section, const Bytes& canonical) {
  Bytes planes;
  for (std::uint32_t layer = section.extent.layer; layer < section.extent.layer + section.extent.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      if (part == Part::kKey ? !section.extent.has_key : !section.extent.has_value) continue;
      const auto* from = canonical.data() + shape.plane_offset(layer, part, section.extent.head);
      planes.insert(planes.end(), from, from + section.extent.heads * shape.plane_bytes(part));
    }
  }
  AlignedBytes in(planes);
  AlignedBytes out(section.max_bytes);
  const auto size = codec.encode(shape, section.extent, in.span(), out.span());
  if (!size) throw std::runtime_error(size.error().to_string());
  return {out.span().begin(), out.span().begin() + static_cast<std::ptrdiff_t>(*size)};
}

TEST(MinicacheCodec, MergedLayersAreNearTheOriginalsAndTakeHalfTheBytes) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 128, 64, 64, 4, 2);
  const Bytes canonical = similar_layers(shape, 1);
  for (const std::string inner : {"raw", "int8"}) {
    const auto codec = codec_of("minicache(start=3,k=1) | " + inner);
    const Bytes back = round_trip(*codec, shape, canonical);
    for (std::uint32_t layer = 0; layer < 4; ++layer) {
      for (const Part part : {Part::kKey, Part::kValue}) {
        EXPECT_LT(relative_error(floats_of(shape, back, layer, part), floats_of(shape, canonical, layer, part)), 0.2F)
            << inner << " layer " << layer;
      }
    }
    const ContainerInfo info = sample_info(shape, shape.tokens);
    const double all = static_cast<double>(encode_sample(*codec_of(inner), info, canonical).size());
    EXPECT_LT(static_cast<double>(encode_sample(*codec, info, canonical).size()), 0.65 * all) << inner;
  }
}

TEST(MinicacheCodec, LayersBeforeTheStartAndTheLastOddOneAreExact) {
  const ShardShape shape = sample_shape(DType::kFloat16, 64, 64, 80, 5, 2);
  const Bytes canonical = similar_layers(shape, 2);
  // The shard's layers are 3 to 7 of the group: pairs are (5, 6), and 7 is left.
  const Bytes back = round_trip(*codec_of("minicache(start=5,k=1) | raw"), shape, canonical);
  for (const std::uint32_t layer : {0U, 1U, 4U}) {
    const std::size_t begin = layer * shape.layer_bytes();
    EXPECT_TRUE(std::equal(back.begin() + static_cast<std::ptrdiff_t>(begin),
                           back.begin() + static_cast<std::ptrdiff_t>(begin + shape.layer_bytes()),
                           canonical.begin() + static_cast<std::ptrdiff_t>(begin)));
  }
  EXPECT_NE(back, canonical);
}

TEST(MinicacheCodec, KeysStayExactUnlessAskedFor) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 64, 64, 64, 2, 2);
  const Bytes canonical = similar_layers(shape, 3);
  const Bytes back = round_trip(*codec_of("minicache(start=3) | raw"), shape, canonical);
  for (const std::uint32_t layer : {0U, 1U}) {
    EXPECT_EQ(floats_of(shape, back, layer, Part::kKey), floats_of(shape, canonical, layer, Part::kKey));
    EXPECT_NE(floats_of(shape, back, layer, Part::kValue), floats_of(shape, canonical, layer, Part::kValue));
  }
}

TEST(MinicacheCodec, HalfOfAPairIsLeftAlone) {
  // Layers 3 and 4 of the group; the pairs are (2, 3) and (4, 5).
  const ShardShape shape = sample_shape(DType::kBFloat16, 32, 64, 64, 2, 1);
  const auto codec = codec_of("minicache(start=2,k=1) | raw");
  for (const SectionPlan& section : codec->plan(shape)) EXPECT_EQ(section.extent.layers, 1U);
  const Bytes canonical = similar_layers(shape, 4);
  EXPECT_EQ(round_trip(*codec, shape, canonical), canonical);
}

TEST(MinicacheCodec, PairsThatDifferTooMuchAreStoredApart) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 64, 64, 64, 2, 2);
  const Bytes canonical = sample_canonical(shape, 5);  // right angles
  EXPECT_EQ(round_trip(*codec_of("minicache(start=3,k=1) | raw"), shape, canonical), canonical);
  EXPECT_NE(round_trip(*codec_of("minicache(start=3,k=1,max_angle=180) | raw"), shape, canonical), canonical);
}

TEST(MinicacheCodec, WholeRetentionKeepsEveryBit) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const ShardShape shape = sample_shape(dtype, 50, 64, 64, 2, 2);
    const Bytes canonical = similar_layers(shape, 6);
    EXPECT_EQ(round_trip(*codec_of("minicache(start=3,k=1,retain=1) | int8"), shape, canonical), canonical);
  }
}

TEST(MinicacheCodec, RetainedTokensAreExactWithALossyForm) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 60, 64, 0, 2, 1);
  Bytes canonical = similar_layers(shape, 7);
  // One key without a direction in each layer.
  std::memset(canonical.data() + shape.plane_offset(0, Part::kKey, 0) + 7 * 128, 0, 128);
  std::memset(canonical.data() + shape.plane_offset(1, Part::kKey, 0) + 9 * 128, 0, 128);
  const Bytes back = round_trip(*codec_of("minicache(start=3,k=1) | int8"), shape, canonical);
  for (const std::size_t token : {7U, 9U}) {
    for (const std::uint32_t layer : {0U, 1U}) {
      const std::size_t at = shape.plane_offset(layer, Part::kKey, 0) + token * 128;
      EXPECT_EQ(std::memcmp(back.data() + at, canonical.data() + at, 128), 0);
    }
  }
}

TEST(MinicacheCodec, ManyForcedTokensAreStoredApart) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 64, 64, 0, 2, 1);
  Bytes canonical = similar_layers(shape, 8);
  std::memset(canonical.data(), 0, shape.plane_bytes(Part::kKey) / 2);
  EXPECT_EQ(round_trip(*codec_of("minicache(start=3,k=1) | raw"), shape, canonical), canonical);
}

TEST(MinicacheCodec, NotANumberIsCarriedByRawAndRefusedOtherwise) {
  const ShardShape shape = sample_shape(DType::kFloat32, 32, 64, 0, 2, 1);
  Bytes canonical = similar_layers(shape, 9);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(canonical.data() + 3 * 256, &nan, sizeof nan);
  const Bytes back = round_trip(*codec_of("minicache(start=3,k=1) | raw"), shape, canonical);
  EXPECT_EQ(std::memcmp(back.data() + 3 * 256, canonical.data() + 3 * 256, 256), 0);
  const ContainerInfo info = sample_info(shape, 32);
  const auto codec = codec_of("minicache(start=3,k=1) | int8");
  AlignedBytes out(container_max_bytes(*codec, info));
  EXPECT_EQ(encode_container(*codec, info, canonical, {}, out.span()).error().code(), Code::kInvalid);
}

TEST(MinicacheCodec, SpecIsCanonical) {
  EXPECT_EQ(codec_of("minicache | int8")->spec(),
            "minicache(start=half,t=0.6,retain=0.05,rule=topk,k=0,v=1,max_angle=45,version=1) | "
            "int8(group=64,version=1)");
  EXPECT_EQ(codec_of(std::string(codec_of("minicache(start=4,rule=range,retain=10%) | raw")->spec()))->spec(),
            codec_of("minicache(start=4,rule=range,retain=0.1) | raw")->spec());
  for (const auto* spec :
       {"minicache(start=x) | raw", "minicache(t=2) | raw", "minicache(k=0,v=0) | raw", "minicache(retain=-1) | raw",
        "minicache(rule=all) | raw", "minicache(max_angle=200) | raw"}) {
    EXPECT_EQ(make_codec(spec).error().code(), Code::kInvalid) << spec;
  }
}

/// A profile of 12 layers and 2 heads of 64 with the pair (3, 4).
std::string aligned_step(const std::string& parameters = "") {
  return "minicache(profile=" + align::add_profile("sample", profile_of({3}, 2, 64)).value() + parameters + ")";
}

/// Layer 4 is layer 3 times the matrix, nearly: of all heads together, or of each head by itself.
Bytes turned_layers(const ShardShape& shape, bool whole, std::uint32_t seed) {
  Bytes bytes = sample_canonical(shape, seed);
  const auto noise = random_rows(shape.layer_bytes() / sizeof(float), seed);
  const std::uint32_t together = whole ? shape.heads : 1;
  for (std::uint32_t head = 0; head < shape.heads; head += together) {
    const HeadRows x = HeadRows::contiguous(bytes.data() + shape.plane_offset(0, Part::kKey, head), DType::kFloat32,
                                            together, shape.tokens, 64);
    std::vector<float> y(std::size_t{together} * shape.tokens * 64);
    const auto matrix = whole ? orthogonal(128, 3) : orthogonal(64, 3 + shape.head_begin + head);
    EXPECT_TRUE(align::multiply_rows(x, matrix, y, nullptr));
    for (std::size_t i = 0; i < y.size(); ++i) y[i] += 0.3F * noise[i];
    std::memcpy(bytes.data() + shape.plane_offset(1, Part::kKey, head), y.data(), y.size() * sizeof(float));
  }
  return bytes;
}

TEST(AlignedMinicacheCodec, KeysThatOneMatrixBringsTogetherAreMerged) {
  // All heads of the model, and the second one alone.
  for (const ShardShape& shape :
       {ShardShape{DType::kFloat32, 3, 2, 0, 2, 100, 64, 64}, ShardShape{DType::kFloat32, 3, 2, 1, 1, 100, 64, 64}}) {
    const bool whole = shape.heads == 2;
    const Bytes canonical = turned_layers(shape, whole, 20);
    for (const std::string inner : {"raw", "int8"}) {
      const auto codec = codec_of(aligned_step() + " | " + inner);
      const Bytes back = round_trip(*codec, shape, canonical);
      for (const std::uint32_t layer : {0U, 1U}) {
        EXPECT_LT(
            relative_error(floats_of(shape, back, layer, Part::kKey), floats_of(shape, canonical, layer, Part::kKey)),
            0.15F)
            << inner;
      }
      const ContainerInfo info = sample_info(shape, shape.tokens);
      EXPECT_LT(encode_sample(*codec, info, canonical).size(),
                encode_sample(*codec_of(inner), info, canonical).size() * 9 / 10);
    }
    // Values are exact, and the keys are not near without the matrix.
    const Bytes back = round_trip(*codec_of(aligned_step() + " | raw"), shape, canonical);
    EXPECT_EQ(floats_of(shape, back, 1, Part::kValue), floats_of(shape, canonical, 1, Part::kValue));
    EXPECT_EQ(round_trip(*codec_of("minicache(start=3,k=1,v=0) | raw"), shape, canonical), canonical);
  }
}

TEST(AlignedMinicacheCodec, KeysThatItDoesNotBringTogetherAreStoredApart) {
  const ShardShape shape{DType::kFloat32, 3, 2, 0, 2, 64, 64, 64};
  const Bytes canonical = sample_canonical(shape, 21);
  const Bytes back = round_trip(*codec_of(aligned_step() + " | raw"), shape, canonical);
  EXPECT_LT(relative_error(floats_of(shape, back, 0, Part::kKey), floats_of(shape, canonical, 0, Part::kKey)), 1e-5F);
  EXPECT_EQ(floats_of(shape, back, 1, Part::kKey), floats_of(shape, canonical, 1, Part::kKey));
}

TEST(AlignedMinicacheCodec, PairsAreThoseOfTheProfile) {
  const ShardShape shape{DType::kFloat32, 2, 6, 0, 2, 32, 64, 64};
  std::vector<std::uint32_t> pairs;
  for (const SectionPlan& section : codec_of(aligned_step() + " | raw")->plan(shape)) {
    if (section.extent.layers == 2) pairs.push_back(section.extent.layer);
  }
  EXPECT_EQ(pairs, std::vector<std::uint32_t>{1});
}

TEST(AlignedMinicacheCodec, PositionsAreTakenOutOfTheKeysBefore) {
  const ShardShape shape{DType::kBFloat16, 3, 2, 0, 2, 96, 64, 64};
  const Bytes canonical = sample_canonical(shape, 22);
  const auto codec = codec_of("unrotate(theta=10000,dim=64) | " + aligned_step(",max_angle=180,retain=1") + " | raw");
  const Bytes back = round_trip(*codec, shape, canonical);
  EXPECT_LT(relative_error(floats_of(shape, back, 0, Part::kKey), floats_of(shape, canonical, 0, Part::kKey)), 1e-3F);
  EXPECT_LT(relative_error(floats_of(shape, back, 1, Part::kKey), floats_of(shape, canonical, 1, Part::kKey)), 1e-3F);
}

TEST(AlignedMinicacheCodec, OtherModelsAndKeysWithPositionsAreRefused) {
  const auto codec = codec_of(aligned_step() + " | raw");
  EXPECT_TRUE(codec->accepts({DType::kFloat32, 0, 12, 0, 2, 32, 64, 64}));
  // Before anything is stored, so that a configuration that cannot work is not taken.
  const ShardShape turned{DType::kBFloat16, 3, 2, 0, 2, 32, 64, 64};
  EXPECT_THAT(codec->accepts(turned).message(), HasSubstr("unrotate"));
  EXPECT_TRUE(codec_of("unrotate(theta=10000,dim=64) | " + aligned_step() + " | raw")->accepts(turned));
  EXPECT_THAT(codec->accepts({DType::kFloat32, 0, 12, 0, 2, 32, 80, 64}).message(), HasSubstr("another model"));
  EXPECT_THAT(codec->accepts({DType::kFloat32, 0, 13, 0, 2, 32, 64, 64}).message(), HasSubstr("another model"));
  EXPECT_THAT(codec->accepts({DType::kFloat32, 0, 12, 1, 2, 32, 64, 64}).message(), HasSubstr("another model"));
  EXPECT_EQ(make_codec("minicache(profile=none-00000000) | raw").error().code(), Code::kNotFound);
}

RC_GTEST_PROP(AlignedMinicacheCodec, AnyTokensAndHeadsDecodeToTheirPartOfTheWhole, ()) {
  const auto tokens = *rc::gen::element(1U, 50U, 257U, 300U);
  const auto first_head = *rc::gen::inRange(0U, 2U);
  const ShardShape shape{DType::kFloat32, 3, 2, first_head, 2 - first_head, tokens, 64, 0};
  const Bytes canonical = turned_layers(shape, first_head == 0, *rc::gen::inRange(0U, 1000U));
  const auto codec = codec_of(aligned_step() + " | int8");
  AlignedBytes container(encode_sample(*codec, sample_info(shape, tokens), canonical));
  const auto reader = ContainerReader::parse(container.span());
  RC_ASSERT(reader.has_value());
  CollectingSink whole(shape);
  RC_ASSERT(bool(decode_all(*reader, whole)));
  RC_ASSERT(whole.every_byte_written_once());
  const auto begin = *rc::gen::inRange(0U, tokens);
  const auto end = *rc::gen::inRange(begin, tokens) + 1;
  CollectingSink part(shape, *rc::gen::element(0U, 16U));
  RC_ASSERT(bool(reader->decode(4, 5, 1, 2, {begin, end}, part)));
  RC_ASSERT(!part.misplaced());
  const std::size_t at = shape.plane_offset(1, Part::kKey, shape.heads - 1);
  for (std::size_t i = 0; i < part.written().size(); ++i) {
    const bool wanted = i >= at + begin * 256 && i < at + end * 256;
    RC_ASSERT(part.written()[i] == (wanted ? 1 : 0));
    RC_ASSERT(part.bytes()[i] == (wanted ? whole.bytes()[i] : std::byte{0}));
  }
}

RC_GTEST_PROP(AlignedMinicacheCodec, CorruptSectionsNeverReadOutOfBounds, ()) {
  const ShardShape shape{DType::kFloat32, 3, 2, 0, 2, *rc::gen::inRange(1U, 60U), 64, 0};
  const auto codec = codec_of(aligned_step() + *rc::gen::element<std::string>(" | raw", " | int8"));
  const SectionPlan section = codec->plan(shape).front();
  Bytes bytes = encoded(*codec, shape, section, turned_layers(shape, true, 23));
  for (auto changes = *rc::gen::inRange(0, 5); changes > 0; --changes) {
    const auto reach = *rc::gen::element<std::size_t>(16, 96, 200, 1U << 20);
    bytes[*rc::gen::inRange<std::size_t>(0, std::min(reach, bytes.size()))] =
        static_cast<std::byte>(*rc::gen::element(0, 1, 0x7F, 0x80, 0xFF));
  }
  bytes.resize(*rc::gen::element<std::size_t>(bytes.size(), bytes.size(), bytes.size() - 1, bytes.size() / 2, 3));
  AlignedBytes payload(bytes);
  CollectingSink sink(shape);
  const Status status = codec->decode(shape, section.extent, payload.span(), {0, shape.tokens}, 0, 2, sink);
  RC_ASSERT(!sink.misplaced());
  RC_ASSERT((status.is_ok() || status.code() == Code::kCorrupt));
}

TEST(CentroidCodec, EveryTokenGetsTheCentroidOfItsCluster) {
  const ShardShape shape = sample_shape(DType::kFloat32, 128, 64, 64, 2, 2);
  const Bytes canonical = sample_canonical(shape, 10);
  const Bytes back = round_trip(*codec_of("centroid(ratio=0.5) | raw"), shape, canonical);
  for (std::uint32_t layer = 0; layer < 2; ++layer) {
    // Sums over tokens are conserved.
    const auto got = floats_of(shape, back, layer, Part::kValue);
    const auto expected = floats_of(shape, canonical, layer, Part::kValue);
    std::vector<double> sums(64);
    for (std::size_t i = 0; i < 128 * 64; ++i) sums[i % 64] += double{got[i]} - double{expected[i]};
    EXPECT_THAT(sums, testing::Each(testing::DoubleNear(0, 1e-3)));
    std::vector<std::vector<float>> rows;
    for (std::size_t token = 0; token < 128; ++token)
      rows.emplace_back(got.begin() + static_cast<std::ptrdiff_t>(token * 64),
                        got.begin() + static_cast<std::ptrdiff_t>((token + 1) * 64));
    std::ranges::sort(rows);
    EXPECT_EQ(std::unique(rows.begin(), rows.end()) - rows.begin(), 64);
  }
}

TEST(CentroidCodec, BytesFallWithTheRatio) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 256, 64, 64, 2, 2);
  const Bytes canonical = sample_canonical(shape, 11);
  const ContainerInfo info = sample_info(shape, 256);
  for (const std::string inner : {"raw", "int8"}) {
    const double all = static_cast<double>(encode_sample(*codec_of(inner), info, canonical).size());
    const auto share = [&](const std::string& step) {
      return static_cast<double>(encode_sample(*codec_of(step + " | " + inner), info, canonical).size()) / all;
    };
    EXPECT_LT(share("centroid(ratio=0.5)"), 0.56);
    EXPECT_LT(share("centroid(ratio=0.25)"), 0.33);
  }
}

TEST(CentroidCodec, NothingMergedKeepsEveryBit) {
  const ShardShape shape = sample_shape(DType::kFloat16, 100, 64, 80, 2, 2);
  const Bytes canonical = sample_canonical(shape, 12);
  EXPECT_EQ(round_trip(*codec_of("centroid(ratio=1) | raw"), shape, canonical), canonical);
  EXPECT_EQ(round_trip(*codec_of("centroid(min_similarity=1) | raw"), shape, canonical), canonical);
}

TEST(CentroidCodec, OnlyTheFirstTokensOfAPromptAreSinks) {
  const ShardShape shape = sample_shape(DType::kFloat32, 64, 64, 64, 1, 1);
  const Bytes canonical = sample_canonical(shape, 13);
  const auto codec = codec_of("centroid(ratio=0.5,sinks=6) | raw");
  for (const std::uint64_t position : {0U, 4U, 4096U}) {
    ContainerInfo info = sample_info(shape, 64);
    info.position = position;
    AlignedBytes container(encode_sample(*codec, info, canonical));
    CollectingSink sink(shape);
    ASSERT_TRUE(decode_all(ContainerReader::parse(container.span()).value(), sink));
    std::size_t exact = 0;
    while (std::memcmp(sink.bytes().data() + exact * 256, canonical.data() + exact * 256, 256) == 0) ++exact;
    EXPECT_GE(exact, position == 0 ? 6U : position == 4 ? 2U : 0U);
    if (position == 4096) {
      EXPECT_EQ(exact, 0U);
    }
  }
}

TEST(CentroidCodec, TheTailThatIsToStayExactDoes) {
  const ShardShape shape = sample_shape(DType::kFloat32, 64, 64, 64, 1, 1);
  const Bytes canonical = sample_canonical(shape, 13);
  const auto codec = codec_of("centroid(ratio=0.5) | raw");
  for (const std::uint32_t tail : {0U, 10U, 64U}) {
    ContainerInfo info = sample_info(shape, 64);
    info.position = 4096;
    info.exact_tail = tail;
    AlignedBytes container(encode_sample(*codec, info, canonical));
    const auto reader = ContainerReader::parse(container.span());
    EXPECT_EQ(reader->info().exact_tail, 0U) << "it is not kept";
    CollectingSink sink(shape);
    ASSERT_TRUE(decode_all(*reader, sink));
    const auto is_exact = [&](std::uint32_t token) {
      return std::memcmp(sink.bytes().data() + token * 256, canonical.data() + token * 256, 256) == 0;
    };
    std::uint32_t exact = 0;
    while (exact < 64 && is_exact(63 - exact)) ++exact;
    EXPECT_GE(exact, tail);
    EXPECT_EQ(exact == 64, tail == 64);
  }
}

TEST(CentroidCodec, NotANumberIsRefused) {
  const ShardShape shape = sample_shape(DType::kFloat32, 32, 64, 64, 1, 1);
  Bytes canonical = sample_canonical(shape, 14);
  const float infinity = std::numeric_limits<float>::infinity();
  std::memcpy(canonical.data() + canonical.size() - 4, &infinity, sizeof infinity);
  const auto codec = codec_of("centroid | raw");
  const ContainerInfo info = sample_info(shape, 32);
  AlignedBytes out(container_max_bytes(*codec, info));
  EXPECT_EQ(encode_container(*codec, info, canonical, {}, out.span()).error().code(), Code::kInvalid);
}

TEST(CentroidCodec, SpecIsCanonical) {
  EXPECT_EQ(codec_of("centroid | int8")->spec(),
            "centroid(ratio=0.5,chunk=64,sinks=4,min_similarity=-1,version=1) | int8(group=64,version=1)");
  for (const auto* spec : {"centroid(ratio=0) | raw", "centroid(ratio=2) | raw", "centroid(chunk=7) | raw",
                           "centroid(min_similarity=2) | raw", "centroid(recent=4) | raw"}) {
    EXPECT_EQ(make_codec(spec).error().code(), Code::kInvalid) << spec;
  }
}

TEST(MergeAndClusterCodecs, WideHeadsAreRefusedWithTheReason) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 32, 272, 64);
  EXPECT_THAT(codec_of("centroid | raw")->accepts(shape).message(), HasSubstr("256"));
  EXPECT_THAT(codec_of("minicache(k=1) | raw")->accepts(shape).message(), HasSubstr("256"));
  EXPECT_TRUE(codec_of("minicache | raw")->accepts(shape));
  const ShardShape opaque = sample_shape(DType::kOpaqueBytes, 32, 64, 64);
  EXPECT_EQ(codec_of("centroid | raw")->accepts(opaque).code(), Code::kRefused);
  EXPECT_EQ(codec_of("minicache | raw")->accepts(opaque).code(), Code::kRefused);
}

const std::vector<std::string> kSpecs = {"minicache(start=3,k=1) | raw", "minicache(start=4,k=1,rule=range) | int8",
                                         "minicache(start=3,max_angle=0) | int8", "centroid(ratio=0.5) | raw",
                                         "centroid(ratio=0.25,chunk=32) | int8"};

RC_GTEST_PROP(MergeAndClusterCodecs, AnyTokensAndHeadsDecodeToTheirPartOfTheWhole, ()) {
  const std::string spec = *rc::gen::elementOf(kSpecs);
  const DType dtype = *rc::gen::element(DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  const auto tokens = *rc::gen::inRange(1U, 200U);
  const ShardShape shape = sample_shape(dtype, tokens, *rc::gen::element(64U, 80U), *rc::gen::element(64U, 0U),
                                        *rc::gen::inRange(1U, 5U), *rc::gen::inRange(1U, 4U));
  const Bytes canonical = similar_layers(shape, *rc::gen::inRange(0U, 10000U));
  const auto codec = codec_of(spec);
  AlignedBytes container(encode_sample(*codec, sample_info(shape, tokens), canonical));
  const auto reader = ContainerReader::parse(container.span());
  RC_ASSERT(reader.has_value());
  CollectingSink whole(shape);
  RC_ASSERT(bool(decode_all(*reader, whole)));
  RC_ASSERT(whole.every_byte_written_once());

  const auto begin = *rc::gen::inRange(0U, tokens);
  const auto end = *rc::gen::inRange(begin, tokens) + 1;
  const auto first_head = *rc::gen::inRange(0U, shape.heads);
  const auto layer = *rc::gen::inRange(0U, shape.layers);
  CollectingSink part(shape, *rc::gen::element(0U, 16U));
  RC_ASSERT(bool(reader->decode(3 + layer, 4 + layer, 4 + first_head, 1000, {begin, end}, part)));
  RC_ASSERT(!part.misplaced());
  for (std::uint32_t l = 0; l < shape.layers; ++l) {
    for (const Part p : {Part::kKey, Part::kValue}) {
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        for (std::uint32_t token = 0; token < tokens; ++token) {
          const std::size_t row = shape.row_bytes(p);
          const std::size_t at = shape.plane_offset(l, p, head) + token * row;
          const bool wanted = l == layer && head >= first_head && token >= begin && token < end;
          for (std::size_t i = at; i < at + row; ++i) {
            RC_ASSERT(part.written()[i] == (wanted ? 1 : 0));
            RC_ASSERT(part.bytes()[i] == (wanted ? whole.bytes()[i] : std::byte{0}));
          }
        }
      }
    }
  }
}

RC_GTEST_PROP(MergeAndClusterCodecs, SameBytesOnEveryInstructionSet, ()) {
  const std::string spec = *rc::gen::elementOf(kSpecs);
  const DType dtype = *rc::gen::element(DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  const ShardShape shape = sample_shape(dtype, *rc::gen::inRange(1U, 150U), 64, 80, 4, 2);
  const Bytes canonical = similar_layers(shape, *rc::gen::inRange(0U, 10000U));
  const auto codec = codec_of(spec);
  std::vector<Bytes> containers;
  for_each_target(
      [&](const char*) { containers.push_back(encode_sample(*codec, sample_info(shape, shape.tokens), canonical)); });
  for (const Bytes& container : containers) RC_ASSERT(container == containers[0]);
}

/// Sections with some bytes changed, cut or added: decode() must answer, whatever it answers, without touching memory
/// that is not its own, and write finite rows of the shard only.
RC_GTEST_PROP(MergeAndClusterCodecs, CorruptSectionsNeverReadOutOfBounds, ()) {
  const std::string spec = *rc::gen::elementOf(kSpecs);
  const ShardShape shape = sample_shape(DType::kBFloat16, *rc::gen::inRange(1U, 100U), 64, 64, 2, 1);
  const Bytes canonical = similar_layers(shape, 15);
  const auto codec = codec_of(spec);
  const auto plan = codec->plan(shape);
  const SectionPlan section = plan[*rc::gen::inRange<std::size_t>(0, plan.size())];
  Bytes bytes = encoded(*codec, shape, section, canonical);
  for (auto changes = *rc::gen::inRange(0, 6); changes > 0; --changes) {
    // The headers and tables in front are what sizes and indices depend on.
    const auto reach = *rc::gen::element<std::size_t>(16, 96, 512, 1U << 20);
    bytes[*rc::gen::inRange<std::size_t>(0, std::min(reach, bytes.size()))] =
        static_cast<std::byte>(*rc::gen::element(0, 1, 0x7F, 0x80, 0xFF));
  }
  const auto size = *rc::gen::element<std::size_t>(bytes.size(), bytes.size(), bytes.size() - 1, bytes.size() / 2, 3);
  bytes.resize(size);
  AlignedBytes payload(bytes);
  CollectingSink sink(shape);
  const Status status = codec->decode(shape, section.extent, payload.span(), {0, shape.tokens}, 0, 1, sink);
  RC_ASSERT(!sink.misplaced());
  RC_ASSERT((status.is_ok() || status.code() == Code::kCorrupt));
}

TEST(MergeAndClusterCodecs, CutSectionsAreCorrupt) {
  for (const std::string& spec : kSpecs) {
    const ShardShape shape = sample_shape(DType::kBFloat16, 70, 64, 64, 2, 1);
    const auto codec = codec_of(spec);
    for (const SectionPlan& section : codec->plan(shape)) {
      Bytes bytes = encoded(*codec, shape, section, similar_layers(shape, 16));
      EXPECT_LE(bytes.size(), section.max_bytes);
      bytes.pop_back();
      AlignedBytes payload(bytes);
      CollectingSink sink(shape);
      EXPECT_EQ(codec->decode(shape, section.extent, payload.span(), {0, 70}, 0, 1, sink).code(), Code::kCorrupt)
          << spec;
    }
  }
}

}  // namespace
}  // namespace kvern
