#pragma once

#include <filesystem>
#include <span>

#include "base/status.h"
#include "tests/golden_vectors/tensor.h"

namespace kvern::golden {

/// The tensors of a safetensors file. kInvalid, with what is wrong, for bytes that are not one.
Result<Tensors> parse_safetensors(std::span<const std::byte> file);
/// kNotFound when there is no such file.
Result<Tensors> read_safetensors(const std::filesystem::path& path);

/// A file that holds the tensors.
std::vector<std::byte> write_safetensors(const Tensors& tensors);

}  // namespace kvern::golden
