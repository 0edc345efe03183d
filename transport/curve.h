#pragma once

#include <string>

#include "transport/control.h"

namespace kvern {

/// The length of a CURVE key in Z85.
constexpr std::size_t kCurveKeyCharacters = 40;

/// True for 40 characters of Z85.
bool is_curve_key(const std::string& key);
/// 32 bytes to Z85.
std::string to_z85(const std::string& key_bytes);

}  // namespace kvern
