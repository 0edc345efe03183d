#pragma once

#include <cstddef>
#include <string_view>

namespace kvern {

/// Where the block hashes of a container with this (canonical) codec chain begin: one behind the other, each behind a
/// byte that says its length (docs/format.md).
std::size_t block_hashes_offset(std::string_view codec_spec);

}  // namespace kvern
