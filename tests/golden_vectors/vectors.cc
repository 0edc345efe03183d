#include "tests/golden_vectors/vectors.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>

#include "tests/golden_vectors/compare.h"
#include "tests/golden_vectors/safetensors.h"

namespace kvern::golden {

Vectors::Vectors(std::filesystem::path folder) : folder_(std::move(folder)) {
  std::ifstream file(folder_ / "manifest.json");
  const auto manifest = nlohmann::json::parse(file, nullptr, false);
  if (!manifest.is_object() || !manifest.contains("cases")) {
    throw std::runtime_error((folder_ / "manifest.json").string() + " is missing or no manifest; set KVERN_GOLDEN");
  }
  cases_ = manifest["cases"].get<std::vector<nlohmann::json>>();
}

const nlohmann::json& Vectors::find(const std::string& case_name) const {
  const auto found = std::ranges::find_if(cases_, [&](const auto& c) { return c.at("name") == case_name; });
  if (found == cases_.end()) throw std::runtime_error("there is no case " + case_name);
  return *found;
}

const Tensors& Vectors::tensors(const std::string& case_name) {
  if (const auto found = files_.find(case_name); found != files_.end()) return found->second;
  const std::filesystem::path path = folder_ / (case_name + ".safetensors");
  if (!std::filesystem::exists(path)) return files_[case_name];
  auto read = read_safetensors(path);
  if (!read) throw std::runtime_error(read.error().message());
  return files_.emplace(case_name, *std::move(read)).first->second;
}

const Tensor& Vectors::input(const std::string& case_name, const std::string& input_name) {
  const nlohmann::json& entry = find(case_name).at("inputs").at(input_name);
  if (entry.contains("ref")) {
    const auto ref = entry["ref"].get<std::string>();
    const std::size_t colon = ref.find(':');
    if (colon == std::string::npos) throw std::runtime_error("malformed reference " + ref);
    return input(ref.substr(0, colon), ref.substr(colon + 1));
  }
  if (!entry.contains("recipe")) return tensors(case_name).at(input_name);
  const std::string key = case_name + ":" + input_name;
  const auto found = generated_.find(key);
  if (found != generated_.end()) return found->second;
  return generated_.emplace(key, generate(entry)).first->second;
}

Tensor generate(const nlohmann::json& input) {
  const nlohmann::json& recipe = input.at("recipe");
  const auto seed = recipe.at("seed").get<std::uint64_t>();
  const auto scale = recipe.at("scale").get<float>();
  const bool round = recipe.at("round") == "bf16";
  const auto shape = input.at("shape").get<std::vector<std::size_t>>();
  std::size_t count = 1;
  for (const std::size_t length : shape) count *= length;
  std::vector<float> values(count);
  std::uint64_t sum = 0;
  for (std::size_t n = 0; n < count; ++n) {
    std::uint64_t z = seed + (n + 1) * 0x9E3779B97F4A7C15U;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    z = z ^ (z >> 31);
    const auto s = static_cast<std::int32_t>((z & 0xFFFF) + (z >> 16 & 0xFFFF) + (z >> 32 & 0xFFFF) + (z >> 48));
    values[n] = static_cast<float>(s - 131070) * 0x1p-16F * scale;
    if (round) values[n] = from_bfloat16(to_bfloat16(values[n]));
    sum += std::bit_cast<std::uint32_t>(values[n]);
  }
  if (std::to_string(sum) != input.at("word_sum").get<std::string>()) {
    throw std::runtime_error("a recipe of seed " + std::to_string(seed) + " gave another word_sum");
  }
  for (std::size_t i = 0; i < input.at("head").size(); ++i) {
    if (values.at(i) != input["head"][i].get<float>()) throw std::runtime_error("a recipe gave another head");
  }
  if (input.value("dtype", "F32") != "BF16") return Tensor::of<float>(values, shape);
  Tensor tensor{ElementType::kBF16, shape, std::vector<std::byte>(count * 2)};
  for (std::size_t n = 0; n < count; ++n) {
    const std::uint16_t bits = to_bfloat16(values[n]);
    std::memcpy(&tensor.bytes[2 * n], &bits, sizeof bits);
  }
  return tensor;
}

void CaseRun::output(const std::string& key, const Tensor& got) {
  if (!expects(key)) return;
  given_.push_back(key);
  if (std::string what = compare(key, case_["outputs"][key], vectors_.tensors(name()), got); !what.empty()) {
    failures_.push_back(std::move(what));
  }
}

std::vector<std::string> CaseRun::failures() const {
  std::vector<std::string> all = failures_;
  for (const auto& [key, rule] : case_.at("outputs").items()) {
    if (rule.at("compare") != "info" && std::ranges::find(given_, key) == given_.end()) {
      all.push_back(key + ": the method gave no such output");
    }
  }
  return all;
}

std::vector<std::string> run_case(Vectors& vectors, const nlohmann::json& of, const Methods& methods) {
  const auto method = of.at("method").get<std::string>();
  const auto found = methods.find(method);
  if (found == methods.end()) return {"the method '" + method + "' is not known"};
  CaseRun run(vectors, of);
  try {
    found->second(run);
  } catch (const std::exception& error) {
    return {error.what()};
  }
  return run.failures();
}

}  // namespace kvern::golden
