#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"

namespace kvern::plan {

/// Bytes of keys and values per token, over all layers and KV heads. model: a number, or the path of a Hugging Face
/// config.json. kInvalid with a sentence that names the field; kNotFound when the file cannot be read.
Result<double> kv_bytes_per_token(const std::string& model);

}  // namespace kvern::plan
