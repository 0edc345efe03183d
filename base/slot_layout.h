#pragma once

#include <cstdint>
#include <string_view>

namespace kvern {

/// How the slots of a compact cache lie in the blocks that an engine gives a request, the same in every layer. In all
/// but the first, layers keep different numbers of whole pages (a page: one block of one layer), and an engine must
/// give each layer a table of its own.
enum class SlotLayout : std::uint8_t {
  kRectangular,  ///< every layer keeps all slots
  kPool,   ///< as many blocks as layers keep pages on average; thick layers' rest lies in what thin ones leave free
  kShift,  ///< as many blocks as the thickest layer may keep pages; each layer's pages are its own last ones
};

constexpr std::string_view slot_layout_name(SlotLayout layout) {
  return layout == SlotLayout::kPool ? "pool" : layout == SlotLayout::kShift ? "shift" : "rectangular";
}

}  // namespace kvern
