#pragma once

#include <cstdint>

namespace kvern {

/// Another hash of a fingerprint for each salt (the finaliser of splitmix64).
inline std::uint64_t mix_fingerprint(std::uint64_t fingerprint, std::uint64_t salt) {
  std::uint64_t mixed = fingerprint + salt * 0x9E3779B97F4A7C15ULL;
  mixed = (mixed ^ (mixed >> 30U)) * 0xBF58476D1CE4E5B9ULL;
  mixed = (mixed ^ (mixed >> 27U)) * 0x94D049BB133111EBULL;
  return mixed ^ (mixed >> 31U);
}

}  // namespace kvern
