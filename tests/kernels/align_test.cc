#include "kernels/align.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

#include "base/executor.h"
#include "profile_samples.h"
#include "samples.h"
#include "targets.h"

namespace kvern::align {
namespace {

HeadRows view(const std::vector<float>& rows, std::uint32_t heads, std::uint32_t tokens, std::uint32_t dim) {
  return HeadRows::contiguous(reinterpret_cast<const std::byte*>(rows.data()), DType::kFloat32, heads, tokens, dim);
}

TEST(Align, CrcIsThatOfZlib) {
  Bytes text;
  put_text(text, "123456789");
  EXPECT_EQ(bitwise_crc(text), 0xCBF43926U);
}

TEST(Align, TransposeUndoesTheMatrix) {
  const auto rows = random_rows(3 * 70 * 64, 1);
  const auto matrix = orthogonal(192, 2);
  std::vector<float> turned(rows.size());
  std::vector<float> back(rows.size());
  ASSERT_TRUE(multiply_rows(view(rows, 3, 70, 64), matrix, turned, nullptr));
  ASSERT_TRUE(multiply_rows(view(turned, 3, 70, 64), transposed(matrix, 192), back, nullptr));
  EXPECT_THAT(back, testing::Pointwise(testing::FloatNear(1e-5F), rows));
  EXPECT_NE(turned, rows);
}

TEST(Align, RowsOfAllHeadsAreOneVector) {
  // Two heads of 16, one token; the matrix moves element i to 31 - i.
  const auto rows = random_rows(32, 3);
  std::vector<float> matrix(32 * 32);
  for (std::size_t i = 0; i < 32; ++i) matrix[i * 32 + 31 - i] = 1;
  std::vector<float> out(32);
  ASSERT_TRUE(multiply_rows(view(rows, 2, 1, 16), matrix, out, nullptr));
  EXPECT_TRUE(std::equal(out.begin(), out.end(), rows.rbegin()));
}

RC_GTEST_PROP(Align, SameBytesOnEveryInstructionSetAndThreadCount, ()) {
  const auto heads = *rc::gen::inRange(1U, 4U);
  const auto tokens = *rc::gen::inRange(0U, 150U);
  const auto seed = *rc::gen::inRange(0U, 100000U);
  const DType dtype = *rc::gen::element(DType::kFloat32, DType::kFloat16, DType::kBFloat16);
  const auto bytes = sample_canonical({dtype, 0, 1, 0, heads, tokens, 32, 0}, seed);
  const HeadRows rows = HeadRows::contiguous(bytes.data(), dtype, heads, tokens, 32);
  const auto matrix = orthogonal(heads * 32, seed);
  std::vector<std::vector<float>> results;
  const auto add = [&](Executor* executor) {
    results.emplace_back(std::size_t{heads} * tokens * 32);
    RC_ASSERT(bool(multiply_rows(rows, matrix, results.back(), executor)));
  };
  for_each_target([&](const char*) { add(nullptr); });
  ThreadPool pool("align", 3, 64);
  add(&pool);
  for (const auto& result : results) RC_ASSERT(result == results[0]);
}

TEST(Align, OtherSizesAreRefused) {
  const std::vector<float> rows(64);
  std::vector<float> out(64);
  EXPECT_EQ(multiply_rows(view(rows, 1, 2, 24), std::vector<float>(576), out, nullptr).code(), Code::kInvalid);
  EXPECT_EQ(multiply_rows(view(rows, 1, 2, 32), std::vector<float>(1000), out, nullptr).code(), Code::kInvalid);
  EXPECT_EQ(multiply_rows(view(rows, 1, 1, 32), std::vector<float>(1024), out, nullptr).code(), Code::kInvalid);
}

TEST(ModelProfile, SaysWhatWasWritten) {
  const auto profile = ModelProfile::parse(profile_of({4, 6, 10}));
  ASSERT_TRUE(profile) << profile.error().to_string();
  EXPECT_EQ(profile->model, "model");
  EXPECT_EQ(profile->layers, 12U);
  EXPECT_EQ(profile->heads, 2U);
  EXPECT_EQ(profile->dim, 16U);
  ASSERT_NE(profile->find(6), nullptr);
  EXPECT_EQ(profile->find(6)->whole, orthogonal(32, 6));
  EXPECT_EQ(profile->find(6)->whole_angle_degrees, 20.5F);
  EXPECT_EQ(profile->find(5), nullptr);
}

TEST(ModelProfile, DamageIsNoticed) {
  const Bytes good = profile_of({4, 6});
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{12}, std::size_t{40}, good.size() - 1}) {
    EXPECT_EQ(ModelProfile::parse(std::span(good).first(size)).error().code(), Code::kCorrupt);
  }
  Bytes flipped = good;
  flipped[good.size() / 2] ^= std::byte{1};
  EXPECT_EQ(ModelProfile::parse(flipped).error().code(), Code::kCorrupt);
  Bytes newer = good;
  newer[8] = std::byte{2};
  EXPECT_EQ(ModelProfile::parse(newer).error().code(), Code::kRefused);
}

TEST(ModelProfile, MatricesThatStretchAndLayersOutOfOrderAreRefused) {
  for (const Bytes& bytes : {profile_of({4}, 2, 16, 1.01F), profile_of({6, 4}), profile_of({11}), profile_of({4, 5})}) {
    EXPECT_EQ(ModelProfile::parse(bytes).error().code(), Code::kCorrupt);
  }
}

TEST(ModelProfile, NameSaysWhatItHolds) {
  const Bytes bytes = profile_of({4, 6});
  const auto name = add_profile("test", bytes);
  ASSERT_TRUE(name);
  EXPECT_THAT(*name, testing::MatchesRegex("test-[0-9a-f]{8}"));
  EXPECT_EQ((*find_profile(*name))->find(4)->whole, orthogonal(32, 4));
  EXPECT_EQ(find_profile("test-00000000").error().code(), Code::kNotFound);
}

TEST(ModelProfile, FilesAreFoundInTheFolderAndCheckedAgainstTheirName) {
  const Bytes bytes = profile_of({2, 8});
  std::uint32_t checksum = 0;
  std::memcpy(&checksum, bytes.data() + bytes.size() - 4, 4);
  char text[9];
  std::snprintf(text, sizeof text, "%08x", checksum);
  const std::string folder = testing::TempDir();
  const std::string good = std::string("model.7b-") + text;
  for (const std::string& name : {good, std::string("model.7b-00000001")}) {
    std::ofstream(folder + "/" + name + ".kvernprofile", std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  ASSERT_EQ(setenv("KVERN_PROFILES", folder.c_str(), 1), 0);
  const auto found = find_profile(good);
  ASSERT_TRUE(found) << found.error().to_string();
  EXPECT_EQ((*found)->find(8)->whole, orthogonal(32, 8));
  EXPECT_EQ(*find_profile(good), *found);
  EXPECT_EQ(find_profile("model.7b-00000001").error().code(), Code::kCorrupt);
  ASSERT_EQ(setenv("KVERN_PROFILES", "/nowhere", 1), 0);
  EXPECT_EQ(find_profile("model.7b-00000001").error().code(), Code::kNotFound);
  set_profile_folder(folder);
  EXPECT_EQ(find_profile("model.7b-00000001").error().code(), Code::kCorrupt);
  set_profile_folder("");
  EXPECT_EQ(find_profile("model.7b-00000001").error().code(), Code::kNotFound);
  unsetenv("KVERN_PROFILES");
}

RC_GTEST_PROP(ModelProfile, AnySizesUnderAGoodChecksumAreSafe, ()) {
  Bytes bytes = profile_of({4, 6}, 1, 16);
  bytes.erase(bytes.end() - 4, bytes.end());
  for (auto changes = *rc::gen::inRange(1, 4); changes > 0; --changes) {
    bytes[*rc::gen::inRange<std::size_t>(12, 40)] = static_cast<std::byte>(*rc::gen::inRange(0, 256));
  }
  put(bytes, bitwise_crc(bytes));
  const auto profile = ModelProfile::parse(bytes);
  RC_ASSERT((profile.has_value() || profile.error().code() == Code::kCorrupt));
}

}  // namespace
}  // namespace kvern::align
