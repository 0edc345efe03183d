#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/status.h"

namespace kvern {

/// K or V of a layer.
enum class Part : std::uint8_t { kKey = 0, kValue = 1 };

/// The part of a chunk that one rank holds, in the canonical layout [layer][K|V][head][token][dim], row-major, without
/// gaps. With key_dim != value_dim the K rows are key_dim and the V rows value_dim elements long.
/// Layers are numbered within the KV-cache group (0 .. layers of the group - 1), heads over the whole model.
struct ShardShape {
  DType dtype = DType::kBFloat16;
  std::uint32_t layer_begin = 0;
  std::uint32_t layers = 0;
  std::uint32_t head_begin = 0;
  std::uint32_t heads = 0;  ///< KV heads
  std::uint32_t tokens = 0;
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
  /// Of the first token in the prompt. ContainerInfo::position says it; here it is 0 but in the shapes that a codec's
  /// encode() and decode() get, for the steps that need it.
  std::uint64_t position = 0;
  /// So many tokens at the end stay as they are in steps that make one row of several. ContainerInfo::exact_tail says
  /// it; here it is 0 but in the shapes that a codec's encode() gets.
  std::uint32_t exact_tail = 0;

  bool operator==(const ShardShape&) const = default;

  /// kInvalid for sizes that are zero (value_dim may be: caches that hold keys alone) or beyond every model, so that
  /// none of the products below overflows. Check shapes that come from outside.
  Status validate() const;

  std::size_t row_bytes(Part part) const { return (part == Part::kKey ? key_dim : value_dim) * dtype_bytes(dtype); }
  /// Bytes of one (layer, part, head): the unit that sections cover.
  std::size_t plane_bytes(Part part) const { return tokens * row_bytes(part); }
  std::size_t layer_bytes() const { return heads * (plane_bytes(Part::kKey) + plane_bytes(Part::kValue)); }
  std::size_t raw_bytes() const { return layers * layer_bytes(); }
  /// Where a plane begins in the canonical layout. Indices are relative to layer_begin and head_begin.
  std::size_t plane_offset(std::uint32_t layer, Part part, std::uint32_t head) const {
    return layer * layer_bytes() + (part == Part::kKey ? 0 : heads * plane_bytes(Part::kKey)) +
           head * plane_bytes(part);
  }
};

}  // namespace kvern
