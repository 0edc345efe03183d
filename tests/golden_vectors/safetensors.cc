#include "tests/golden_vectors/safetensors.h"

#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

namespace kvern::golden {

namespace {

constexpr std::pair<const char*, ElementType> kTypes[] = {{"F32", ElementType::kF32},
                                                          {"F64", ElementType::kF64},
                                                          {"I32", ElementType::kI32},
                                                          {"U8", ElementType::kU8},
                                                          {"BF16", ElementType::kBF16}};

/// A whole number in 0 .. limit.
std::optional<std::size_t> whole_number(const nlohmann::json& json, std::size_t limit) {
  if (!json.is_number_unsigned() || json.get<std::uint64_t>() > limit) return std::nullopt;
  return json.get<std::size_t>();
}

Result<Tensor> parse_tensor(const nlohmann::json& json, std::span<const std::byte> data) {
  const auto wrong = [](std::string what) { return failure(Code::kInvalid, std::move(what)); };
  if (!json.is_object() || !json.contains("dtype") || !json.contains("shape") || !json.contains("data_offsets")) {
    return wrong("an entry lacks dtype, shape or data_offsets");
  }
  Tensor tensor;
  bool known = false;
  for (const auto& [name, type] : kTypes) {
    if (json["dtype"] == name) {
      tensor.type = type;
      known = true;
    }
  }
  if (!known) return wrong("dtype " + json["dtype"].dump() + " is not known");
  const auto& offsets = json["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !json["shape"].is_array()) return wrong("malformed entry");
  const auto begin = whole_number(offsets[0], data.size());
  const auto end = whole_number(offsets[1], data.size());
  if (!begin || !end || *begin > *end) return wrong("offsets lie outside the file");
  std::size_t elements = 1;
  for (const auto& dimension : json["shape"]) {
    const auto length = whole_number(dimension, std::numeric_limits<std::uint32_t>::max());
    if (!length) return wrong("a dimension is no whole number");
    if (*length != 0 && elements > data.size() / *length) return wrong("a shape is larger than the file");
    elements *= *length;
    tensor.shape.push_back(*length);
  }
  if (elements * element_bytes(tensor.type) != *end - *begin) return wrong("shape and offsets do not agree");
  const auto bytes = data.subspan(*begin, *end - *begin);
  tensor.bytes.assign(bytes.begin(), bytes.end());
  return tensor;
}

}  // namespace

Result<Tensors> parse_safetensors(std::span<const std::byte> file) {
  std::uint64_t header_bytes = 0;
  if (file.size() < sizeof header_bytes) return failure(Code::kInvalid, "safetensors: the file is too short");
  std::memcpy(&header_bytes, file.data(), sizeof header_bytes);
  const auto rest = file.subspan(sizeof header_bytes);
  if (header_bytes > rest.size()) return failure(Code::kInvalid, "safetensors: the header is longer than the file");
  const auto* text = reinterpret_cast<const char*>(rest.data());
  const auto header = nlohmann::json::parse(text, text + header_bytes, nullptr, false);
  if (!header.is_object()) return failure(Code::kInvalid, "safetensors: the header is no JSON object");
  Tensors tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    auto tensor = parse_tensor(entry, rest.subspan(header_bytes));
    if (!tensor) return failure(Code::kInvalid, "safetensors: " + name + ": " + tensor.error().message());
    tensors.emplace(name, *std::move(tensor));
  }
  return tensors;
}

Result<Tensors> read_safetensors(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return failure(Code::kNotFound, path.string() + " cannot be read");
  const std::vector<char> chars{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  auto tensors = parse_safetensors(std::as_bytes(std::span(chars)));
  if (!tensors) return failure(tensors.error().code(), path.string() + ": " + tensors.error().message());
  return tensors;
}

std::vector<std::byte> write_safetensors(const Tensors& tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    const char* type = "";
    for (const auto& [known, of] : kTypes) {
      if (of == tensor.type) type = known;
    }
    header[name] = {{"dtype", type}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t header_bytes = text.size();
  std::vector<std::byte> file(sizeof header_bytes + text.size());
  std::memcpy(file.data(), &header_bytes, sizeof header_bytes);
  std::memcpy(file.data() + sizeof header_bytes, text.data(), text.size());
  for (const auto& [name, tensor] : tensors) file.insert(file.end(), tensor.bytes.begin(), tensor.bytes.end());
  return file;
}

}  // namespace kvern::golden
