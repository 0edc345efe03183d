#include "tests/golden_vectors/compare.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>

namespace kvern::golden {

namespace {

std::string difference(const std::string& name, std::size_t at, double got, double expected) {
  std::ostringstream text;
  text.precision(9);
  text << name << "[" << at << "]: got " << got << ", expected " << expected;
  return text.str();
}

std::string compare_close(const std::string& name, const nlohmann::json& rule, const Tensor& expected,
                          const Tensor& got) {
  const double atol = rule.at("atol").get<double>();
  const double rtol = rule.at("rtol").get<double>();
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double a = got.value(i);
    const double b = expected.value(i);
    const bool within = std::isfinite(b) && std::abs(a - b) <= atol + rtol * std::abs(b);
    if (!(a == b || within || (std::isnan(a) && std::isnan(b)))) return difference(name, i, a, b);
  }
  return {};
}

std::string compare_exact(const std::string& name, const Tensor& expected, const Tensor& got) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double a = got.value(i);
    const double b = expected.value(i);
    if (!(a == b || (std::isnan(a) && std::isnan(b)))) return difference(name, i, a, b);
  }
  return {};
}

std::string compare_codes(const std::string& name, const nlohmann::json& rule, const Tensor& expected,
                          const Tensor& got) {
  const double most = rule.at("max_diff").get<double>();
  std::size_t unequal = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double a = got.value(i);
    const double b = expected.value(i);
    if (a != b) ++unequal;
    if (!(std::abs(a - b) <= most)) return difference(name, i, a, b);
  }
  if (static_cast<double>(unequal) >
      rule.at("max_mismatch_fraction").get<double>() * static_cast<double>(expected.size())) {
    return name + ": " + std::to_string(unequal) + " of " + std::to_string(expected.size()) + " differ";
  }
  return {};
}

/// The indices of a row; -1 pads.
std::set<std::int64_t> indices(const Tensor& tensor, std::size_t row) {
  std::set<std::int64_t> found;
  for (std::size_t i = row * tensor.columns(); i < (row + 1) * tensor.columns(); ++i) {
    if (tensor.integer(i) != -1) found.insert(tensor.integer(i));
  }
  return found;
}

std::string compare_set(const std::string& name, const nlohmann::json& rule, const Tensors& all, const Tensor& expected,
                        const Tensor& got) {
  const Tensor* undecided = nullptr;
  if (rule.contains("undecided")) {
    const auto found = all.find(rule.at("undecided").get<std::string>());
    if (found == all.end()) return name + ": the tensor of undecided indices is missing";
    undecided = &found->second;
  }
  const std::size_t rows = expected.columns() == 0 ? 0 : expected.size() / expected.columns();
  for (std::size_t row = 0; row < rows; ++row) {
    std::set<std::int64_t> a = indices(got, row);
    std::set<std::int64_t> b = indices(expected, row);
    const std::string where = name + " row " + std::to_string(row) + ": ";
    if (a.size() != b.size()) {
      return where + std::to_string(a.size()) + " indices, expected " + std::to_string(b.size());
    }
    if (undecided != nullptr) {
      for (const std::int64_t index : indices(*undecided, row)) {
        a.erase(index);
        b.erase(index);
      }
    }
    if (a != b) {
      std::ostringstream text;
      for (const std::int64_t index : a) {
        if (!b.contains(index)) text << " +" << index;
      }
      for (const std::int64_t index : b) {
        if (!a.contains(index)) text << " -" << index;
      }
      return where + "differs by" + text.str();
    }
  }
  return {};
}

}  // namespace

std::string compare(const std::string& name, const nlohmann::json& rule, const Tensors& expected, const Tensor& got) {
  const std::string how = rule.at("compare").get<std::string>();
  if (how == "info") return {};
  const auto found = expected.find(name);
  if (found == expected.end()) return name + ": the case's file does not hold it";
  if (got.size() != found->second.size()) {
    return name + ": " + std::to_string(got.size()) + " elements, expected " + std::to_string(found->second.size());
  }
  if (how == "close") return compare_close(name, rule, found->second, got);
  if (how == "exact") return compare_exact(name, found->second, got);
  if (how == "codes") return compare_codes(name, rule, found->second, got);
  if (how == "set") return compare_set(name, rule, expected, found->second, got);
  return name + ": the comparison '" + how + "' is not known";
}

}  // namespace kvern::golden
