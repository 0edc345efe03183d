#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"

namespace kvern {

/// A page of an engine's cache: one block of one layer.
struct PoolPage {
  std::uint32_t layer = 0;
  std::uint32_t block = 0;  ///< number within the request

  bool operator==(const PoolPage&) const = default;
};

/// A cache whose layers keep different numbers of pages, in an engine that gives a request the same blocks in every
/// layer: what thick layers have too much lies in the blocks that thin layers leave free. [layer][page] -> where it
/// lies: a layer's own blocks first, then free ones, lower layers and blocks first. The engine's blocks are the mean.
/// kInvalid unless every layer has a page and the pages divide by the layers.
Result<std::vector<std::vector<PoolPage>>> pool_pages(std::span<const std::uint32_t> pages_of_layers);

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
