#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "kernels/kv_shape.h"
#include "kernels/paged_cache.h"

struct CUstream_st;

namespace kvern {

/// Rows of one part on the device, [layer][head][token]: planes that lie plane_stride bytes apart.
struct Planes {
  std::byte* first = nullptr;
  std::size_t plane_stride = 0;
  std::uint32_t row_bytes = 0;
};

/// The same rows in pages of the cache and in planes of the shape; what both have of layers and heads moves. Owns
/// nothing: what the pointers name is device memory and stays until the stream is done.
struct PageMove {
  const PagedCache& cache;
  const ShardShape& shape;
  std::uint32_t tokens;  ///< of whole blocks
  Planes keys;
  Planes values;
  const PagedLayer* layers;        ///< those of the cache
  const std::uint32_t* block_ids;  ///< of tokens / cache.block_tokens blocks, each of which the cache has
  const std::uint32_t* bad;        ///< not 0: the rows are worthless, and scattering leaves pages as they are
};

/// What divides the bitwise or of the cache's addresses and strides and is a power of two divides all of them.
std::uint64_t address_bits(const PagedCache& cache);

/// Queue one launch. Block 0 is gathered from, but left alone by the others. kRefused when the chunk has more rows than
/// a launch moves.
Status cuda_gather_pages(const PageMove& move, CUstream_st* stream);
Status cuda_scatter_pages(const PageMove& move, CUstream_st* stream);
/// Zero bytes to the pages' rows; planes give their sizes alone.
Status cuda_zero_pages(const PageMove& move, CUstream_st* stream);

}  // namespace kvern
