// The runner of the golden vectors itself: what it reads, and that it notices what is wrong.

#include "tests/golden_vectors/vectors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <unistd.h>

#include <fstream>
#include <limits>

#include "tests/golden_vectors/compare.h"
#include "tests/golden_vectors/safetensors.h"

namespace kvern::golden {
namespace {

using nlohmann::json;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

Tensor floats(std::vector<float> values) { return Tensor::of<float>(values, {values.size()}); }
Tensor integers(std::vector<std::int32_t> values, std::vector<std::size_t> shape) {
  return Tensor::of<std::int32_t>(values, std::move(shape));
}
std::string compared(const json& rule, const Tensor& expected, const Tensor& got) {
  return compare("x", rule, {{"x", expected}}, got);
}

TEST(Compare, CloseTakesTheToleranceAndNoMore) {
  const json rule = {{"compare", "close"}, {"atol", 0.1}, {"rtol", 0.01}};
  EXPECT_EQ(compared(rule, floats({10, -10, kNaN}), floats({10.19F, -10.19F, kNaN})), "");
  EXPECT_NE(compared(rule, floats({10}), floats({10.21F})), "");
  EXPECT_NE(compared(rule, floats({10}), floats({kNaN})), "");
  EXPECT_NE(compared(rule, floats({kNaN}), floats({10})), "");
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(compared(rule, floats({infinity}), floats({infinity})), "");
  EXPECT_NE(compared(rule, floats({infinity}), floats({-infinity})), "");
}

TEST(Compare, ExactIsExact) {
  const json rule = {{"compare", "exact"}};
  EXPECT_EQ(compared(rule, floats({1, kNaN, 0.0F}), floats({1, kNaN, -0.0F})), "");
  EXPECT_NE(compared(rule, floats({1}), floats({std::nextafter(1.0F, 2.0F)})), "");
  EXPECT_NE(compared(rule, floats({1, 2}), floats({1})), "");
}

TEST(Compare, CodesCountWhatDiffers) {
  const json rule = {{"compare", "codes"}, {"max_diff", 1}, {"max_mismatch_fraction", 0.25}};
  EXPECT_EQ(compared(rule, integers({1, 2, 3, 4}, {4}), integers({1, 2, 3, 5}, {4})), "");
  EXPECT_NE(compared(rule, integers({1, 2, 3, 4}, {4}), integers({1, 2, 4, 5}, {4})), "");
  EXPECT_NE(compared(rule, integers({1, 2, 3, 4}, {4}), integers({1, 2, 3, 6}, {4})), "");
}

TEST(Compare, SetsMaySwapOnlyWhatIsUndecided) {
  const json rule = {{"compare", "set"}, {"undecided", "u"}};
  const Tensors expected = {{"x", integers({1, 4, 7, 2, 3, -1}, {2, 3})}, {"u", integers({7, 9, -1, -1}, {2, 2})}};
  EXPECT_EQ(compare("x", rule, expected, integers({9, 1, 4, 3, 2, -1}, {2, 3})), "");
  EXPECT_NE(compare("x", rule, expected, integers({1, 5, 7, 2, 3, -1}, {2, 3})), "");
  EXPECT_NE(compare("x", rule, expected, integers({1, 4, 7, 2, 4, -1}, {2, 3})), "");
  EXPECT_NE(compare("x", rule, expected, integers({1, 4, 7, 2, 3, 5}, {2, 3})), "");
  EXPECT_NE(compare("x", rule, {{"x", expected.at("x")}}, expected.at("x")), "");
}

TEST(Compare, NamesARuleThatItDoesNotKnow) {
  EXPECT_NE(compared({{"compare", "roughly"}}, floats({1}), floats({1})), "");
  EXPECT_EQ(compared({{"compare", "info"}}, floats({1}), floats({2})), "");
}

TEST(Safetensors, ReadsWhatItWrites) {
  const Tensors tensors = {{"a", floats({1, 2, 3})}, {"b", integers({-1, 5}, {2, 1})}, {"empty", floats({})}};
  const auto read = parse_safetensors(write_safetensors(tensors));
  ASSERT_TRUE(read) << read.error().to_string();
  ASSERT_EQ(read->size(), 3U);
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(read->at(name).bytes, tensor.bytes);
    EXPECT_EQ(read->at(name).shape, tensor.shape);
    EXPECT_EQ(read->at(name).type, tensor.type);
  }
}

std::vector<std::byte> file_with_header(const std::string& header, std::size_t data_bytes) {
  std::vector<std::byte> file(8 + header.size() + data_bytes);
  const std::uint64_t size = header.size();
  std::memcpy(file.data(), &size, 8);
  std::memcpy(file.data() + 8, header.data(), header.size());
  return file;
}

TEST(Safetensors, RefusesWhatLiesOutsideTheFile) {
  const auto refused = [](const std::string& header) { return !parse_safetensors(file_with_header(header, 8)); };
  EXPECT_FALSE(refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}})"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[4294967295,4294967295,4],"data_offsets":[0,8]}})"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})"));
  EXPECT_TRUE(refused(R"({"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}})"));
  EXPECT_TRUE(refused(R"({"a":5})"));
  EXPECT_TRUE(refused("[]"));
  EXPECT_TRUE(refused("{"));
  auto file = file_with_header("{}", 0);
  file[0] = std::byte{200};
  EXPECT_FALSE(parse_safetensors(file));
  EXPECT_FALSE(parse_safetensors(std::span(file).first(7)));
}

RC_GTEST_PROP(SafetensorsProperty, AnyBytesAreReadOrRefused, (std::vector<std::uint8_t> flips)) {
  auto file = write_safetensors({{"a", floats({1, 2, 3})}, {"b", integers({-1, 5}, {2, 1})}});
  for (std::size_t i = 0; i < flips.size(); ++i)
    file[flips[i] % file.size()] ^= std::byte{flips[(i * 7) % flips.size()]};
  const auto read = parse_safetensors(file);
  for (const auto& [name, tensor] : read ? *read : Tensors{}) {
    RC_ASSERT(tensor.bytes.size() == tensor.size() * element_bytes(tensor.type));
    RC_ASSERT(tensor.bytes.size() <= file.size());
  }
}

/// A folder of its own with a manifest and the tensors of case "c".
class Folder {
 public:
  Folder(const json& manifest, const Tensors& tensors) {
    std::filesystem::create_directories(path_);
    std::ofstream(path_ / "manifest.json") << manifest;
    const auto bytes = write_safetensors(tensors);
    std::ofstream(path_ / "c.safetensors", std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_ = std::filesystem::temp_directory_path() / ("kvern-golden-" + std::to_string(::getpid()));
};

json manifest_of(const json& output, const std::string& method = "twice") {
  return {{"cases",
           {{{"name", "c"},
             {"method", method},
             {"params", json::object()},
             {"inputs", {{"x", {{"dtype", "F32"}, {"shape", {2}}}}}},
             {"outputs", {{"y", output}}}}}}};
}

TEST(RunCase, PassesWhatIsRightAndFailsWhatWasTamperedWith) {
  const Methods methods = {{"twice",
                            [](CaseRun& run) {
                              std::vector<float> y = run.input("x").floats();
                              for (float& value : y) value *= 2;
                              run.output("y", y);
                            }},
                           {"lazy", [](CaseRun&) {}}};
  const json close = {{"compare", "close"}, {"atol", 0}, {"rtol", 1e-6}};
  const auto failures = [&](const json& manifest, std::vector<float> expected) {
    const Folder folder(manifest, {{"x", floats({1, 2})}, {"y", floats(std::move(expected))}});
    Vectors vectors(folder.path());
    return run_case(vectors, vectors.cases().front(), methods);
  };
  EXPECT_THAT(failures(manifest_of(close), {2, 4}), ::testing::IsEmpty());
  EXPECT_THAT(failures(manifest_of(close), {2, 4.001F}), ::testing::SizeIs(1));
  EXPECT_THAT(failures(manifest_of(close, "lazy"), {2, 4}), ::testing::SizeIs(1));
  EXPECT_THAT(failures(manifest_of(close, "thrice"), {2, 4}), ::testing::SizeIs(1));
  EXPECT_THAT(failures(manifest_of({{"compare", "roughly"}}), {2, 4}), ::testing::SizeIs(1));
}

TEST(Recipe, IsTheGeneratorOfTheManifest) {
  json input = {{"recipe", {{"seed", 35}, {"scale", 2.0}, {"round", "none"}}},
                {"shape", {4}},
                {"head", {1.168212890625, -0.1353759765625, 0.851043701171875, 0.039794921875}},
                {"word_sum", ""}};
  std::uint64_t sum = 0;
  for (const auto& value : input["head"]) sum += std::bit_cast<std::uint32_t>(value.get<float>());
  input["word_sum"] = std::to_string(sum);
  EXPECT_EQ(generate(input).floats()[2], 0.851043701171875F);
  json other_sum = input;
  other_sum["word_sum"] = "1";
  EXPECT_THROW(generate(other_sum), std::runtime_error);
  json other_head = input;
  other_head["head"][3] = 0.5;
  EXPECT_THROW(generate(other_head), std::runtime_error);
}

TEST(Vectors, SayWhatIsMissing) { EXPECT_THROW(Vectors("/nonexistent"), std::runtime_error); }

}  // namespace
}  // namespace kvern::golden
