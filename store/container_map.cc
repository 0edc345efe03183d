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

struct Header {
  std::uint64_t magic = 0x3250'414d'4e52'564b;  // "KVRNMAP2"
  std::uint64_t page_bytes = Slab::kAlignment;
  std::uint64_t slab_bytes = 0;
  std::uint64_t checksum = 0;  // of the fields above
};

std::uint64_t checksum_of(const Header& header) { return checksum64(&header, offsetof(Header, checksum)); }

// The compiler must not move the store of a bit across those of the bytes that it vouches for; the processor does not
// matter, since a process that died has finished its stores.
void order_stores() { std::atomic_signal_fence(std::memory_order_seq_cst); }

}  // namespace

std::uint64_t ContainerMap::groups_for(std::uint64_t slab_bytes) {
  const std::uint64_t pages = slab_bytes / Slab::kAlignment;
  return (pages + kPagesPerGroup - 1) / kPagesPerGroup;
}

std::size_t ContainerMap::bytes_for(std::uint64_t slab_bytes) {
  static_assert(sizeof(Header) % alignof(PageGroup) == 0);
  return sizeof(Header) + groups_for(slab_bytes) * sizeof(PageGroup);
}

ContainerMap::ContainerMap(std::span<std::byte> memory, std::uint64_t slab_bytes) {
  if (memory.size() < bytes_for(slab_bytes)) throw std::invalid_argument("container map: the memory is too small");
  groups_ = {reinterpret_cast<PageGroup*>(memory.data() + sizeof(Header)), groups_for(slab_bytes)};
  Header found;
  std::memcpy(&found, memory.data(), sizeof found);
  const Header fresh;
  adopted_ = found.magic == fresh.magic && found.page_bytes == fresh.page_bytes &&
             found.checksum == checksum_of(found) && found.slab_bytes <= slab_bytes;
  if (!adopted_) std::ranges::fill(groups_, PageGroup{});
  if (adopted_ && found.slab_bytes < slab_bytes) {
    // What lies behind the end of the smaller map was never written.
    const std::uint64_t old_pages = found.slab_bytes / Slab::kAlignment;
    for (std::uint64_t page = old_pages; page < groups_.size() * kPagesPerGroup; ++page) clear(page * Slab::kAlignment);
  }
  found = fresh;
  found.slab_bytes = slab_bytes;
  found.checksum = checksum_of(found);
  std::memcpy(memory.data(), &found, sizeof found);
}

void ContainerMap::put(std::uint64_t offset, bool begins) {
  const std::uint64_t page = offset / Slab::kAlignment;
  std::uint64_t& word = groups_[page / kPagesPerGroup].begins;
  const std::uint64_t bit = std::uint64_t{1} << page % kPagesPerGroup;
  order_stores();
  word = begins ? word | bit : word & ~bit;
  order_stores();
}

void ContainerMap::set(std::uint64_t offset, std::uint32_t used) {
  touch(offset, used);
  put(offset, true);
}

void ContainerMap::clear(std::uint64_t offset) { put(offset, false); }

void ContainerMap::touch(std::uint64_t offset, std::uint32_t used) {
  const std::uint64_t page = offset / Slab::kAlignment;
  groups_[page / kPagesPerGroup].used[page % kPagesPerGroup] = used;
}

std::uint32_t ContainerMap::last_use(std::uint64_t offset) const {
  const std::uint64_t page = offset / Slab::kAlignment;
  return groups_[page / kPagesPerGroup].used[page % kPagesPerGroup];
}

std::vector<std::uint64_t> ContainerMap::offsets() const {
  std::vector<std::uint64_t> offsets;
  for (std::size_t index = 0; index < groups_.size(); ++index) {
    for (std::uint64_t word = groups_[index].begins; word != 0; word &= word - 1) {
      const auto bit = static_cast<std::uint64_t>(std::countr_zero(word));
      offsets.push_back((index * kPagesPerGroup + bit) * Slab::kAlignment);
    }
  }
  return offsets;
}

}  // namespace kvern
