#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvern {

/// Bytes that lie in several places, in order.
using ByteParts = std::vector<std::span<const std::byte>>;

/// `bytes` of them from offset on, or as many as there are.
ByteParts slice(std::span<const std::span<const std::byte>> parts, std::uint64_t offset, std::uint64_t bytes);

/// XXH3-64 of all of them.
std::uint64_t checksum_of(std::span<const std::span<const std::byte>> parts);

std::size_t bytes_of(std::span<const std::span<const std::byte>> parts);

}  // namespace kvern
