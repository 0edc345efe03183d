#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/container.h"
#include "kernels/cpu/int8.h"
#include "kernels/int8_arithmetic.h"
#include "tests/kernels/samples.h"
#include "tests/kernels/targets.h"

namespace kvern {
namespace {

using int8::Form;
using ::testing::HasSubstr;

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

std::shared_ptr<const Codec> codec_of(std::string_view spec) { return make_codec(spec).value(); }

/// The form as docs/format.md describes it, element by element.
Bytes reference_section(const Form& form, const std::byte* plane) {
  Bytes section(form.section_bytes());
  std::vector<float> magnitudes(form.scales());
  for (std::uint32_t token = 0; token < form.tokens; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) {
      float& magnitude = magnitudes[form.scale_index(token, channel)];
      magnitude = std::max(magnitude, std::abs(element_at(form.dtype, plane, std::size_t{token} * form.dim + channel)));
    }
  }
  for (std::uint32_t token = 0; token < form.tokens; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) {
      const std::size_t index = form.scale_index(token, channel);
      const std::uint16_t scale = int8::scale_bits(magnitudes[index], form.dtype);
      std::memcpy(section.data() + index * sizeof scale, &scale, sizeof scale);
      const std::size_t element = std::size_t{token} * form.dim + channel;
      section[form.codes_offset() + element] = static_cast<std::byte>(
          int8::encode(element_at(form.dtype, plane, element), int8::inverse_scale(magnitudes[index], form.dtype)));
    }
  }
  return section;
}

/// Rows as docs/format.md says that they decode.
Bytes reference_rows(const Form& form, const Bytes& section) {
  Bytes rows(std::size_t{form.tokens} * form.dim * dtype_bytes(form.dtype));
  for (std::uint32_t token = 0; token < form.tokens; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) {
      const std::size_t element = std::size_t{token} * form.dim + channel;
      std::uint16_t scale = 0;
      std::memcpy(&scale, section.data() + form.scale_index(token, channel) * sizeof scale, sizeof scale);
      const auto code = static_cast<std::int8_t>(section[form.codes_offset() + element]);
      const float value = int8::decode(code, int8::scale_value(scale));
      std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
      if (form.dtype == DType::kFloat16) bits = to_float16(value);
      if (form.dtype == DType::kBFloat16) bits = to_bfloat16(value);
      std::memcpy(rows.data() + element * dtype_bytes(form.dtype), &bits, dtype_bytes(form.dtype));
    }
  }
  return rows;
}

struct Case {
  std::uint32_t tokens;
  std::uint32_t key_dim;
  std::uint32_t value_dim;
};

const std::vector<Case> kCases = {{1, 64, 64},     {65, 80, 80},    {63, 96, 96},    {128, 112, 112},
                                  {256, 128, 128}, {130, 192, 128}, {33, 256, 256},  {70, 576, 512},
                                  {7, 20, 35},     {64, 1, 1},      {17, 1024, 130}, {200, 64, 1024}};

TEST(Float16Arithmetic, FloatsRoundTripThroughEveryBitPattern) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if ((half & 0x7C00U) == 0x7C00U) continue;
    EXPECT_EQ(to_float16(from_float16(half)), half);
    if ((half & 0x7F80U) == 0x7F80U) continue;
    EXPECT_EQ(to_bfloat16(from_bfloat16(half)), half);
  }
}

TEST(Float16Arithmetic, RoundsToTheNearestEven) {
  EXPECT_EQ(to_float16(1.0F + 0x1p-11F), 0x3C00);             // a tie, downwards to even
  EXPECT_EQ(to_float16(1.0F + 0x1p-10F + 0x1p-11F), 0x3C02);  // a tie, upwards to even
  EXPECT_EQ(to_float16(1.0F + 0x1p-11F + 0x1p-20F), 0x3C01);  // above the tie
  EXPECT_EQ(to_float16(0x1p-25F), 0x0000);                    // half of the smallest, to even
  EXPECT_EQ(to_float16(0x1.8p-24F), 0x0002);                  // one and a half of it
  EXPECT_EQ(to_float16(-65504.0F), 0xFBFF);
  EXPECT_EQ(to_bfloat16(1.0F + 0x1p-8F), 0x3F80);
  EXPECT_EQ(to_bfloat16(1.0F + 0x1p-7F + 0x1p-8F), 0x3F82);
}

TEST(Int8Form, IsTheOneOfTheDescriptionOnEveryTarget) {
  for_each_target([](const char* target) {
    for (const DType dtype : kFloats) {
      for (const Case& c : kCases) {
        const ShardShape shape = sample_shape(dtype, c.tokens, c.key_dim, c.value_dim, 1, 1);
        const Bytes canonical = sample_canonical(shape, c.tokens + c.key_dim);
        for (const Part part : {Part::kKey, Part::kValue}) {
          const bool key = part == Part::kKey;
          const std::uint32_t dim = key ? c.key_dim : c.value_dim;
          const Form form{dtype, key, c.tokens, dim, key ? 64 : Form::channel_group(dim)};
          const std::byte* plane = canonical.data() + shape.plane_offset(0, part, 0);
          const Bytes expected = reference_section(form, plane);
          AlignedBytes section(form.section_bytes());
          auto* scales = reinterpret_cast<std::uint16_t*>(section.span().data());
          auto* codes = reinterpret_cast<std::int8_t*>(section.span().data() + form.codes_offset());
          ASSERT_TRUE(int8::encode_plane(form, plane, scales, codes));
          ASSERT_EQ(Bytes(section.span().begin(), section.span().end()), expected)
              << target << " " << dtype_name(dtype) << " " << c.tokens << " x " << dim << (key ? " K" : " V");
          Bytes rows(shape.plane_bytes(part));
          ASSERT_TRUE(int8::decode_rows(form, scales, codes, 0, c.tokens, rows.data()));
          ASSERT_EQ(rows, reference_rows(form, expected))
              << target << " " << dtype_name(dtype) << " " << c.tokens << " x " << dim << (key ? " K" : " V");
        }
      }
    }
  });
}

TEST(Int8Form, ACodeThatIsNeverWrittenMakesNothingInfinite) {
  for (const DType dtype : kFloats) {
    for (const bool per_channel : {true, false}) {
      const Form form{dtype, per_channel, 70, 64, 64};
      for (const auto scale : {int8::max_scale_bits(dtype), int8::any_code_scale_bits(dtype)}) {
        Bytes section(form.section_bytes());
        for (std::size_t i = 0; i < form.scales(); ++i) std::memcpy(section.data() + 2 * i, &scale, sizeof scale);
        section[form.codes_offset() + std::size_t{66} * form.dim + 5] = std::byte{0x80};
        for_each_target([&](const char* target) {
          Bytes rows(std::size_t{70} * form.dim * dtype_bytes(dtype));
          const bool taken = int8::decode_rows(
              form, reinterpret_cast<const std::uint16_t*>(section.data()),
              reinterpret_cast<const std::int8_t*>(section.data() + form.codes_offset()), 0, 70, rows.data());
          EXPECT_EQ(taken, scale == int8::any_code_scale_bits(dtype)) << target << " " << dtype_name(dtype);
          for (std::size_t i = 0; taken && i < std::size_t{70} * form.dim; ++i) {
            ASSERT_TRUE(std::isfinite(element_at(dtype, rows.data(), i)));
          }
        });
      }
    }
  }
}

TEST(Int8Form, DecodesEveryCodeUnderEveryScaleAlikeOnEveryTarget) {
  // Every scale that there is, each with all codes: 256 tokens hold the codes, one per token.
  for (const DType dtype : kFloats) {
    const Form form{dtype, true, 256, 1024, 256};
    for (std::uint32_t first = 0; first <= int8::max_scale_bits(dtype); first += form.dim) {
      Bytes section(form.section_bytes());
      for (std::uint32_t i = 0; i < form.dim; ++i) {
        const auto scale = static_cast<std::uint16_t>(std::min<std::uint32_t>(first + i, int8::max_scale_bits(dtype)));
        std::memcpy(section.data() + i * sizeof scale, &scale, sizeof scale);
      }
      for (std::size_t i = 0; i < std::size_t{256} * form.dim; ++i) {
        // -128 does not occur.
        section[form.codes_offset() + i] = static_cast<std::byte>(std::max(static_cast<int>(i / form.dim) - 128, -127));
      }
      const Bytes expected = first % 4096 == 0 ? reference_rows(form, section) : Bytes{};
      if (expected.empty()) continue;
      for_each_target([&](const char* target) {
        Bytes rows(expected.size());
        ASSERT_TRUE(int8::decode_rows(form, reinterpret_cast<const std::uint16_t*>(section.data()),
                                      reinterpret_cast<const std::int8_t*>(section.data() + form.codes_offset()), 0,
                                      256, rows.data()));
        ASSERT_EQ(rows, expected) << target << " " << dtype_name(dtype) << " from scale " << first;
        for (std::size_t i = 0; i < rows.size() / dtype_bytes(dtype); ++i) {
          ASSERT_TRUE(std::isfinite(element_at(dtype, rows.data(), i)));
        }
      });
    }
  }
}

TEST(Int8Container, TakesAboutHalfOfSixteenBits) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 256, 128, 128, 4, 8);
  const ContainerInfo info = sample_info(shape, 32);
  const Bytes container = encode_sample(*codec_of("int8"), info, sample_canonical(shape, 1));
  EXPECT_LT(static_cast<double>(container.size()), 0.52 * static_cast<double>(shape.raw_bytes()));
}

RC_GTEST_PROP(Int8Container, StaysWithinHalfAStep, (std::uint32_t seed)) {
  const Case& c = kCases[seed % kCases.size()];
  const ShardShape shape = sample_shape(kFloats[seed / 16 % 3], c.tokens, c.key_dim, c.value_dim, 1, 2);
  const Bytes canonical = sample_canonical(shape, seed);
  AlignedBytes bytes(encode_sample(*codec_of("int8(group=32)"), sample_info(shape, 1), canonical));
  const auto reader = ContainerReader::parse(bytes.span());
  CollectingSink sink(shape);
  RC_ASSERT(decode_all(reader.value(), sink).is_ok());
  for (const Part part : {Part::kKey, Part::kValue}) {
    const bool key = part == Part::kKey;
    const std::uint32_t dim = key ? c.key_dim : c.value_dim;
    const Form form{shape.dtype, key, c.tokens, dim, key ? 32 : Form::channel_group(dim)};
    for (std::uint32_t head = 0; head < 2; ++head) {
      const std::size_t offset = shape.plane_offset(0, part, head);
      const Bytes section = reference_section(form, canonical.data() + offset);
      for (std::uint32_t token = 0; token < c.tokens; ++token) {
        for (std::uint32_t channel = 0; channel < dim; ++channel) {
          std::uint16_t scale = 0;
          std::memcpy(&scale, section.data() + form.scale_index(token, channel) * 2, 2);
          const std::size_t element = std::size_t{token} * dim + channel;
          const float before = element_at(shape.dtype, canonical.data() + offset, element);
          const float after = element_at(shape.dtype, sink.bytes().data() + offset, element);
          // Half a step, and half a unit in the last place of the dtype for the rounding of the result.
          const float last_place = shape.dtype == DType::kBFloat16  ? 0x1p-8F
                                   : shape.dtype == DType::kFloat16 ? 0x1p-11F
                                                                    : 0x1p-23F;
          RC_ASSERT(std::abs(before - after) <= int8::scale_value(scale) * 0.5001F + std::abs(after) * last_place);
        }
      }
    }
  }
}

TEST(Int8Container, AnyRangeOfTokensEqualsTheSliceOfAll) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 200, 80, 192, 1, 1);
  AlignedBytes bytes(encode_sample(*codec_of("int8"), sample_info(shape, 8), sample_canonical(shape, 3)));
  const auto reader = ContainerReader::parse(bytes.span());
  ASSERT_TRUE(reader);
  CollectingSink whole(shape);
  ASSERT_TRUE(decode_all(*reader, whole));
  for (std::uint32_t begin = 0; begin < 200; begin += 7) {
    for (std::uint32_t end = begin + 1; end <= 200; end += 13) {
      CollectingSink sink(shape, begin % 3 * 16);
      ASSERT_TRUE(reader->decode(0, 9, 0, 9, {begin, end}, sink));
      for (const Part part : {Part::kKey, Part::kValue}) {
        const std::size_t from = shape.plane_offset(0, part, 0) + begin * shape.row_bytes(part);
        const std::size_t size = (end - begin) * shape.row_bytes(part);
        ASSERT_EQ(std::memcmp(sink.bytes().data() + from, whole.bytes().data() + from, size), 0);
      }
    }
  }
}

TEST(Int8Container, RefusesInputThatIsNotFinite) {
  const auto codec = codec_of("int8");
  for (const DType dtype : kFloats) {
    const ShardShape shape = sample_shape(dtype, 65, 80, 64, 1, 1);
    const ContainerInfo info = sample_info(shape, 1);
    AlignedBytes out(container_max_bytes(*codec, info));
    const std::size_t count = shape.raw_bytes() / dtype_bytes(dtype);
    for (const std::uint32_t bits : {0x7F800000U, 0xFF800000U, 0x7FC00000U, 0x7F800001U}) {
      const std::uint32_t half = dtype == DType::kFloat16
                                     ? ((bits >> 16 & 0x8000U) | 0x7C00U | (bits & 1U) | (bits >> 13 & 0x200U))
                                     : bits >> 16 | (bits & 1U);
      const std::uint32_t raw = dtype == DType::kFloat32 ? bits : half;
      for (const std::size_t position : {std::size_t{0}, count / 3, std::size_t{65 * 80 - 1}, count - 1}) {
        Bytes canonical = sample_canonical(shape, 4);
        std::memcpy(canonical.data() + position * dtype_bytes(dtype), &raw, dtype_bytes(dtype));
        for_each_target([&](const char* target) {
          const auto result = encode_container(*codec, info, canonical, {}, out.span());
          ASSERT_FALSE(result) << target << " " << dtype_name(dtype) << " position " << position << " bits " << raw;
          EXPECT_EQ(result.error().code(), Code::kInvalid);
          EXPECT_THAT(result.error().message(), HasSubstr("NaN or infinity"));
        });
      }
    }
  }
}

TEST(Int8Container, ExtremeValuesStayFinite) {
  for (const DType dtype : kFloats) {
    const ShardShape shape = sample_shape(dtype, 16, 64, 64, 1, 1);
    Bytes canonical(shape.raw_bytes());
    const std::uint32_t largest = dtype == DType::kFloat32 ? 0xFF7FFFFFU : dtype == DType::kFloat16 ? 0xFBFFU : 0xFF7FU;
    for (std::size_t i = 0; i < canonical.size() / dtype_bytes(dtype); i += 3) {
      std::memcpy(canonical.data() + i * dtype_bytes(dtype), &largest, dtype_bytes(dtype));
    }
    AlignedBytes bytes(encode_sample(*codec_of("int8"), sample_info(shape, 16), canonical));
    CollectingSink sink(shape);
    ASSERT_TRUE(decode_all(ContainerReader::parse(bytes.span()).value(), sink));
    for (std::size_t i = 0; i < canonical.size() / dtype_bytes(dtype); ++i) {
      const float before = element_at(dtype, canonical.data(), i);
      const float after = element_at(dtype, sink.bytes().data(), i);
      ASSERT_TRUE(std::isfinite(after));
      ASSERT_LE(std::abs(before / 2 - after / 2), std::abs(before) * 0.005F) << dtype_name(dtype);
    }
  }
}

TEST(Int8Container, TinyGroupsBecomeZero) {
  const ShardShape shape = sample_shape(DType::kFloat32, 4, 16, 16, 1, 1);
  Bytes canonical(shape.raw_bytes());
  for (std::size_t i = 0; i < canonical.size() / 4; ++i) {
    const float tiny = 1e-40F;
    std::memcpy(canonical.data() + i * 4, &tiny, sizeof tiny);
  }
  AlignedBytes bytes(encode_sample(*codec_of("int8"), sample_info(shape, 4), canonical));
  CollectingSink sink(shape);
  ASSERT_TRUE(decode_all(ContainerReader::parse(bytes.span()).value(), sink));
  EXPECT_THAT(sink.bytes(), ::testing::Each(std::byte{0}));
}

TEST(Int8Container, RefusesScalesThatEncodingCannotHaveMade) {
  const ShardShape shape = sample_shape(DType::kFloat16, 16, 64, 64, 1, 1);
  const Bytes whole = encode_sample(*codec_of("int8"), sample_info(shape, 16), sample_canonical(shape, 5));
  for (const std::uint16_t scale : {std::uint16_t{0x7F80}, std::uint16_t{0xFF80}, std::uint16_t{0x7FC0},
                                    std::uint16_t{0x8001}, std::uint16_t{0x4401}}) {
    for (const std::size_t number : {0U, 1U}) {
      const auto codec = codec_of("int8");
      AlignedBytes bytes(whole);
      const auto reader = ContainerReader::parse(bytes.span());
      const SectionInfo section = reader->sections()[number];
      auto payload = bytes.span().subspan(section.offset, section.bytes);
      std::memcpy(payload.data() + 2 * 9, &scale, sizeof scale);
      CollectingSink sink(shape);
      EXPECT_EQ(codec->decode(shape, section.extent, payload, {0, 16}, 0, 1, sink).code(), Code::kCorrupt);
      EXPECT_EQ(codec->decode(shape, section.extent, payload.first(section.bytes - 1), {0, 16}, 0, 1, sink).code(),
                Code::kCorrupt);
    }
  }
}

TEST(Int8Codec, RefusesWhatItCannotEncodeInASentence) {
  const auto codec = codec_of("int8");
  EXPECT_FALSE(codec->lossless());
  const Status opaque = codec->accepts(sample_shape(DType::kOpaqueBytes, 16, 64, 64));
  EXPECT_EQ(opaque.code(), Code::kRefused);
  EXPECT_THAT(opaque.message(), HasSubstr("use raw"));
  EXPECT_EQ(codec->accepts(sample_shape(DType::kBFloat16, 16, 2048, 64)).code(), Code::kRefused);
  EXPECT_EQ(container_max_bytes(*codec, sample_info(sample_shape(DType::kOpaqueBytes, 16, 64, 64), 16)), 0U);
}

TEST(Int8Codec, ReadsItsParameters) {
  EXPECT_EQ(codec_of("int8")->spec(), "int8(group=64,version=1)");
  EXPECT_EQ(codec_of("int8( version = 1 , group = 128 )")->spec(), "int8(group=128,version=1)");
  EXPECT_THAT(make_codec("int8(group=63)").error().message(), HasSubstr("one of 16, 32, 64, 128, 256, not '63'"));
  EXPECT_THAT(make_codec("int8(group=64x)").error().message(), HasSubstr("'64x'"));
  EXPECT_THAT(make_codec("int8(group=64,group=64)").error().message(), HasSubstr("twice"));
  EXPECT_THAT(make_codec("int8(bits=4)").error().message(), HasSubstr("group, version"));
  EXPECT_THAT(make_codec("int8(version=2)").error().message(), HasSubstr("must be 1"));
}

}  // namespace
}  // namespace kvern
