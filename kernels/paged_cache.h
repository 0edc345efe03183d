#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/kv_shape.h"

namespace kvern {

/// One layer of paged memory in which every token has rows [K dims] and [V dims], whatever the strides. Addresses are
/// those of the device that reads it.
struct PagedLayer {
  std::byte* base = nullptr;  ///< K row of page 0, head 0, token 0
  std::uint32_t pages = 0;
  std::uint64_t page_stride_bytes = 0;
  std::uint64_t head_stride_bytes = 0;
  std::uint64_t token_stride_bytes = 0;
  std::uint64_t value_offset_bytes = 0;  ///< from a token's K row to its V row
};

/// The pages of one KV-cache group on one rank, as device code sees them. Owns nothing.
struct PagedCache {
  DType dtype = DType::kBFloat16;
  std::uint32_t block_tokens = 0;
  std::uint32_t pages_per_block = 1;  ///< block b is pages [b * pages_per_block, (b + 1) * pages_per_block)
  std::uint32_t layer_begin = 0;      ///< within the group
  std::uint32_t group_layers = 0;
  std::uint32_t head_begin = 0;  ///< within the model
  std::uint32_t heads = 0;
  std::uint32_t model_heads = 0;
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
  std::vector<PagedLayer> layers;

  std::uint32_t page_tokens() const { return block_tokens / pages_per_block; }
  std::size_t row_bytes(Part part) const { return (part == Part::kKey ? key_dim : value_dim) * dtype_bytes(dtype); }
  /// The shape of a chunk of so many blocks.
  ShardShape shape(std::uint32_t blocks) const;
  /// True when every layer has the pages of this block.
  bool has_block(std::uint32_t block) const;
  /// reachable[i]: bytes of memory from layers[i].base on. kInvalid in a sentence when an access of any block would
  /// leave them, when sizes are zero or beyond every model, and when rows are no whole number of elements apart. Rows
  /// may overlap: that can only spoil what their owner stores. Safe on any numbers.
  Status validate(std::span<const std::uint64_t> reachable) const;
};

}  // namespace kvern
