#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "tests/golden_vectors/tensor.h"

namespace kvern::golden {

/// The cases of a folder of golden vectors: manifest.json and one file of tensors per case. Not thread-safe.
class Vectors {
 public:
  /// Throws std::runtime_error, with a sentence, when the manifest cannot be read.
  explicit Vectors(std::filesystem::path folder);

  const std::vector<nlohmann::json>& cases() const { return cases_; }
  /// The tensors of a case's own file; empty when it has none.
  const Tensors& tensors(const std::string& case_name);
  /// An input, whether stored, referred to or generated; its recipe's check sums are verified.
  const Tensor& input(const std::string& case_name, const std::string& input_name);

 private:
  const nlohmann::json& find(const std::string& case_name) const;

  std::filesystem::path folder_;
  std::vector<nlohmann::json> cases_;
  std::map<std::string, Tensors> files_;
  std::map<std::string, Tensor> generated_;
};

/// Generates a recipe's tensor, and throws where word_sum or head say that it is another one.
Tensor generate(const nlohmann::json& input);

/// One case while a method runs it: inputs to read, outputs to give.
class CaseRun {
 public:
  CaseRun(Vectors& vectors, const nlohmann::json& of) : vectors_(vectors), case_(of) {}

  std::string name() const { return case_.at("name").get<std::string>(); }
  const nlohmann::json& param(const std::string& key) const { return case_.at("params").at(key); }
  bool has_param(const std::string& key) const { return case_.at("params").contains(key); }
  std::uint32_t number(const std::string& key) const { return param(key).get<std::uint32_t>(); }
  const nlohmann::json& table() const { return case_.at("table"); }
  bool has_input(const std::string& key) const { return case_.at("inputs").contains(key); }
  const Tensor& input(const std::string& key) { return vectors_.input(name(), key); }
  /// Outputs that the case expects, other than "info".
  bool expects(const std::string& key) const {
    return case_.at("outputs").contains(key) && case_["outputs"][key].at("compare") != "info";
  }
  const Tensor& expected(const std::string& key) { return vectors_.tensors(name()).at(key); }
  /// Gives an output and compares it; one that the case does not expect is ignored.
  void output(const std::string& key, const Tensor& got);
  template <typename T>
  void output(const std::string& key, const std::vector<T>& values) {
    output(key, Tensor::of<T>(values, {values.size()}));
  }
  /// For what is not a tensor: rows of the table, invariants.
  void expect(bool holds, const std::string& what) {
    if (!holds) failures_.push_back(what);
  }
  /// Everything that differed, and outputs that were never given.
  std::vector<std::string> failures() const;

 private:
  Vectors& vectors_;
  const nlohmann::json& case_;
  std::vector<std::string> failures_;
  std::vector<std::string> given_;
};

using Method = std::function<void(CaseRun&)>;

/// By the manifest's names.
using Methods = std::map<std::string, Method, std::less<>>;

/// Runs a case on the instruction set that is chosen; every difference, an unknown method included.
std::vector<std::string> run_case(Vectors& vectors, const nlohmann::json& of, const Methods& methods);

}  // namespace kvern::golden
