#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/slot_layout.h"
#include "base/status.h"

namespace kvern {

/// A page of an engine's cache: one block of one layer.
struct SlotPage {
  std::uint32_t layer = 0;
  std::uint32_t block = 0;  ///< number within the request

  bool operator==(const SlotPage&) const = default;
};

/// Where the pages lie that each layer of a compact cache keeps, in a request of so many blocks: [layer][page].
/// Rectangular: a layer's own blocks. Pool: its own first blocks, then free ones of others, lower layers and blocks
/// first. Shift: its own last blocks, so that what follows the cache follows its last page.
/// kInvalid unless every layer has a page and they fit: all blocks of every layer (rectangular), all of all layers
/// together (pool), no more than there are (shift).
Result<std::vector<std::vector<SlotPage>>> slot_pages(SlotLayout layout, std::span<const std::uint32_t> pages_of_layers,
                                                      std::uint32_t blocks);

/// Whole pages for each layer from the tokens that its method would give it.
struct PageBudget {
  std::uint32_t page_tokens = 0;
  std::uint32_t mean_pages = 0;  ///< over the layers
  std::uint32_t least = 0;       ///< pages that every layer has; at most mean_pages
  std::uint32_t most = 0;        ///< at least mean_pages
};
/// Rounded so that they sum to mean_pages * layers: down, the missing ones to the largest fractions.
std::vector<std::uint32_t> whole_pages(std::span<const double> tokens, const PageBudget& budget);

}  // namespace kvern
