#include "store/container_map.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "base/keys.h"
#include "store/slab.h"

namespace kvern {
namespace {

constexpr std::uint64_t kBitsPerWord = 64;

struct Header {
  std::uint64_t magic = 0x3150'414d'4e52'564b;  // "KVRNMAP1"
  std::uint64_t page_bytes = Slab::kAlignment;
  std::uint64_t slab_bytes = 0;
  std::uint64_t checksum = 0;  // of the fields above
};
static_assert(sizeof(Header) % sizeof(std::uint64_t) == 0);

std::uint64_t words_for(std::uint64_t slab_bytes) {
  const std::uint64_t pages = slab_bytes / Slab::kAlignment;
  return (pages + kBitsPerWord - 1) / kBitsPerWord;
}

std::uint64_t checksum_of(const Header& header) { return checksum64(&header, offsetof(Header, checksum)); }

// The compiler must not move the store of a bit across those of the bytes that it vouches for; the processor does not
// matter, since a process that died has finished its stores.
void order_stores() { std::atomic_signal_fence(std::memory_order_seq_cst); }

}  // namespace

std::size_t ContainerMap::bytes_for(std::uint64_t slab_bytes) {
  return sizeof(Header) + words_for(slab_bytes) * sizeof(std::uint64_t);
}

ContainerMap::ContainerMap(std::span<std::byte> memory, std::uint64_t slab_bytes) {
  if (memory.size() < bytes_for(slab_bytes)) throw std::invalid_argument("container map: the memory is too small");
  words_ = {reinterpret_cast<std::uint64_t*>(memory.data() + sizeof(Header)), words_for(slab_bytes)};
  Header found;
  std::memcpy(&found, memory.data(), sizeof found);
  const Header fresh;
  adopted_ = found.magic == fresh.magic && found.page_bytes == fresh.page_bytes &&
             found.checksum == checksum_of(found) && found.slab_bytes <= slab_bytes;
  if (!adopted_) std::ranges::fill(words_, 0);
  if (adopted_ && found.slab_bytes < slab_bytes) {
    // What lies behind the end of the smaller map was never written.
    const std::uint64_t old_pages = found.slab_bytes / Slab::kAlignment;
    for (std::uint64_t page = old_pages; page < words_.size() * kBitsPerWord; ++page) clear(page * Slab::kAlignment);
  }
  found = fresh;
  found.slab_bytes = slab_bytes;
  found.checksum = checksum_of(found);
  std::memcpy(memory.data(), &found, sizeof found);
}

std::uint64_t& ContainerMap::word_of(std::uint64_t offset) { return words_[offset / Slab::kAlignment / kBitsPerWord]; }

void ContainerMap::set(std::uint64_t offset) {
  order_stores();
  word_of(offset) |= std::uint64_t{1} << (offset / Slab::kAlignment % kBitsPerWord);
  order_stores();
}

void ContainerMap::clear(std::uint64_t offset) {
  order_stores();
  word_of(offset) &= ~(std::uint64_t{1} << (offset / Slab::kAlignment % kBitsPerWord));
  order_stores();
}

std::vector<std::uint64_t> ContainerMap::offsets() const {
  std::vector<std::uint64_t> offsets;
  for (std::size_t index = 0; index < words_.size(); ++index) {
    for (std::uint64_t word = words_[index]; word != 0; word &= word - 1) {
      const auto bit = static_cast<std::uint64_t>(std::countr_zero(word));
      offsets.push_back((index * kBitsPerWord + bit) * Slab::kAlignment);
    }
  }
  return offsets;
}

}  // namespace kvern
