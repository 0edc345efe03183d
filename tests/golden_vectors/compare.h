#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "tests/golden_vectors/tensor.h"

namespace kvern::golden {

/// Compares what a method gave with what a case expects, by the rule that the manifest's entry of the output names
/// (tests/golden/README.md). Tensors are those of the expected outputs, for rules that look at another one. Returns an
/// empty string when they agree, else what differs first. An unknown rule is a difference.
std::string compare(const std::string& name, const nlohmann::json& rule, const Tensors& expected, const Tensor& got);

}  // namespace kvern::golden
