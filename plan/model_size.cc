#include "plan/model_size.h"

#include <charconv>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

namespace kvern::plan {
namespace {

using nlohmann::json;

// Larger than any model's; keeps the product finite.
constexpr std::int64_t kFieldMost = std::int64_t{1} << 32U;

std::optional<double> field(const json& config, const char* name) {
  const auto found = config.find(name);
  if (found == config.end() || !found->is_number_integer()) return std::nullopt;
  const auto value = found->get<std::int64_t>();
  if (value <= 0 || value > kFieldMost) return std::nullopt;
  return static_cast<double>(value);
}

Result<double> element_bytes(const json& config) {
  for (const char* name : {"torch_dtype", "dtype"}) {
    const auto found = config.find(name);
    if (found == config.end() || !found->is_string()) continue;
    const auto dtype = found->get<std::string>();
    if (dtype == "bfloat16" || dtype == "float16") return 2;
    if (dtype == "float32") return 4;
    return failure(Code::kInvalid, "its dtype " + dtype + " is not known: give the bytes per token instead");
  }
  return 2;  // what engines serve models in that do not say
}

Result<double> from_config(const json& whole) {
  // Models that see and hear keep the language model's part apart.
  const json& config = whole.contains("text_config") && whole["text_config"].is_object() ? whole["text_config"] : whole;
  const auto layers = field(config, "num_hidden_layers");
  if (!layers) return failure(Code::kInvalid, "it has no num_hidden_layers: give the bytes per token instead");
  auto bytes = element_bytes(config);
  if (!bytes) return bytes;
  if (const auto latent = field(config, "kv_lora_rank")) {
    const auto rope = field(config, "qk_rope_head_dim");
    return *layers * (*latent + rope.value_or(0)) * *bytes;
  }
  const auto query_heads = field(config, "num_attention_heads");
  auto heads = field(config, "num_key_value_heads");
  if (!heads) heads = query_heads;
  if (!heads) return failure(Code::kInvalid, "it has no num_key_value_heads: give the bytes per token instead");
  auto dim = field(config, "head_dim");
  if (const auto hidden = field(config, "hidden_size"); !dim && hidden && query_heads) dim = *hidden / *query_heads;
  if (!dim) return failure(Code::kInvalid, "it has no head_dim: give the bytes per token instead");
  return *layers * 2 * *heads * *dim * *bytes;
}

}  // namespace

Result<double> kv_bytes_per_token(const std::string& model) {
  double number = 0;
  const auto [end, error] = std::from_chars(model.data(), model.data() + model.size(), number);
  if (error == std::errc{} && end == model.data() + model.size()) {
    if (std::isfinite(number) && number > 0) return number;
    return failure(Code::kInvalid, "the bytes per token must be above 0");
  }
  std::ifstream in(model);
  if (!in)
    return failure(Code::kNotFound, model + " is neither a number of bytes per token nor a file that can be read");
  const json config = json::parse(in, nullptr, false);
  if (!config.is_object()) return failure(Code::kInvalid, model + ": expected the JSON object of a config.json");
  auto bytes = from_config(config);
  if (!bytes) return failure(bytes.error().code(), model + ": " + bytes.error().message());
  return bytes;
}

}  // namespace kvern::plan
