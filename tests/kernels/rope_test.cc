#include "kernels/rope.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <numbers>
#include <random>

#include "kernels/element.h"
#include "tests/kernels/samples.h"
#include "tests/kernels/targets.h"

namespace kvern::rope {
namespace {

using ::testing::HasSubstr;

Parameters parameters(const std::string& text) {
  const auto made = Parameters::from(*CodecStep::parse("unrotate(" + text + ")"));
  EXPECT_TRUE(made) << made.error().message();
  return *made;
}

std::vector<float> random_rows(std::size_t count, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count);
  for (float& value : rows) value = normal(generator);
  return rows;
}

HeadRows view(const std::vector<float>& rows, std::uint32_t heads, std::uint32_t tokens, std::uint32_t dim) {
  return HeadRows::contiguous(reinterpret_cast<const std::byte*>(rows.data()), DType::kFloat32, heads, tokens, dim);
}

std::vector<float> turned(const HeadRows& rows, TurnsView turns, Style style, Direction direction) {
  std::vector<float> out(std::size_t{rows.heads} * rows.tokens * rows.dim);
  const Status status =
      rotate(rows, turns, style, direction, DType::kFloat32, reinterpret_cast<std::byte*>(out.data()));
  EXPECT_TRUE(status) << status.message();
  return out;
}

TEST(CosineSine, AgreesWithTheLibraryAtEveryAngleThatPositionsReach) {
  std::mt19937_64 generator(7);
  std::uniform_real_distribution<double> small(-10, 10);
  std::uniform_real_distribution<double> large(-2e6, 2e6);
  for (int i = 0; i < 200000; ++i) {
    const double angle = i % 2 == 0 ? small(generator) : large(generator);
    const CosineSine got = cosine_sine(angle);
    ASSERT_NEAR(got.cosine, std::cos(angle), 6.1e-8) << angle;
    ASSERT_NEAR(got.sine, std::sin(angle), 6.1e-8) << angle;
  }
  EXPECT_EQ(cosine_sine(0).cosine, 1.0F);
  EXPECT_EQ(cosine_sine(0).sine, 0.0F);
}

TEST(Rope, TurnsPairsByHand) {
  // One pair at position 1 with inverse frequency pi/2: (1, 2) becomes (-2, 1).
  const std::vector<double> quarter = {std::numbers::pi / 2};
  const Turns turns = Turns::from(quarter, 1, 1);
  const std::vector<float> row = {1, 2, 5};
  const auto got = turned(view(row, 1, 1, 3), turns, Style::kNeox, Direction::kForward);
  EXPECT_NEAR(got[0], -2, 1e-6);
  EXPECT_NEAR(got[1], 1, 1e-6);
  EXPECT_EQ(got[2], 5) << "beyond the pairs nothing turns";
}

TEST(Rope, StylesDifferOnlyInWhichElementsMakeAPair) {
  const std::uint32_t dim = 64;
  const auto frequencies = parameters("dim=64").inverse_frequencies();
  const auto rows = random_rows(5 * dim, 1);
  std::vector<float> mixed(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::size_t element = i % dim;
    mixed[i - element + (element < dim / 2 ? 2 * element : 2 * (element - dim / 2) + 1)] = rows[i];
  }
  const Turns turns = Turns::from(frequencies, 1000, 5);
  const auto neox = turned(view(rows, 1, 5, dim), turns, Style::kNeox, Direction::kForward);
  const auto interleaved = turned(view(mixed, 1, 5, dim), turns, Style::kInterleaved, Direction::kForward);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::size_t element = i % dim;
    EXPECT_EQ(neox[i], interleaved[i - element + (element < dim / 2 ? 2 * element : 2 * (element - dim / 2) + 1)]);
  }
}

struct Frequency {
  std::size_t pair;
  double expected;
};

void expect_frequencies(const std::string& text, std::initializer_list<Frequency> expected) {
  const auto got = parameters(text).inverse_frequencies();
  for (const Frequency& frequency : expected) {
    EXPECT_NEAR(got[frequency.pair] / frequency.expected, 1, 2e-6) << text << ", pair " << frequency.pair;
  }
}

// Values of vLLM 0.32's rotary embeddings, in fp32.
TEST(Rope, FrequenciesOfEveryScalingAreTheEngines) {
  expect_frequencies("theta=10000,dim=64", {{0, 1}, {8, 0.1}, {16, 0.01}, {24, 0.001}});
  expect_frequencies("theta=10000,dim=64,scaling=linear,factor=4", {{0, 0.25}, {8, 0.025}, {24, 0.00025}});
  expect_frequencies("theta=500000,dim=128,scaling=llama3,factor=8,original=8192,low=1,high=4", {{0, 1},
                                                                                                 {7, 0.23805381},
                                                                                                 {21, 0.01349042},
                                                                                                 {28, 0.0032114461},
                                                                                                 {35, 9.5562122e-05},
                                                                                                 {42, 2.2748929e-05},
                                                                                                 {63, 3.0689259e-07}});
  expect_frequencies(
      "theta=1000000,dim=128,scaling=yarn,factor=4,original=32768",
      {{0, 1}, {21, 0.010746079}, {28, 0.0018482766}, {35, 0.00024625839}, {42, 2.8869548e-05}, {63, 3.1023444e-07}});
  expect_frequencies("theta=150000,dim=64,scaling=yarn,factor=32,original=4096,truncate=false", {{0, 1},
                                                                                                 {6, 0.10702442},
                                                                                                 {9, 0.031705696},
                                                                                                 {12, 0.0067949593},
                                                                                                 {15, 0.0010526022},
                                                                                                 {18, 3.8308812e-05},
                                                                                                 {31, 3.0235114e-07}});
}

TEST(Rope, RefusesWhatDependsOnTheLengthOfThePrompt) {
  for (const char* scaling : {"dynamic", "longrope"}) {
    const auto made = Parameters::from(*CodecStep::parse(std::string("unrotate(dim=64,scaling=") + scaling + ")"));
    ASSERT_FALSE(made);
    EXPECT_THAT(made.error().message(), HasSubstr("length of the prompt"));
  }
}

TEST(Rope, CanonicalTextGivesTheSameParameters) {
  for (const char* text : {"style=neox,theta=10000,dim=64", "style=interleaved,theta=1000000,dim=32",
                           "style=neox,theta=500000,dim=128,scaling=llama3,factor=8,original=8192,low=1,high=4",
                           "style=neox,theta=10000,dim=64,scaling=linear,factor=2.5",
                           "style=neox,theta=1000000,dim=128,scaling=yarn,factor=4,original=32768,fast=32,slow=1"
                           ",truncate=false"}) {
    EXPECT_EQ(parameters(text).to_string(), text);
  }
}

TEST(Rope, RefusesTurnsThatDoNotFit) {
  const auto rows = random_rows(64, 1);
  std::vector<float> out(64);
  auto* to = reinterpret_cast<std::byte*>(out.data());
  const std::vector<double> frequencies(8, 1.0);
  const auto status_of = [&](const HeadRows& from, TurnsView turns) {
    return rotate(from, turns, Style::kNeox, Direction::kForward, DType::kFloat32, to).code();
  };
  EXPECT_EQ(status_of(view(rows, 1, 4, 16), Turns::from(frequencies, 0, 4)), Code::kOk);
  EXPECT_EQ(status_of(view(rows, 1, 4, 16), Turns::from(frequencies, 0, 3)), Code::kInvalid);
  EXPECT_EQ(status_of(view(rows, 1, 8, 8), Turns::from(frequencies, 0, 8)), Code::kInvalid);
}

struct Sample {
  std::uint32_t dim;
  std::uint32_t rotary;
  Style style;
  DType dtype;
};

Sample any_sample() {
  const std::uint32_t dim = *rc::gen::element<std::uint32_t>(16, 64, 80, 96, 112, 128, 192, 256, 24, 6);
  return {dim, 2 * *rc::gen::inRange<std::uint32_t>(1, dim / 2 + 1),
          *rc::gen::element(Style::kNeox, Style::kInterleaved),
          *rc::gen::element(DType::kFloat32, DType::kBFloat16, DType::kFloat16)};
}

RC_GTEST_PROP(Rope, TurningBackAndForwardGivesTheRows, ()) {
  const Sample c = any_sample();
  const auto tokens = *rc::gen::inRange<std::uint32_t>(1, 20);
  const auto first = *rc::gen::inRange<std::int64_t>(0, 200000);
  const auto rows = random_rows(std::size_t{2} * tokens * c.dim, *rc::gen::arbitrary<std::uint32_t>());
  const Turns turns = Turns::from(parameters("dim=" + std::to_string(c.rotary)).inverse_frequencies(), first, tokens);
  const auto back = turned(view(rows, 2, tokens, c.dim), turns, c.style, Direction::kBack);
  const auto again = turned(view(back, 2, tokens, c.dim), turns, c.style, Direction::kForward);
  for (std::size_t i = 0; i < rows.size(); ++i) RC_ASSERT(std::abs(again[i] - rows[i]) < 2e-6F);
}

RC_GTEST_PROP(Rope, AConstantShiftOfAllLeavesEveryProductOfQueryAndKey, ()) {
  const Sample c = any_sample();
  const auto shift = *rc::gen::inRange<std::int64_t>(-100000, 100000);
  const std::uint32_t tokens = 6;
  const auto rows = random_rows(std::size_t{tokens} * c.dim, *rc::gen::arbitrary<std::uint32_t>());
  const auto frequencies = parameters("theta=500000,dim=" + std::to_string(c.rotary)).inverse_frequencies();
  const std::int64_t by[] = {shift};
  const auto shifted = turned(view(rows, 1, tokens, c.dim), Turns::at(frequencies, by), c.style, Direction::kForward);
  const auto product = [&](const std::vector<float>& of, std::size_t a, std::size_t b) {
    double sum = 0;
    for (std::size_t i = 0; i < c.dim; ++i) sum += double{of[a * c.dim + i]} * double{of[b * c.dim + i]};
    return sum;
  };
  for (std::size_t a = 0; a < tokens; ++a) {
    for (std::size_t b = 0; b < tokens; ++b) {
      RC_ASSERT(std::abs(product(shifted, a, b) - product(rows, a, b)) < 1e-4);
    }
  }
}

RC_GTEST_PROP(Rope, ShiftingPositionsIsTurningAtTheNewOnes, ()) {
  const Sample c = any_sample();
  const auto position = *rc::gen::inRange<std::int64_t>(0, 100000);
  const auto shift = *rc::gen::inRange<std::int64_t>(-1000, 1000);
  const auto row = random_rows(c.dim, *rc::gen::arbitrary<std::uint32_t>());
  const auto frequencies = parameters("dim=" + std::to_string(c.rotary)).inverse_frequencies();
  const auto at = [&](const std::vector<float>& from, std::int64_t where) {
    const std::int64_t positions[] = {where};
    return turned(view(from, 1, 1, c.dim), Turns::at(frequencies, positions), c.style, Direction::kForward);
  };
  const auto twice = at(at(row, position), shift);
  const auto once = at(row, position + shift);
  for (std::size_t i = 0; i < row.size(); ++i) RC_ASSERT(std::abs(twice[i] - once[i]) < 3e-6F);
}

RC_GTEST_PROP(Rope, EveryInstructionSetGivesTheSameBytes, ()) {
  const Sample c = any_sample();
  const DType to = *rc::gen::element(DType::kFloat32, DType::kBFloat16, DType::kFloat16);
  const std::uint32_t tokens = 5;
  const ShardShape shape = sample_shape(c.dtype, tokens, c.dim, 0, 1, 2);
  const Bytes canonical = sample_canonical(shape, *rc::gen::arbitrary<std::uint32_t>());
  // Rows apart from one another, at odd offsets.
  const std::size_t stride = shape.row_bytes(Part::kKey) + dtype_bytes(c.dtype);
  Bytes strided(2 * tokens * stride);
  for (std::size_t row = 0; row < 2 * tokens; ++row) {
    std::memcpy(strided.data() + row * stride, canonical.data() + row * shape.row_bytes(Part::kKey),
                shape.row_bytes(Part::kKey));
  }
  const HeadRows rows{strided.data(), c.dtype, 2, tokens, c.dim, tokens * stride, stride};
  const Turns turns = Turns::from(parameters("dim=" + std::to_string(c.rotary)).inverse_frequencies(), 77, tokens);
  std::vector<Bytes> results;
  for_each_target([&](const char*) {
    Bytes out(std::size_t{2} * tokens * c.dim * dtype_bytes(to));
    RC_ASSERT(rotate(rows, turns, c.style, Direction::kBack, to, out.data()));
    results.push_back(std::move(out));
  });
  for (const Bytes& result : results) RC_ASSERT(result == results.front());
}

}  // namespace
}  // namespace kvern::rope
