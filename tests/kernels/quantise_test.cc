#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/codec_step.h"
#include "kernels/container.h"
#include "kernels/cpu/quantise.h"
#include "kernels/demote.h"
#include "kernels/form_quantised.h"
#include "kernels/quantise_arithmetic.h"
#include "tests/kernels/samples.h"
#include "tests/kernels/targets.h"

namespace kvern {
namespace {

using quantise::Form;
using quantise::Group;
using quantise::Kind;
using quantise::Line;
using quantise::Scheme;
using ::testing::HasSubstr;

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr Kind kKinds[] = {Kind::kFp8, Kind::kInt4, Kind::kInt3, Kind::kInt2, Kind::kInt8Residual};
constexpr Scheme kSchemes[] = {Scheme::kAsymmetric, Scheme::kSymmetric};

std::string name_of(Kind kind) {
  switch (kind) {
    case Kind::kFp8:
      return "fp8";
    case Kind::kInt4:
      return "int4";
    case Kind::kInt3:
      return "int3";
    case Kind::kInt2:
      return "int2";
    case Kind::kInt8Residual:
      return "int8r";
  }
  return "";
}

std::string describe(const Form& form) {
  return name_of(form.kind) + (form.scheme == Scheme::kSymmetric ? " symmetric " : " asymmetric ") +
         std::string(dtype_name(form.dtype)) + (form.per_channel ? " K " : " V ") + std::to_string(form.tokens) +
         " x " + std::to_string(form.dim) + " group " + std::to_string(form.group);
}

std::shared_ptr<const Codec> codec_of(const std::string& spec) { return make_codec(spec).value(); }

/// Calls visit with every kind and scheme that there is: fp8 is symmetric.
template <typename Visit>
void for_each_form(DType dtype, bool key, std::uint32_t tokens, std::uint32_t dim, std::uint32_t group, Visit visit) {
  for (const Kind kind : kKinds) {
    for (const Scheme scheme : kSchemes) {
      if (kind == Kind::kFp8 && scheme == Scheme::kAsymmetric) continue;
      visit(Form{dtype, key, tokens, dim, key ? group : Form::channel_group(dim, group), kind, scheme});
    }
  }
}

void put_element(DType dtype, std::byte* bytes, std::size_t index, float value) {
  std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (dtype == DType::kFloat16) bits = to_float16(value);
  if (dtype == DType::kBFloat16) bits = to_bfloat16(value);
  std::memcpy(bytes + index * dtype_bytes(dtype), &bits, dtype_bytes(dtype));
}

/// A code in a plane of codes, of so many bits, lowest bits of a byte first.
std::uint32_t bits_at(const std::byte* plane, std::size_t element, std::uint32_t bits) {
  std::uint32_t value = 0;
  for (std::uint32_t i = 0; i < bits; ++i) {
    const std::size_t at = element * bits + i;
    value |= (std::to_integer<std::uint32_t>(plane[at / 8]) >> (at % 8) & 1U) << i;
  }
  return value;
}
void put_bits(std::byte* plane, std::size_t element, std::uint32_t bits, std::uint32_t value) {
  for (std::uint32_t i = 0; i < bits; ++i) {
    const std::size_t at = element * bits + i;
    plane[at / 8] |= static_cast<std::byte>((value >> i & 1U) << (at % 8));
  }
}

/// The groups of a plane, by scale_index().
std::vector<Group> groups_of(const Form& form, const std::byte* plane) {
  std::vector<float> lows(form.scales(), std::numeric_limits<float>::infinity());
  std::vector<float> highs(form.scales(), -std::numeric_limits<float>::infinity());
  for (std::uint32_t token = 0; token < form.tokens; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) {
      const std::size_t index = form.scale_index(token, channel);
      const float value = element_at(form.dtype, plane, std::size_t{token} * form.dim + channel);
      lows[index] = std::min(lows[index], value);
      highs[index] = std::max(highs[index], value);
    }
  }
  std::vector<Group> groups;
  for (std::size_t i = 0; i < lows.size(); ++i) {
    groups.push_back(quantise::make_group(lows[i], highs[i], form.kind, form.scheme, form.dtype));
  }
  return groups;
}

/// The section as docs/format.md describes it, bit by bit.
Bytes reference_section(const Form& form, const std::byte* plane) {
  Bytes section(form.section_bytes());
  const std::vector<Group> groups = groups_of(form, plane);
  for (std::size_t i = 0; i < groups.size(); ++i) {
    std::memcpy(section.data() + 2 * i, &groups[i].scale, 2);
    if (form.has_offsets()) put_element(form.dtype, section.data() + form.offsets_at(), i, groups[i].offset);
  }
  for (std::uint32_t token = 0; token < form.tokens; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) {
      const std::size_t element = std::size_t{token} * form.dim + channel;
      const std::uint32_t code =
          quantise::encode(element_at(form.dtype, plane, element), groups[form.scale_index(token, channel)], form.kind);
      const bool residual = form.kind == Kind::kInt8Residual;
      const std::uint32_t first = quantise::first_bits(form.kind);
      put_bits(section.data() + form.first_at(), element, first, residual ? code >> 4 : code);
      put_bits(section.data() + form.second_at(), element, quantise::second_bits(form.kind),
               residual ? code & 15U : code >> first);
    }
  }
  return section;
}

/// The rows of a section that is valid, element by element.
Bytes reference_rows(const Form& form, const Bytes& section) {
  Bytes rows(std::size_t{form.tokens} * form.dim * dtype_bytes(form.dtype));
  for (std::uint32_t token = 0; token < form.tokens; ++token) {
    for (std::uint32_t channel = 0; channel < form.dim; ++channel) {
      const std::size_t index = form.scale_index(token, channel);
      std::uint16_t scale = 0;
      std::memcpy(&scale, section.data() + 2 * index, 2);
      const float offset = form.has_offsets() ? element_at(form.dtype, section.data() + form.offsets_at(), index) : 0;
      Line line;
      if (!quantise::make_line(scale, offset, form.kind, form.scheme, form.dtype, line)) {
        throw std::runtime_error("a section that encoding cannot have made");
      }
      const std::size_t element = std::size_t{token} * form.dim + channel;
      std::uint32_t code = bits_at(section.data() + form.first_at(), element, quantise::first_bits(form.kind));
      const std::uint32_t second =
          bits_at(section.data() + form.second_at(), element, quantise::second_bits(form.kind));
      if (form.kind == Kind::kInt3) code |= second << 2;
      if (form.kind == Kind::kInt8Residual) {
        code = code << 4 | second;
        line = quantise::refine(line, form.dtype);
      }
      put_element(form.dtype, rows.data(), element, quantise::decode(code, line, form.kind));
    }
  }
  return rows;
}

Bytes encoded(const Form& form, const std::byte* plane) {
  AlignedBytes section(Bytes(form.section_bytes()));
  EXPECT_TRUE(quantise::encode_plane(form, plane, section.span().data())) << describe(form);
  return {section.span().begin(), section.span().end()};
}

/// How far a value of the group may be from what it decodes to.
float error_bound(const Form& form, const Group& group, float value) {
  const float last_place = form.dtype == DType::kBFloat16  ? 0x1p-8F
                           : form.dtype == DType::kFloat16 ? 0x1p-11F
                                                           : 0x1p-22F;
  const float scale = quantise::scale_value(group.scale);
  float step = scale * 0.5001F;
  if (form.kind == Kind::kInt8Residual) step = scale / 16 * 0.5001F;
  if (form.kind == Kind::kFp8) step = std::max(std::abs(value) * 0x1p-4F, scale * 0x1p-10F) * 1.01F;
  // The nearest scale may end a little before the group does.
  if (form.kind != Kind::kFp8) step += scale * quantise::half_span(form.kind) * 0x1p-8F;
  return step + (std::abs(value) + std::abs(group.offset)) * last_place * 1.1F +
         (form.dtype == DType::kFloat16 ? 0x1.1p-25F : quantise::kMinScale * 16);
}

struct Case {
  std::uint32_t tokens;
  std::uint32_t dim;
  std::uint32_t group;
};
const std::vector<Case> kCases = {{1, 64, 64},   {65, 80, 64},    {63, 96, 32},   {128, 112, 128}, {256, 128, 64},
                                  {33, 192, 64}, {131, 256, 128}, {70, 576, 64},  {7, 16, 32},     {9, 48, 32},
                                  {64, 32, 64},  {17, 1024, 32},  {200, 64, 128}, {3, 144, 64}};

TEST(QuantisedForm, IsTheOneOfTheDescriptionOnEveryTarget) {
  for (const DType dtype : kFloats) {
    for (const Case& c : kCases) {
      const ShardShape shape = sample_shape(dtype, c.tokens, c.dim, 0, 1, 1);
      const Bytes canonical = sample_canonical(shape, c.tokens + c.dim);
      for (const bool key : {true, false}) {
        for_each_form(dtype, key, c.tokens, c.dim, c.group, [&](const Form& form) {
          const Bytes section = reference_section(form, canonical.data());
          const Bytes rows = reference_rows(form, section);
          for_each_target([&](const char* target) {
            ASSERT_EQ(encoded(form, canonical.data()), section) << target << " " << describe(form);
            AlignedBytes payload(section);
            Bytes decoded(rows.size());
            ASSERT_TRUE(quantise::decode_rows(form, payload.span().data(), 0, c.tokens, decoded.data()));
            ASSERT_EQ(decoded, rows) << target << " " << describe(form);
          });
        });
      }
    }
  }
}

/// Planes of values that have broken quantisers: the dtype's ends, the smallest numbers, constants, hardly any spread.
std::vector<Bytes> hard_planes(DType dtype, std::uint32_t tokens, std::uint32_t dim) {
  const float largest = largest_finite(dtype);
  const float tiny = dtype == DType::kFloat16 ? 0x1p-24F : 0x1p-126F;
  const float close = dtype == DType::kFloat32 ? 0x1p-23F : dtype == DType::kFloat16 ? 0x1p-10F : 0x1p-7F;
  const std::vector<std::vector<float>> palettes = {{largest, -largest, 0.0F, 1.0F},
                                                    {largest},
                                                    {-largest},
                                                    {largest, largest * 0.5F, largest * 0.97F},
                                                    {-largest, -largest * 0.5F, 0.0F},
                                                    {tiny, -tiny, 0.0F, tiny * 3},
                                                    {0x1p-20F, 0x1p-21F, -0x1p-23F},
                                                    {-0.0F, 0.0F},
                                                    {-0.0F},
                                                    {-tiny, -0.0F},
                                                    {-tiny * 3, -tiny},
                                                    {largest * 0.9986F, largest, largest * 0.25F, 0.0F},
                                                    {3.0F},
                                                    {-7.25F},
                                                    {1.0F, 1.0F + close},
                                                    {-1.0F - close, -1.0F},
                                                    {largest, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F, 1.0F}};
  std::vector<Bytes> planes;
  for (const auto& palette : palettes) {
    Bytes plane(std::size_t{tokens} * dim * dtype_bytes(dtype));
    for (std::size_t i = 0; i < std::size_t{tokens} * dim; ++i) {
      put_element(dtype, plane.data(), i, palette[(i * 7 + i / dim) % palette.size()]);
    }
    planes.push_back(std::move(plane));
  }
  return planes;
}

TEST(QuantisedForm, KeepsExtremesFiniteCloseAndAlikeOnEveryTarget) {
  constexpr std::uint32_t kTokens = 37;
  constexpr std::uint32_t kDim = 48;
  for (const DType dtype : kFloats) {
    for (const Bytes& plane : hard_planes(dtype, kTokens, kDim)) {
      for (const bool key : {true, false}) {
        for_each_form(dtype, key, kTokens, kDim, 32, [&](const Form& form) {
          const Bytes section = reference_section(form, plane.data());
          const Bytes rows = reference_rows(form, section);
          for_each_target([&](const char* target) {
            ASSERT_EQ(encoded(form, plane.data()), section) << target << " " << describe(form);
            AlignedBytes payload(section);
            Bytes decoded(rows.size());
            ASSERT_TRUE(quantise::decode_rows(form, payload.span().data(), 0, kTokens, decoded.data()))
                << target << " " << describe(form);
            ASSERT_EQ(decoded, rows) << target << " " << describe(form);
          });
          const std::vector<Group> groups = groups_of(form, plane.data());
          for (std::uint32_t i = 0; i < kTokens * kDim; ++i) {
            const float before = element_at(dtype, plane.data(), i);
            const float after = element_at(dtype, rows.data(), i);
            ASSERT_TRUE(std::isfinite(after)) << describe(form);
            const Group& group = groups[form.scale_index(i / kDim, i % kDim)];
            // Groups at the very ends of the dtype are squeezed: docs/format.md.
            const float largest = largest_finite(dtype);
            const float scale = quantise::scale_value(group.scale);
            const float end = std::max(std::abs(group.offset), scale * quantise::max_code(form.kind) + group.offset);
            float bound = error_bound(form, group, before);
            if (form.kind == Kind::kInt8Residual && end > largest * 0.9F) bound = largest * 0.075F;
            if (scale * quantise::max_code(form.kind) > 3.3e38F && form.kind != Kind::kFp8) bound = largest * 0.57F;
            ASSERT_LE(std::abs(before * 0.5F - after * 0.5F), bound * 0.5F)
                << describe(form) << " " << before << " became " << after;
          }
        });
      }
    }
  }
}

TEST(QuantisedForm, EveryCodeUnderTheOutermostLinesIsFiniteAndAlikeOnEveryTarget) {
  // Sections that encoding might have made, with scales and offsets at the limits of what is valid, and all codes.
  constexpr std::uint32_t kTokens = 16;
  constexpr std::uint32_t kDim = 256;
  for (const DType dtype : kFloats) {
    const float largest = largest_finite(dtype);
    for_each_form(dtype, true, kTokens, kDim, 32, [&](const Form& form) {
      Bytes section(form.section_bytes());
      std::mt19937 generator(9);
      std::size_t lines = 0;
      for (std::uint32_t channel = 0; channel < kDim; ++channel) {
        const float offset = std::array{-largest, -largest * 0.5F, 0.0F, largest * 0.5F, largest}[channel % 5];
        put_element(dtype, section.data() + form.offsets_at(), form.has_offsets() ? channel : 0,
                    form.has_offsets() ? offset : 0.0F);
        std::uint16_t scale = quantise::max_scale_bits(form.kind);
        Line line;
        const auto valid = [&] { return quantise::make_line(scale, offset, form.kind, form.scheme, dtype, line); };
        while (scale > 0 && !valid()) --scale;
        scale = static_cast<std::uint16_t>(scale - std::min<std::uint32_t>(scale, channel % 3));
        if (!valid()) scale = 0;
        lines += scale > 0;
        std::memcpy(section.data() + std::size_t{channel} * 2, &scale, 2);
      }
      EXPECT_GT(lines, kDim / 2);
      for (std::uint32_t i = 0; i < kTokens * kDim; ++i) {
        auto code = static_cast<std::uint32_t>(generator());
        if (form.kind == Kind::kFp8 && (code & 0x7FU) == 0x7FU) code = 0x7E;
        put_bits(section.data() + form.first_at(), i, quantise::first_bits(form.kind), code);
        put_bits(section.data() + form.second_at(), i, quantise::second_bits(form.kind), code >> 8);
      }
      const Bytes rows = reference_rows(form, section);
      for (std::uint32_t i = 0; i < kTokens * kDim; ++i) {
        ASSERT_TRUE(std::isfinite(element_at(dtype, rows.data(), i))) << describe(form);
      }
      for_each_target([&](const char* target) {
        AlignedBytes payload(section);
        Bytes decoded(rows.size());
        ASSERT_TRUE(quantise::decode_rows(form, payload.span().data(), 0, kTokens, decoded.data()));
        ASSERT_EQ(decoded, rows) << target << " " << describe(form);
      });
    });
  }
}

RC_GTEST_PROP(QuantisedForm, StaysWithinHalfAStep, (std::uint32_t seed)) {
  const Case& c = kCases[seed % kCases.size()];
  const DType dtype = kFloats[seed / 16 % 3];
  const ShardShape shape = sample_shape(dtype, c.tokens, c.dim, 0, 1, 1);
  Bytes canonical = sample_canonical(shape, seed);
  // Channels far from zero, too.
  for (std::uint32_t i = 0; i < c.tokens * c.dim; ++i) {
    if (i % c.dim % 5 == 0) put_element(dtype, canonical.data(), i, element_at(dtype, canonical.data(), i) + 40.0F);
  }
  for_each_form(dtype, (seed & 1U) != 0, c.tokens, c.dim, c.group, [&](const Form& form) {
    AlignedBytes section(encoded(form, canonical.data()));
    Bytes rows(canonical.size());
    RC_ASSERT(quantise::decode_rows(form, section.span().data(), 0, c.tokens, rows.data()));
    const std::vector<Group> groups = groups_of(form, canonical.data());
    for (std::uint32_t i = 0; i < c.tokens * c.dim; ++i) {
      const float before = element_at(dtype, canonical.data(), i);
      const float after = element_at(dtype, rows.data(), i);
      RC_ASSERT(std::abs(before - after) <= error_bound(form, groups[form.scale_index(i / c.dim, i % c.dim)], before));
    }
  });
}

TEST(QuantisedForm, HasTheErrorOfExactScales) {
  // KIVI with scales in float32 against ours in bfloat16: the error must not grow measurably.
  const ShardShape shape = sample_shape(DType::kBFloat16, 1024, 64, 0, 1, 1);
  const Bytes canonical = sample_canonical(shape, 77);
  for (const bool key : {true, false}) {
    for (const Kind kind : {Kind::kInt4, Kind::kInt3, Kind::kInt2}) {
      const Form form{shape.dtype, key, 1024, 64, 64, kind, Scheme::kAsymmetric};
      AlignedBytes section(encoded(form, canonical.data()));
      const Form as_floats{DType::kBFloat16, key, 1024, 64, 64, kind, Scheme::kAsymmetric};
      Bytes rows(canonical.size());
      ASSERT_TRUE(quantise::decode_rows(as_floats, section.span().data(), 0, 1024, rows.data()));
      std::vector<float> lows(form.scales(), 1e30F);
      std::vector<float> highs(form.scales(), -1e30F);
      for (std::uint32_t i = 0; i < 1024 * 64; ++i) {
        const std::size_t index = form.scale_index(i / 64, i % 64);
        lows[index] = std::min(lows[index], element_at(shape.dtype, canonical.data(), i));
        highs[index] = std::max(highs[index], element_at(shape.dtype, canonical.data(), i));
      }
      double exact_error = 0;
      double our_error = 0;
      for (std::uint32_t i = 0; i < 1024 * 64; ++i) {
        const std::size_t index = form.scale_index(i / 64, i % 64);
        const float value = element_at(shape.dtype, canonical.data(), i);
        const float scale = (highs[index] - lows[index]) / quantise::max_code(kind);
        const float code = std::nearbyint((value - lows[index]) / scale);
        const double exact = from_bfloat16(to_bfloat16(code * scale + lows[index])) - value;
        const double ours = element_at(shape.dtype, rows.data(), i) - value;
        exact_error += exact * exact;
        our_error += ours * ours;
      }
      EXPECT_LT(std::sqrt(our_error / exact_error), 1.002) << describe(form);
      RecordProperty(describe(form), std::to_string(std::sqrt(our_error / exact_error)));
    }
  }
}

TEST(QuantisedForm, ResidualIsAsExactAsInt8) {
  const ShardShape shape = sample_shape(DType::kFloat32, 1024, 128, 0, 1, 1);
  const Bytes canonical = sample_canonical(shape, 78);
  const auto error = [&](const std::string& spec) {
    AlignedBytes bytes(encode_sample(*codec_of(spec), sample_info(shape, 32), canonical));
    CollectingSink sink(shape);
    EXPECT_TRUE(decode_all(ContainerReader::parse(bytes.span()).value(), sink));
    double sum = 0;
    for (std::size_t i = 0; i < canonical.size() / 4; ++i) {
      const double off = element_at(shape.dtype, canonical.data(), i) - element_at(shape.dtype, sink.bytes().data(), i);
      sum += off * off;
    }
    return std::sqrt(sum);
  };
  const double ratio = error("int8r") / error("int8");
  RecordProperty("over_int8", std::to_string(ratio));
  EXPECT_LT(ratio, 1.05);
  EXPECT_LT(error("int8r(scheme=symmetric)") / error("int8"), 1.15);
}

TEST(E4m3, DecodesItsTableAndEncodesItBack) {
  for (std::uint32_t code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    const float value = quantise::from_e4m3(byte);
    if ((code & 0x7FU) == 0x7FU) {
      EXPECT_TRUE(std::isnan(value));
      continue;
    }
    const int exponent = static_cast<int>(code >> 3 & 15U);
    const double mantissa = (code & 7U) / 8.0;
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -6) : std::ldexp(1 + mantissa, exponent - 7);
    EXPECT_EQ(value, static_cast<float>((code & 0x80U) != 0 ? -magnitude : magnitude));
    EXPECT_EQ(quantise::to_e4m3(value), byte);
    if ((code & 0x80U) != 0 || code >= 0x7E) continue;
    const float next = quantise::from_e4m3(static_cast<std::uint8_t>(code + 1));
    const float middle = (value + next) / 2;
    EXPECT_EQ(quantise::to_e4m3(middle), code % 2 == 0 ? code : code + 1);
    EXPECT_EQ(quantise::to_e4m3(std::nextafter(middle, 0.0F)), code);
    EXPECT_EQ(quantise::to_e4m3(std::nextafter(middle, 1000.0F)), code + 1);
  }
  EXPECT_EQ(quantise::to_e4m3(1e30F), 0x7E);
  EXPECT_EQ(quantise::to_e4m3(-std::numeric_limits<float>::infinity()), 0xFE);
  EXPECT_EQ(quantise::to_e4m3(std::numeric_limits<float>::quiet_NaN()), 0x7F);
  EXPECT_EQ(quantise::to_e4m3(0x1p-10F), 0x00);
}

const std::vector<std::string> kSpecs = {
    "fp8", "int4", "int4(scheme=symmetric)", "int3(group=32)", "int2", "int2(group=128,scheme=symmetric)", "int8r"};

TEST(QuantisedContainer, AnyRangeOfTokensEqualsTheSliceOfAll) {
  for (const std::string& spec : kSpecs) {
    const ShardShape shape = sample_shape(DType::kBFloat16, 200, 80, 192, 1, 1);
    AlignedBytes bytes(encode_sample(*codec_of(spec), sample_info(shape, 8), sample_canonical(shape, 3)));
    const auto reader = ContainerReader::parse(bytes.span());
    ASSERT_TRUE(reader);
    CollectingSink whole(shape);
    ASSERT_TRUE(decode_all(*reader, whole));
    EXPECT_TRUE(whole.every_byte_written_once());
    for (std::uint32_t begin = 0; begin < 200; begin += 7) {
      for (std::uint32_t end = begin + 1; end <= 200; end += 13) {
        CollectingSink sink(shape, begin % 3 * 16);
        ASSERT_TRUE(reader->decode(0, 9, 0, 9, {begin, end}, sink));
        for (const Part part : {Part::kKey, Part::kValue}) {
          const std::size_t from = shape.plane_offset(0, part, 0) + begin * shape.row_bytes(part);
          const std::size_t size = (end - begin) * shape.row_bytes(part);
          ASSERT_EQ(std::memcmp(sink.bytes().data() + from, whole.bytes().data() + from, size), 0) << spec;
        }
      }
    }
  }
}

TEST(QuantisedContainer, RefusesInputThatIsNotFinite) {
  for (const std::string& spec : kSpecs) {
    const auto codec = codec_of(spec);
    for (const DType dtype : kFloats) {
      const ShardShape shape = sample_shape(dtype, 67, 80, 64, 1, 1);
      const ContainerInfo info = sample_info(shape, 1);
      AlignedBytes out(container_max_bytes(*codec, info));
      const std::size_t count = shape.raw_bytes() / dtype_bytes(dtype);
      for (const std::uint32_t raw : dtype == DType::kFloat32
                                         ? std::array{0x7F800000U, 0xFF800000U, 0x7FC00000U, 0xFF800001U}
                                     : dtype == DType::kFloat16 ? std::array{0x7C00U, 0xFC00U, 0x7E00U, 0xFC01U}
                                                                : std::array{0x7F80U, 0xFF80U, 0x7FC0U, 0xFF81U}) {
        for (const std::size_t position : {std::size_t{0}, count / 3, std::size_t{67 * 80 - 1}, count - 1}) {
          Bytes canonical = sample_canonical(shape, 4);
          std::memcpy(canonical.data() + position * dtype_bytes(dtype), &raw, dtype_bytes(dtype));
          for_each_target([&](const char* target) {
            const auto result = encode_container(*codec, info, canonical, {}, out.span());
            ASSERT_FALSE(result) << target << " " << spec << " " << dtype_name(dtype) << " position " << position;
            EXPECT_EQ(result.error().code(), Code::kInvalid);
            EXPECT_THAT(result.error().message(), HasSubstr("NaN or infinity"));
          });
        }
      }
    }
  }
}

TEST(QuantisedForm, RefusesSectionsThatEncodingCannotHaveMade) {
  constexpr std::uint32_t kDim = 64;
  for (const DType dtype : kFloats) {
    const ShardShape shape = sample_shape(dtype, 40, kDim, 0, 1, 1);
    const Bytes canonical = sample_canonical(shape, 5);
    Bytes rows(canonical.size());
    for (const bool key : {true, false}) {
      for_each_form(dtype, key, 40, kDim, 64, [&](const Form& form) {
        const Bytes good = encoded(form, canonical.data());
        const auto refused = [&](const Bytes& section) {
          for_each_target([&](const char* target) {
            AlignedBytes payload(section);
            EXPECT_FALSE(quantise::decode_rows(form, payload.span().data(), 0, 40, rows.data()))
                << target << " " << describe(form);
          });
        };
        const std::size_t last = form.scales() - 1;
        for (const std::uint16_t scale :
             std::initializer_list<std::uint16_t>{0x7F80, 0xFF80, 0x7FC0, 0x8001, 1, 0x7F7F}) {
          for (const std::size_t index : {std::size_t{0}, last}) {
            Bytes bad = good;
            std::memcpy(bad.data() + index * 2, &scale, 2);
            refused(bad);
          }
        }
        if (form.has_offsets()) {
          for (const float offset : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                                     -std::numeric_limits<float>::infinity()}) {
            std::uint32_t raw = std::bit_cast<std::uint32_t>(offset);
            if (dtype == DType::kBFloat16) raw >>= 16;
            if (dtype == DType::kFloat16) raw = (raw >> 16 & 0x8000U) | 0x7C00U | (std::isnan(offset) ? 0x200U : 0U);
            Bytes bad = good;
            std::memcpy(bad.data() + form.offsets_at() + last * dtype_bytes(dtype), &raw, dtype_bytes(dtype));
            refused(bad);
          }
        }
        if (form.kind == Kind::kFp8) {
          for (const std::uint32_t code : {0x7FU, 0xFFU}) {
            Bytes bad = good;
            bad[form.first_at() + 39 * kDim + 5] = static_cast<std::byte>(code);
            refused(bad);
          }
        }
      });
    }
  }
}

TEST(QuantisedContainer, SurvivesAnyDamageToAPayload) {
  // Straight to the codec, as if the checksum had held.
  std::mt19937 generator(6);
  for (const std::string& spec : kSpecs) {
    const auto codec = codec_of(spec);
    const ShardShape shape = sample_shape(DType::kFloat16, 48, 64, 96, 1, 1);
    AlignedBytes container(encode_sample(*codec, sample_info(shape, 16), sample_canonical(shape, 6)));
    const auto reader = ContainerReader::parse(container.span());
    ASSERT_TRUE(reader);
    for (const SectionInfo& section : reader->sections()) {
      const auto whole = container.span().subspan(section.offset, section.bytes);
      for (int round = 0; round < 200; ++round) {
        AlignedBytes payload(Bytes(whole.begin(), whole.end()));
        for (int i = 0; i <= round % 8; ++i) {
          payload.span()[generator() % section.bytes] = static_cast<std::byte>(generator());
        }
        CollectingSink sink(shape);
        const Status status = codec->decode(shape, section.extent, payload.span(), {0, 48}, 0, 1, sink);
        if (status) {
          for (std::size_t i = 0; i < sink.bytes().size() / 2; ++i) {
            ASSERT_TRUE(std::isfinite(element_at(shape.dtype, sink.bytes().data(), i))) << spec;
          }
        } else {
          EXPECT_EQ(status.code(), Code::kCorrupt);
        }
      }
      CollectingSink sink(shape);
      EXPECT_EQ(codec->decode(shape, section.extent, whole.first(section.bytes - 1), {0, 48}, 0, 1, sink).code(),
                Code::kCorrupt);
    }
  }
}

/// Finite bf16 values by a rule that no library can change.
Bytes ruled_canonical(const ShardShape& shape) {
  Bytes bytes(shape.raw_bytes());
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

TEST(QuantisedContainer, HoldsTheBytesOfVersionOneForEver) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 12, 32, 16, 2, 2);
  const std::vector<std::pair<std::string, std::uint64_t>> stored = {
      {"fp8", 0xa27baf0362b56d3dU},
      {"int4", 0x1c19c73768bdb856U},
      {"int4(scheme=symmetric)", 0xd8c830233d578b76U},
      {"int3", 0x5f86386e54beccafU},
      {"int2", 0xe75ed6aa4cfcadadU},
      {"int8r", 0xf76985b64676b025U},
      {"int8r(group=32,scheme=symmetric)", 0xb74f581eb2e81dc4U}};
  for (const auto& [spec, checksum] : stored) {
    const Bytes container = encode_sample(*codec_of(spec), sample_info(shape, 4), ruled_canonical(shape));
    EXPECT_EQ(checksum64(as_uint8(container)), checksum) << spec;
  }
}

TEST(QuantisedContainer, TakesWhatTheFormSays) {
  const ShardShape shape = sample_shape(DType::kBFloat16, 256, 128, 128, 4, 8);
  const Bytes canonical = sample_canonical(shape, 1);
  const auto share = [&](const std::string& spec) {
    return static_cast<double>(encode_sample(*codec_of(spec), sample_info(shape, 32), canonical).size()) /
           static_cast<double>(shape.raw_bytes());
  };
  EXPECT_LT(share("fp8"), 0.52);
  EXPECT_LT(share("int8r"), 0.535);
  EXPECT_LT(share("int4"), 0.285);
  EXPECT_LT(share("int4(group=128,scheme=symmetric)"), 0.262);
  EXPECT_LT(share("int3"), 0.222);
  EXPECT_LT(share("int2"), 0.16);
}

TEST(QuantisedCodec, RefusesWhatItCannotEncodeInASentence) {
  for (const std::string& spec : kSpecs) {
    const auto codec = codec_of(spec);
    EXPECT_FALSE(codec->lossless());
    EXPECT_THAT(codec->accepts(sample_shape(DType::kOpaqueBytes, 16, 64, 64)).message(), HasSubstr("use raw"));
    const Status odd = codec->accepts(sample_shape(DType::kBFloat16, 16, 72, 64));
    EXPECT_EQ(odd.code(), Code::kRefused);
    EXPECT_THAT(odd.message(), HasSubstr("multiples of 16 up to 1024, not 72"));
    EXPECT_EQ(codec->accepts(sample_shape(DType::kBFloat16, 16, 64, 2048)).code(), Code::kRefused);
  }
}

TEST(QuantisedCodec, ReadsItsParameters) {
  EXPECT_EQ(codec_of("int4")->spec(), "int4(group=64,scheme=asymmetric,version=1)");
  EXPECT_EQ(codec_of("int2( scheme = symmetric , group = 128 )")->spec(), "int2(group=128,scheme=symmetric,version=1)");
  EXPECT_EQ(codec_of("fp8")->spec(), "fp8(group=64,version=1)");
  EXPECT_EQ(codec_of("int8r(group=32)")->spec(), "int8r(group=32,scheme=asymmetric,version=1)");
  EXPECT_THAT(make_codec("int4(group=16)").error().message(), HasSubstr("one of 32, 64, 128, not '16'"));
  EXPECT_FALSE(make_codec("int4(scheme=none)"));
  EXPECT_FALSE(make_codec("fp8(scheme=symmetric)"));
  EXPECT_FALSE(make_codec("int3(version=2)"));
}

TEST(Demotion, GivesTheBytesThatInt4Writes) {
  const std::vector<std::pair<std::string, std::string>> parameters = {
      {"group", "32"}, {"group", "64"}, {"group", "128"}, {"scheme", "symmetric"}};
  for (const auto& parameter : parameters) {
    const auto fine = make_quantised_form({"int8r", {parameter}}, Kind::kInt8Residual).value();
    const auto base = make_quantised_form({"int4", {parameter}}, Kind::kInt4).value();
    EXPECT_EQ(fine->base_spec(), base->spec());
    for (const DType dtype : kFloats) {
      for (const Part part : {Part::kKey, Part::kValue}) {
        for (const std::uint32_t tokens : {1U, 70U, 256U}) {
          const PlaneShape plane{dtype, part, tokens, 80};
          const Bytes rows = sample_canonical(sample_shape(dtype, tokens, 80, 0, 1, 1), tokens);
          AlignedBytes section(fine->max_bytes(plane));
          AlignedBytes expected(base->max_bytes(plane));
          ASSERT_TRUE(fine->encode(plane, rows, section.span()));
          ASSERT_TRUE(base->encode(plane, rows, expected.span()));
          const auto demoted = demote_section(*fine, plane, section.span());
          ASSERT_TRUE(demoted) << demoted.error().to_string();
          EXPECT_EQ(demoted->data(), section.span().data());
          EXPECT_EQ(Bytes(demoted->begin(), demoted->end()), Bytes(expected.span().begin(), expected.span().end()));
        }
      }
    }
  }
}

TEST(Demotion, IsRefusedWithoutABaseOrWithAnotherSize) {
  const PlaneShape plane{DType::kBFloat16, Part::kKey, 64, 64};
  const auto int4 = make_quantised_form({"int4", {}}, Kind::kInt4).value();
  AlignedBytes bytes(100000);
  EXPECT_EQ(demote_section(*int4, plane, bytes.span().first(int4->max_bytes(plane))).error().code(), Code::kRefused);
  const auto fine = make_quantised_form({"int8r", {}}, Kind::kInt8Residual).value();
  EXPECT_EQ(demote_section(*fine, plane, bytes.span()).error().code(), Code::kCorrupt);
  EXPECT_EQ(demote_section(*fine, plane, {}).error().code(), Code::kCorrupt);
}

TEST(QuantisedForm, APlaneOfNoTokensHasNoBytes) {
  for_each_form(DType::kBFloat16, true, 0, 64, 64, [](const Form& form) { EXPECT_EQ(form.section_bytes(), 0U); });
  for_each_form(DType::kBFloat16, false, 0, 64, 64, [](const Form& form) {
    EXPECT_EQ(form.section_bytes(), 0U);
    std::byte none[1] = {};
    EXPECT_TRUE(quantise::encode_plane(form, none, none));
    EXPECT_TRUE(quantise::decode_rows(form, none, 0, 0, none));
  });
}

}  // namespace
}  // namespace kvern
