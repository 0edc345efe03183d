#include "kernels/byte_planes.h"

#include <bit>
#include <cstdint>
#include <cstring>

namespace kvern {
namespace {

template <typename Word>
void split(const std::byte* elements, std::size_t count, std::byte* planes) {
  for (std::size_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, elements + i * sizeof word, sizeof word);
    word = std::rotl(word, 1);
    for (std::size_t plane = 0; plane < sizeof word; ++plane) {
      planes[plane * count + i] = static_cast<std::byte>(word >> (8 * plane));
    }
  }
}

template <typename Word>
void join(const std::byte* planes, std::size_t count, std::byte* elements) {
  for (std::size_t i = 0; i < count; ++i) {
    Word word = 0;
    for (std::size_t plane = 0; plane < sizeof word; ++plane) {
      word = static_cast<Word>(word | static_cast<Word>(static_cast<Word>(planes[plane * count + i]) << (8 * plane)));
    }
    word = std::rotr(word, 1);
    std::memcpy(elements + i * sizeof word, &word, sizeof word);
  }
}

}  // namespace

void split_byte_planes(std::span<const std::byte> elements, std::size_t element_bytes, std::span<std::byte> planes) {
  if (elements.empty()) return;
  const std::size_t count = elements.size() / element_bytes;
  if (element_bytes == 2) return split<std::uint16_t>(elements.data(), count, planes.data());
  if (element_bytes == 4) return split<std::uint32_t>(elements.data(), count, planes.data());
  std::memcpy(planes.data(), elements.data(), elements.size());
}

void join_byte_planes(std::span<const std::byte> planes, std::size_t element_bytes, std::span<std::byte> elements) {
  if (planes.empty()) return;
  const std::size_t count = planes.size() / element_bytes;
  if (element_bytes == 2) return join<std::uint16_t>(planes.data(), count, elements.data());
  if (element_bytes == 4) return join<std::uint32_t>(planes.data(), count, elements.data());
  std::memcpy(elements.data(), planes.data(), planes.size());
}

}  // namespace kvern
