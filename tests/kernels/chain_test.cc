#include "kernels/chain.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

#include "kernels/byte_planes.h"
#include "kernels/container.h"
#include "kernels/rope.h"
#include "tests/kernels/samples.h"

namespace kvern {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr std::string_view kRotation = "style=neox,theta=10000,dim=64";

std::string error_of(std::string_view spec) {
  const auto chain = parse_chain(spec, kRotation);
  if (chain) return "no error";
  EXPECT_EQ(chain.error().code(), Code::kInvalid);
  return chain.error().message();
}

std::string canonical(std::string_view spec, std::string_view rotation = {}) {
  const auto chain = parse_chain(spec, rotation);
  return chain ? chain->spec : chain.error().message();
}

TEST(Chain, EveryStepMakesOneByItselfAndItsCanonicalSpecIsTheSameChain) {
  for (const StepEntry& entry : all_steps()) {
    const std::string spec = std::string(entry.name) + (entry.kind == StepKind::kUnrotate ? " | int8" : "");
    const auto chain = parse_chain(spec, kRotation);
    ASSERT_TRUE(chain) << spec << ": " << chain.error().message();
    const auto again = parse_chain(chain->spec);
    ASSERT_TRUE(again) << again.error().message();
    EXPECT_EQ(again->spec, chain->spec);
    EXPECT_EQ(again->digest, chain->digest);
    EXPECT_EQ(chain->is_chunk_codec(), entry.kind != StepKind::kEvict);
    EXPECT_NE(chain->find(entry.kind), nullptr);
  }
}

TEST(Chain, SpellsOutEveryParameter) {
  EXPECT_EQ(canonical("raw"), "raw");
  EXPECT_EQ(canonical("zstd"), "raw | zstd(level=3)");
  EXPECT_EQ(canonical(" int8 |zstd( level = 9 )"), "int8(group=64,version=1) | zstd(level=9)");
  EXPECT_EQ(
      canonical("cake | int8"),
      "cake(budget=25%,window=32,gamma=200,tau1=2,tau2=100,pool=avg,kernel=5,floor=0) | int8(group=64,version=1)");
  EXPECT_EQ(canonical("streaming(budget=3.2%)"), "streaming(budget=3.2%,sinks=4) | raw");
  EXPECT_EQ(canonical("snapkv(budget=1024)"),
            "snapkv(budget=1024,window=32,pool=avg,kernel=5,allocation=uniform,floor=0) | raw");
  EXPECT_EQ(canonical("windowkv(omega=16) | raw"),
            "windowkv(budget=25%,omega=16,alpha=16,top=16,group=1,allocation=uniform,lambda=14) | raw");
  EXPECT_EQ(canonical("unrotate | int8", kRotation),
            "unrotate(style=neox,theta=10000,dim=64) | int8(group=64,version=1)");
}

TEST(Chain, DigestsTellChainsApart) {
  EXPECT_NE(parse_chain("raw")->digest, parse_chain("raw | zstd")->digest);
  EXPECT_NE(parse_chain("raw | zstd")->digest, parse_chain("raw | zstd(level=4)")->digest);
  EXPECT_EQ(parse_chain("raw | zstd")->digest, parse_chain("zstd(level=3)")->digest);
}

TEST(Chain, RefusesUnsoundOrdersWithTheReason) {
  EXPECT_THAT(error_of("zstd | int8"), AllOf(HasSubstr("int8 comes before zstd"), HasSubstr("no numbers any more")));
  EXPECT_THAT(error_of("int8 | cake"), AllOf(HasSubstr("cake comes before int8"), HasSubstr("as the model made them")));
  EXPECT_THAT(error_of("int8 | unrotate"), AllOf(HasSubstr("unrotate comes before int8"), HasSubstr("rounding")));
  EXPECT_THAT(error_of("raw | int8"), HasSubstr("quantises once, not with raw and int8"));
  EXPECT_THAT(error_of("raw | zstd | zstd"), HasSubstr("compresses once"));
  EXPECT_THAT(error_of("cake | snapkv"), HasSubstr("picks tokens once"));
  EXPECT_THAT(error_of("windowkv | minicache | int8"), HasSubstr("different tokens"));
  EXPECT_TRUE(parse_chain("streaming | minicache | int8"));
  EXPECT_THAT(error_of("unrotate"), HasSubstr("quantise after it"));
  EXPECT_THAT(error_of("unrotate | raw | zstd"), HasSubstr("quantise after it"));
}

TEST(Chain, RefusesParametersThatMakeNoSense) {
  for (const char* spec :
       {"cake(budget=0)", "cake(budget=0%)", "cake(budget=101%)", "cake(budget=-1)", "cake(window=0)",
        "snapkv(kernel=4)", "snapkv(pool=median)", "cake(gamma=nan)", "cake(tau1=0)", "windowkv(omega=8,top=9)",
        "zstd(level=0)", "zstd(level=20)", "streaming(sinks=4.5)", "h2o(score=max)", "unrotate(dim=63) | int8",
        "unrotate(theta=1) | int8", "unrotate(dim=64,scaling=llama3) | int8"}) {
    EXPECT_THAT(error_of(spec), HasSubstr(std::string(spec, std::string_view(spec).find('(')))) << spec;
  }
  EXPECT_THAT(error_of("knorm(tau1=2)"), AllOf(HasSubstr("no parameter 'tau1'"), HasSubstr("budget, sinks, recent")));
}

TEST(Chain, RefusesRotationsThatDependOnTheLengthOfThePrompt) {
  EXPECT_THAT(error_of("unrotate(dim=64,scaling=dynamic) | int8"), HasSubstr("change with the length of the prompt"));
  EXPECT_THAT(error_of("unrotate(dim=64,scaling=longrope) | int8"), HasSubstr("change with the length of the prompt"));
}

TEST(Chain, AStepThatPicksTokensIsNoCodecOfChunks) {
  const auto codec = make_codec("cake(budget=25%) | int8");
  ASSERT_FALSE(codec);
  EXPECT_THAT(codec.error().message(), AllOf(HasSubstr("cake"), HasSubstr("compact caches")));
}

TEST(Chain, TakesTheRotationFromTheNamespaceAndSaysWhenThereIsNone) {
  const auto open = parse_chain("unrotate | int8");
  ASSERT_TRUE(open);
  EXPECT_EQ(open->spec, "unrotate | int8(group=64,version=1)");
  EXPECT_EQ(open->codec, nullptr);
  const auto codec = make_codec("unrotate | int8");
  ASSERT_FALSE(codec);
  EXPECT_THAT(codec.error().message(), HasSubstr("namespace"));
  EXPECT_TRUE(make_codec("unrotate | int8", kRotation));
}

TEST(Chain, CountsTheTokensOfABudget) {
  const auto tokens = [](const char* spec, std::uint32_t prompt) {
    return budget_tokens(*parse_chain(spec)->find(StepKind::kEvict), prompt);
  };
  EXPECT_EQ(tokens("knorm(budget=25%)", 4), 1U);
  EXPECT_EQ(tokens("knorm(budget=25%)", 5), 2U);
  EXPECT_EQ(tokens("knorm(budget=7%)", 100), 7U);
  EXPECT_EQ(tokens("knorm(budget=100%)", 1408), 1408U);
  EXPECT_EQ(tokens("knorm(budget=512)", 1408), 512U);
  EXPECT_EQ(tokens("knorm(budget=512)", 100), 100U);
}

RC_GTEST_PROP(Chain, AnswersAnySequenceOfSteps, (std::vector<std::uint8_t> picks)) {
  std::string spec;
  for (const std::uint8_t pick : picks) {
    spec.append(spec.empty() ? "" : " | ").append(all_steps()[pick % all_steps().size()].name);
  }
  const auto chain = parse_chain(spec, kRotation);
  RC_ASSERT(chain || !chain.error().message().empty());
  if (!chain) return;
  RC_ASSERT(parse_chain(chain->spec)->spec == chain->spec);
  RC_ASSERT(std::ranges::is_sorted(chain->steps, {}, &Chain::Step::kind));
}

// ---------------------------------------------------------------- entropy

TEST(BytePlanes, JoinWhatTheySplit) {
  for (const std::size_t element : {1U, 2U, 4U}) {
    for (const std::size_t count : {0U, 1U, 7U, 64U, 1000U}) {
      Bytes elements(count * element);
      for (std::size_t i = 0; i < elements.size(); ++i) elements[i] = static_cast<std::byte>(i * 37 + i / 5);
      Bytes planes(elements.size());
      split_byte_planes(elements, element, planes);
      Bytes joined(elements.size());
      join_byte_planes(planes, element, joined);
      EXPECT_EQ(joined, elements) << element << " x " << count;
    }
  }
}

TEST(BytePlanes, PutExponentsOfBfloat16IntoTheLastPlane) {
  // -1.5 and 2.0: signs go down, exponents 127 and 128 are whole.
  const Bytes elements = {std::byte{0xC0}, std::byte{0xBF}, std::byte{0x00}, std::byte{0x40}};
  Bytes planes(4);
  split_byte_planes(elements, 2, planes);
  EXPECT_EQ(planes, (Bytes{std::byte{0x81}, std::byte{0x00}, std::byte{127}, std::byte{128}}));
}

struct ZstdCase {
  const char* spec;
  DType dtype;
};

TEST(ZstdCodec, GivesBackWhatItsInnerCodecDecodesTo) {
  for (const ZstdCase& c : {ZstdCase{"raw", DType::kBFloat16},
                            {"raw", DType::kFloat16},
                            {"raw", DType::kFloat32},
                            {"raw", DType::kOpaqueBytes},
                            {"int8", DType::kBFloat16},
                            {"int8", DType::kFloat32}}) {
    for (const std::uint32_t tokens : {1U, 5U, 96U}) {
      const ShardShape shape = sample_shape(c.dtype, tokens, 80, 48);
      const auto plain = make_codec(c.spec);
      const auto packed = make_codec(std::string(c.spec) + " | zstd");
      ASSERT_TRUE(plain && packed);
      EXPECT_EQ((*packed)->lossless(), (*plain)->lossless());
      const ContainerInfo info = sample_info(shape, 1);
      const Bytes canonical = sample_canonical(shape, tokens);
      const Bytes bytes = encode_sample(**packed, info, canonical);
      EXPECT_EQ(bytes, encode_sample(**packed, info, canonical)) << "the same bytes again";
      const Bytes plain_bytes = encode_sample(**plain, info, canonical);
      AlignedBytes aligned(bytes);
      AlignedBytes plain_aligned(plain_bytes);
      const auto reader = ContainerReader::parse(aligned.span());
      const auto plain_reader = ContainerReader::parse(plain_aligned.span());
      ASSERT_TRUE(reader) << reader.error().message();
      CollectingSink sink(shape, 16);
      CollectingSink expected(shape, 16);
      ASSERT_TRUE(decode_all(*reader, sink));
      ASSERT_TRUE(decode_all(*plain_reader, expected));
      EXPECT_EQ(sink.bytes(), expected.bytes()) << c.spec;
      EXPECT_TRUE(sink.every_byte_written_once());
      EXPECT_FALSE(sink.misplaced());
    }
  }
}

TEST(ZstdCodec, MakesRawBfloat16SmallerByAQuarterAtLeast) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 256, 64, 64, 1, 1);
  const Bytes canonical = sample_canonical(shape, 1);
  const ContainerInfo info = sample_info(shape, 16);
  const Bytes raw = encode_sample(**make_codec("raw"), info, canonical);
  const Bytes packed = encode_sample(**make_codec("raw | zstd"), info, canonical);
  EXPECT_LT(packed.size(), raw.size() * 3 / 4);
}

TEST(ZstdCodec, StaysWithinItsBoundOnNoise) {
  const ShardShape shape = sample_shape(DType::kOpaqueBytes, 64, 999, 1, 1, 1);
  const Bytes canonical = sample_canonical(shape, 7);
  const auto codec = make_codec("raw | zstd(level=19)");
  EXPECT_GT(encode_sample(**codec, sample_info(shape, 16), canonical).size(), shape.raw_bytes());
}

/// One encoded section of raw | zstd, to be damaged.
struct Section {
  ShardShape shape = sample_shape(DType::kBFloat16, 32, 64, 64, 1, 1);
  std::shared_ptr<const Codec> codec = *make_codec("raw | zstd");
  SectionExtent extent = codec->plan(shape).front().extent;
  Bytes bytes;

  Section() {
    const Bytes canonical = sample_canonical(shape, 3);
    AlignedBytes out(codec->max_bytes(shape, extent));
    AlignedBytes plane(std::span<const std::byte>(canonical).first(shape.plane_bytes(Part::kKey)));
    const auto size = codec->encode(shape, extent, plane.span(), out.span());
    bytes.assign(out.span().begin(), out.span().begin() + static_cast<std::ptrdiff_t>(*size));
  }
  Code decode(std::span<const std::byte> payload) const {
    AlignedBytes aligned(payload);
    CollectingSink sink(shape);
    return codec->decode(shape, extent, aligned.span(), {0, shape.tokens}, 0, 1, sink).code();
  }
};

TEST(ZstdCodec, SaysThatDamagedSectionsAreCorrupt) {
  const Section section;
  ASSERT_EQ(section.decode(section.bytes), Code::kOk);
  for (std::size_t size = 0; size < section.bytes.size(); ++size) {
    EXPECT_EQ(section.decode(std::span(section.bytes).first(size)), Code::kCorrupt) << size;
  }
  Bytes longer = section.bytes;
  longer.push_back(std::byte{0});
  EXPECT_EQ(section.decode(longer), Code::kCorrupt);
  // A size that would ask for memory without end.
  Bytes huge = section.bytes;
  huge[6] = std::byte{0x7F};
  EXPECT_EQ(section.decode(huge), Code::kCorrupt);
}

RC_GTEST_PROP(ZstdCodec, NeverTripsOverFlippedBits, ()) {
  static const Section section;
  Bytes bytes = section.bytes;
  for (const auto at :
       *rc::gen::container<std::vector<std::size_t>>(3, rc::gen::inRange<std::size_t>(0, bytes.size()))) {
    bytes[at] ^= static_cast<std::byte>(1U << *rc::gen::inRange(0, 8));
  }
  const Code code = section.decode(bytes);
  RC_ASSERT(code == Code::kOk || code == Code::kCorrupt);
}

// ---------------------------------------------------------------- sections of several layers

TEST(ContainerReader, GivesOnlyTheLayersThatWereAskedForWhenASectionHoldsAPair) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 32, 64, 64, 2, 1);  // layers 3 and 4 of the group
  const auto codec = make_codec("minicache(start=1,v=1,max_angle=180) | int8");
  ASSERT_TRUE(codec) << codec.error().message();
  const auto plan = (*codec)->plan(shape);
  ASSERT_TRUE(std::ranges::any_of(plan, [](const SectionPlan& section) { return section.extent.layers == 2; }));
  AlignedBytes bytes(encode_sample(**codec, sample_info(shape, 16), sample_canonical(shape, 4)));
  const auto reader = ContainerReader::parse(bytes.span());
  ASSERT_TRUE(reader) << reader.error().message();
  CollectingSink second(shape);
  ASSERT_TRUE(reader->decode(4, 5, 0, 1000, {0, shape.tokens}, second));
  for (std::size_t i = 0; i < shape.raw_bytes(); ++i) {
    ASSERT_EQ(second.written()[i], i < shape.layer_bytes() ? 0 : 1) << i;
  }
}

// ---------------------------------------------------------------- unrotate

double mean_square_error(const ShardShape& shape, Part part, const Bytes& got, const Bytes& expected) {
  double error = 0;
  const std::size_t begin = shape.plane_offset(0, part, 0) / dtype_bytes(shape.dtype);
  const std::size_t count = shape.heads * shape.plane_bytes(part) / dtype_bytes(shape.dtype);
  for (std::size_t i = begin; i < begin + count; ++i) {
    const double difference = element_at(shape.dtype, got.data(), i) - element_at(shape.dtype, expected.data(), i);
    error += difference * difference;
  }
  return error / static_cast<double>(count);
}

/// Keys as a model makes them: about the same at every position before they are turned.
Bytes turned_keys(const ShardShape& shape, const rope::Parameters& rotation, std::int64_t position) {
  Bytes canonical = sample_canonical(shape, 5);
  std::vector<float> keys(std::size_t{shape.heads} * shape.tokens * shape.key_dim);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> mean(shape.key_dim);
  for (float& value : mean) value = 4 * normal(generator);
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = mean[i % shape.key_dim] + 0.1F * normal(generator);
  const auto rows = HeadRows::contiguous(reinterpret_cast<const std::byte*>(keys.data()), DType::kFloat32, shape.heads,
                                         shape.tokens, shape.key_dim);
  const auto turns = rope::Turns::from(rotation.inverse_frequencies(), position, shape.tokens);
  EXPECT_TRUE(rope::rotate(rows, turns, rotation.style, rope::Direction::kForward, shape.dtype, canonical.data()));
  return canonical;
}

Bytes through(const Codec& codec, const ContainerInfo& info, const Bytes& canonical) {
  AlignedBytes bytes(encode_sample(codec, info, canonical));
  const auto reader = ContainerReader::parse(bytes.span());
  EXPECT_TRUE(reader) << reader.error().message();
  CollectingSink sink(info.shape, 16);
  const Status status = decode_all(*reader, sink);
  EXPECT_TRUE(status) << status.message();
  EXPECT_TRUE(sink.every_byte_written_once());
  return sink.bytes();
}

TEST(UnrotateCodec, TurnsKeysBackByTheirPositionInThePrompt) {
  for (const char* style : {"neox", "interleaved"}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const std::string text = std::string("style=") + style + ",theta=10000,dim=48";
      const auto rotation = *rope::Parameters::from(*CodecStep::parse("unrotate(" + text + ")"));
      const ShardShape shape = sample_shape(dtype, 96, 64, 80, 1, 2);
      ContainerInfo info = sample_info(shape, 16);
      info.position = 4096;
      const Bytes canonical = turned_keys(shape, rotation, 4096);
      const Bytes plain = through(**make_codec("int8"), info, canonical);
      const Bytes unrotated = through(**make_codec("unrotate | int8", text), info, canonical);
      EXPECT_LT(mean_square_error(shape, Part::kKey, unrotated, canonical),
                mean_square_error(shape, Part::kKey, plain, canonical))
          << "position-free keys of a group are alike, so their scales are small";
      const std::size_t values = shape.plane_offset(0, Part::kValue, 0);
      EXPECT_TRUE(std::equal(plain.begin() + static_cast<std::ptrdiff_t>(values), plain.end(),
                             unrotated.begin() + static_cast<std::ptrdiff_t>(values)))
          << "values are the inner codec's own";
    }
  }
}

TEST(UnrotateCodec, StandsInTheContainerWithAllItNeeds) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 32, 64, 64, 1, 1);
  const ContainerInfo info = sample_info(shape, 16);
  AlignedBytes bytes(
      encode_sample(**make_codec("unrotate | int8 | zstd", kRotation), info, sample_canonical(shape, 2)));
  const auto reader = ContainerReader::parse(bytes.span());
  ASSERT_TRUE(reader) << reader.error().message();
  EXPECT_EQ(reader->info().codec_spec,
            "unrotate(style=neox,theta=10000,dim=64) | int8(group=64,version=1) | zstd(level=3)");
  EXPECT_EQ(reader->info().shape, shape);
}

TEST(UnrotateCodec, RefusesWhatItCannotTurn) {
  const auto codec = make_codec("unrotate | int8", kRotation);
  ASSERT_TRUE(codec);
  EXPECT_THAT((*codec)->accepts(sample_shape(DType::kBFloat16, 16, 32, 32)).message(), HasSubstr("64 elements"));
  EXPECT_THAT((*codec)->accepts(sample_shape(DType::kOpaqueBytes, 16, 64, 64)).message(), HasSubstr("opaque"));
  EXPECT_THAT((*codec)->accepts(sample_shape(DType::kBFloat16, 16, 64, 0)).message(), HasSubstr("share"));
}

TEST(UnrotateCodec, RefusesKeysThatAreNotFinite) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 16, 64, 64, 1, 1);
  Bytes canonical = sample_canonical(shape, 2);
  const std::uint16_t infinity = 0x7F80;
  std::memcpy(canonical.data() + 40, &infinity, sizeof infinity);
  EXPECT_ANY_THROW(encode_sample(**make_codec("unrotate | int8", kRotation), sample_info(shape, 16), canonical));
}

}  // namespace
}  // namespace kvern
