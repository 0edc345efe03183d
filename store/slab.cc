#include "store/slab.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "store/piecewise_vector.h"

namespace kvern {
namespace {

// Free blocks are binned by size: one level per power of two, each cut into 32 equal steps, so that what an allocation
// takes from the next bin is at most 1/32 larger than what it asked for.
constexpr std::uint32_t kStepBits = 5;
constexpr std::uint32_t kSteps = 1U << kStepBits;
constexpr std::uint32_t kLevels = 32 - kStepBits + 1;
// In its own bin an allocation looks at this many blocks for one that fits: blocks of equal size are the rule, since
// most chunks of a model have the same shape.
constexpr int kOwnBinTries = 16;
constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

struct Bin {
  std::uint32_t level = 0;
  std::uint32_t step = 0;
};

Bin bin_of(std::uint32_t pages) {
  if (pages < kSteps) return {0, pages};
  const auto log2 = static_cast<std::uint32_t>(std::bit_width(pages)) - 1;
  return {log2 - kStepBits + 1, (pages >> (log2 - kStepBits)) & (kSteps - 1)};
}

// Which block begins at a page: an open hash table of block numbers, in 4 to 8 bytes for each.
class BlockAtPage {
 public:
  // page_of(block) of those that are in the table does not change.
  template <typename PageOf>
  void insert(std::uint32_t page, std::uint32_t block, PageOf page_of) {
    if (slots_.size() * 3 < (used_ + 1) * 4) {
      const std::vector<std::uint32_t> before =
          std::exchange(slots_, std::vector<std::uint32_t>(std::max<std::size_t>(2 * slots_.size(), 16), kNone));
      for (const std::uint32_t each : before) {
        if (each != kNone) slots_[first_free(page_of(each))] = each;
      }
    }
    slots_[first_free(page)] = block;
    ++used_;
  }
  // kNone when none does.
  template <typename PageOf>
  std::uint32_t find(std::uint32_t page, PageOf page_of) const {
    const std::size_t slot = slot_of(page, page_of);
    return slot == slots_.size() ? kNone : slots_[slot];
  }
  // Those behind it move up, so that no search ends at the gap.
  template <typename PageOf>
  void erase(std::uint32_t page, PageOf page_of) {
    std::size_t gap = slot_of(page, page_of);
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t next = (gap + 1) & mask; slots_[next] != kNone; next = (next + 1) & mask) {
      const std::size_t home = home_of(page_of(slots_[next]));
      if (((next - home) & mask) < ((next - gap) & mask)) continue;
      slots_[gap] = slots_[next];
      gap = next;
    }
    slots_[gap] = kNone;
    --used_;
  }

 private:
  std::size_t home_of(std::uint32_t page) const {
    return static_cast<std::size_t>((page * 0x9E3779B97F4A7C15ULL) >> 32U) & (slots_.size() - 1);
  }
  std::size_t first_free(std::uint32_t page) const {
    std::size_t slot = home_of(page);
    while (slots_[slot] != kNone) slot = (slot + 1) & (slots_.size() - 1);
    return slot;
  }
  template <typename PageOf>
  std::size_t slot_of(std::uint32_t page, PageOf page_of) const {
    if (slots_.empty()) return 0;
    std::size_t slot = home_of(page);
    for (; slots_[slot] != kNone; slot = (slot + 1) & (slots_.size() - 1)) {
      if (page_of(slots_[slot]) == page) return slot;
    }
    return slots_.size();
  }

  std::vector<std::uint32_t> slots_;  // a power of two of them, or none
  std::size_t used_ = 0;
};

std::uint64_t pages_for(std::uint64_t bytes) { return bytes / Slab::kAlignment + (bytes % Slab::kAlignment != 0); }

}  // namespace

struct Slab::State {
  // A run of pages, free or used. Neighbours in memory are linked, free ones of a bin too.
  struct Block {
    std::uint32_t page = 0;
    std::uint32_t pages = 0;
    std::uint32_t before = kNone;
    std::uint32_t after = kNone;
    std::uint32_t previous_free = kUsed;
    std::uint32_t next_free = kNone;

    static constexpr std::uint32_t kUsed = kNone - 1;  ///< instead of a free neighbour in the bin
    bool is_free() const { return previous_free != kUsed; }
  };

  std::uint32_t capacity_pages = 0;       // those of cut_off() left out
  std::uint32_t reachable_pages = kNone;  // what lies behind them is cut off
  std::uint64_t used_pages = 0;
  PiecewiseVector<Block> blocks;
  std::vector<std::uint32_t> spare_blocks;
  BlockAtPage used_by_page;
  std::array<std::array<std::uint32_t, kSteps>, kLevels> heads;
  std::uint32_t level_bits = 0;                  // levels that hold a free block
  std::array<std::uint32_t, kLevels> step_bits;  // steps of a level that do

  auto page_of() const {
    return [this](std::uint32_t id) { return blocks[id].page; };
  }
  // Of the used block that begins at the offset; kNone when none does.
  std::uint32_t used_at(std::uint64_t offset) const {
    return used_by_page.find(static_cast<std::uint32_t>(offset / kAlignment), page_of());
  }

  std::uint32_t new_block(const Block& block) {
    if (spare_blocks.empty()) {
      blocks.push_back(block);
      return static_cast<std::uint32_t>(blocks.size() - 1);
    }
    const std::uint32_t id = spare_blocks.back();
    spare_blocks.pop_back();
    blocks[id] = block;
    return id;
  }

  // What is cut off of the block is neither free nor used from now on.
  void link_free(std::uint32_t id) {
    if (blocks[id].page + blocks[id].pages > reachable_pages) {
      const bool wholly = blocks[id].page >= reachable_pages;
      const std::uint32_t gone = wholly ? id : cut(id, reachable_pages - blocks[id].page);
      capacity_pages -= blocks[gone].pages;
      if (wholly) return;
    }
    Block& block = blocks[id];
    const Bin bin = bin_of(block.pages);
    std::uint32_t& head = heads[bin.level][bin.step];
    block.previous_free = kNone;
    block.next_free = head;
    if (head != kNone) blocks[head].previous_free = id;
    head = id;
    step_bits[bin.level] |= 1U << bin.step;
    level_bits |= 1U << bin.level;
  }

  void unlink_free(std::uint32_t id) {
    Block& block = blocks[id];
    const Bin bin = bin_of(block.pages);
    if (block.previous_free != kNone) {
      blocks[block.previous_free].next_free = block.next_free;
    } else {
      heads[bin.level][bin.step] = block.next_free;
      if (block.next_free == kNone) {
        step_bits[bin.level] &= ~(1U << bin.step);
        if (step_bits[bin.level] == 0) level_bits &= ~(1U << bin.level);
      }
    }
    if (block.next_free != kNone) blocks[block.next_free].previous_free = block.previous_free;
    block.previous_free = Block::kUsed;
  }

  std::uint32_t find_free(std::uint32_t pages) const {
    const Bin bin = bin_of(pages);
    std::uint32_t id = heads[bin.level][bin.step];
    for (int i = 0; i < kOwnBinTries && id != kNone; ++i, id = blocks[id].next_free) {
      if (blocks[id].pages >= pages) return id;
    }
    // Any block of a higher bin fits.
    const std::uint32_t steps_above = bin.step + 1 < kSteps ? step_bits[bin.level] & (~0U << (bin.step + 1)) : 0;
    if (steps_above != 0) return heads[bin.level][static_cast<std::size_t>(std::countr_zero(steps_above))];
    const std::uint32_t levels_above = level_bits & (~0U << (bin.level + 1));
    if (levels_above == 0) return kNone;
    const auto level = static_cast<std::size_t>(std::countr_zero(levels_above));
    return heads[level][static_cast<std::size_t>(std::countr_zero(step_bits[level]))];
  }

  // Makes what lies behind the first pages of a block a free block of its own, merged with a free neighbour.
  void split_off_tail(std::uint32_t id, std::uint32_t pages) {
    if (blocks[id].pages == pages) return;
    const std::uint32_t tail = cut(id, pages);
    absorb_successor_if_free(tail);
    link_free(tail);
  }

  // Cuts a block in two behind its first pages, 0 < pages < all; returns the second one. Neither is in a bin.
  std::uint32_t cut(std::uint32_t id, std::uint32_t pages) {
    const std::uint32_t tail = new_block(
        {.page = blocks[id].page + pages, .pages = blocks[id].pages - pages, .before = id, .after = blocks[id].after});
    blocks[id].pages = pages;
    blocks[id].after = tail;
    if (blocks[tail].after != kNone) blocks[blocks[tail].after].before = tail;
    return tail;
  }

  // Marks a block that is in no bin as used.
  void use(std::uint32_t id) {
    used_by_page.insert(blocks[id].page, id, page_of());
    used_pages += blocks[id].pages;
  }

  void absorb_successor_if_free(std::uint32_t id) {
    const std::uint32_t next = blocks[id].after;
    if (next == kNone || !blocks[next].is_free()) return;
    unlink_free(next);
    absorb_successor(id);
  }

  // Neither of the two is in a bin.
  void absorb_successor(std::uint32_t id) {
    const std::uint32_t next = blocks[id].after;
    blocks[id].pages += blocks[next].pages;
    blocks[id].after = blocks[next].after;
    if (blocks[id].after != kNone) blocks[blocks[id].after].before = id;
    spare_blocks.push_back(next);
  }
};

Slab::Slab(std::uint64_t capacity_bytes) : Slab(capacity_bytes, {}) {}

Slab::Slab(std::uint64_t capacity_bytes, std::span<const Extent> used) : state_(std::make_unique<State>()) {
  const std::uint64_t pages = capacity_bytes / kAlignment;
  if (pages == 0 || pages >= kNone) {
    throw std::invalid_argument("slab: the capacity must be between 4 KiB and 16 TiB");
  }
  state_->capacity_pages = static_cast<std::uint32_t>(pages);
  for (auto& level : state_->heads) level.fill(kNone);
  state_->step_bits.fill(0);
  State& s = *state_;
  std::uint32_t rest = s.new_block({.page = 0, .pages = s.capacity_pages});
  for (const Extent& extent : used) {
    const std::uint64_t first = extent.offset / kAlignment;
    const std::uint64_t count = pages_for(extent.bytes);
    const std::uint64_t from = rest == kNone ? s.capacity_pages : s.blocks[rest].page;
    if (extent.offset % kAlignment != 0 || count == 0 || first < from || count > s.capacity_pages - first) {
      throw std::invalid_argument("slab: the extents that are in use overlap or lie outside of it");
    }
    if (first > from) {
      const std::uint32_t gap = rest;
      rest = s.cut(gap, static_cast<std::uint32_t>(first - from));
      s.link_free(gap);
    }
    const std::uint32_t mine = rest;
    rest = count < s.blocks[mine].pages ? s.cut(mine, static_cast<std::uint32_t>(count)) : kNone;
    s.use(mine);
  }
  if (rest != kNone) s.link_free(rest);
}

Slab::~Slab() = default;
Slab::Slab(Slab&&) noexcept = default;
Slab& Slab::operator=(Slab&&) noexcept = default;

std::optional<Extent> Slab::allocate(std::uint64_t bytes) {
  State& s = *state_;
  const std::uint64_t wanted = pages_for(bytes);
  if (wanted == 0 || wanted > s.capacity_pages) return std::nullopt;
  const auto pages = static_cast<std::uint32_t>(wanted);
  const std::uint32_t id = s.find_free(pages);
  if (id == kNone) return std::nullopt;
  s.unlink_free(id);
  s.split_off_tail(id, pages);
  s.use(id);
  return Extent{s.blocks[id].page * kAlignment, bytes};
}

void Slab::release(const Extent& extent) {
  State& s = *state_;
  std::uint32_t id = s.used_at(extent.offset);
  assert(id != kNone && "an extent is freed once");
  if (id == kNone) return;
  s.used_by_page.erase(s.blocks[id].page, s.page_of());
  s.used_pages -= s.blocks[id].pages;
  s.absorb_successor_if_free(id);
  if (const std::uint32_t before = s.blocks[id].before; before != kNone && s.blocks[before].is_free()) {
    s.unlink_free(before);
    s.absorb_successor(before);
    id = before;
  }
  s.link_free(id);
}

Extent Slab::shrink(const Extent& extent, std::uint64_t new_bytes) {
  State& s = *state_;
  assert(new_bytes > 0 && new_bytes <= extent.bytes);
  const std::uint32_t id = s.used_at(extent.offset);
  assert(id != kNone);
  if (id == kNone) return extent;
  const std::uint32_t before = s.blocks[id].pages;
  const auto pages = static_cast<std::uint32_t>(std::clamp<std::uint64_t>(pages_for(new_bytes), 1, before));
  s.split_off_tail(id, pages);
  s.used_pages -= before - pages;
  return {extent.offset, new_bytes};
}

std::pair<Extent, Extent> Slab::split(const Extent& extent, std::uint64_t head_bytes) {
  State& s = *state_;
  assert(head_bytes > 0 && head_bytes < extent.bytes && head_bytes % kAlignment == 0);
  const std::uint32_t head = s.used_at(extent.offset);
  const std::uint32_t tail = s.cut(head, static_cast<std::uint32_t>(head_bytes / kAlignment));
  s.used_by_page.insert(s.blocks[tail].page, tail, s.page_of());
  return {{extent.offset, head_bytes}, {extent.offset + head_bytes, extent.bytes - head_bytes}};
}

void Slab::cut_off(std::uint64_t offset) {
  State& s = *state_;
  if (offset / kAlignment >= s.reachable_pages) return;
  s.reachable_pages = static_cast<std::uint32_t>(offset / kAlignment);
  std::vector<std::uint32_t> reaching;
  for (const auto& level : s.heads) {
    for (std::uint32_t id : level) {
      for (; id != kNone; id = s.blocks[id].next_free) {
        if (s.blocks[id].page + s.blocks[id].pages > s.reachable_pages) reaching.push_back(id);
      }
    }
  }
  for (const std::uint32_t id : reaching) {
    s.unlink_free(id);
    s.link_free(id);
  }
}

std::uint64_t Slab::capacity_bytes() const { return state_->capacity_pages * kAlignment; }
std::uint64_t Slab::used_bytes() const { return state_->used_pages * kAlignment; }

std::uint64_t Slab::largest_free_bytes() const {
  const State& s = *state_;
  if (s.level_bits == 0) return 0;
  const auto level = static_cast<std::size_t>(std::bit_width(s.level_bits)) - 1;
  const auto step = static_cast<std::size_t>(std::bit_width(s.step_bits[level])) - 1;
  std::uint64_t pages = 0;
  for (std::uint32_t id = s.heads[level][step]; id != kNone; id = s.blocks[id].next_free) {
    pages = std::max<std::uint64_t>(pages, s.blocks[id].pages);
  }
  return pages * kAlignment;
}

}  // namespace kvern
