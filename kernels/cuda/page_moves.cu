#include "kernels/cuda/page_moves.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/elements.cuh"

namespace kvern {
namespace {

constexpr unsigned kThreads = 256;
/// Units that a thread moves: all are read before the first is written, so that enough bytes are under way.
constexpr std::uint32_t kUnits = 8;
constexpr std::uint32_t kBlockUnits = kThreads * kUnits;
/// Of a launch: blocks in y and z, and what 32 bits count with a block to spare.
constexpr std::uint32_t kMaxGrid = 65535;
constexpr std::uint64_t kMaxUnits = UINT32_MAX - kBlockUnits;

/// Layers [cache_layer, …) of the cache are layers [0, …) of the launch; heads alike.
struct Launch {
  const std::uint32_t* bad;
  const PagedLayer* layers;
  const std::uint32_t* block_ids;
  std::uint32_t block_tokens;
  std::uint32_t page_tokens;
  std::uint32_t pages_per_block;
  std::uint32_t tokens;
  std::uint32_t cache_layer;
  std::uint32_t cache_head;
  std::uint32_t plane_layer;
  std::uint32_t plane_head;
  std::uint32_t plane_heads;
  Planes keys;
  Planes values;
};

enum class Way { kGather, kScatter, kZero };

/// kUnits Units of rows per thread, kThreads apart; y: heads, z: layers times parts.
template <Way kWay, typename Unit>
__global__ void __launch_bounds__(kThreads) move_rows(Launch move) {
  const bool value = blockIdx.z % 2 == 1;
  // Each for itself: a reference to one of two parameters would put both on the stack.
  std::byte* const first_plane = value ? move.values.first : move.keys.first;
  const std::size_t plane_stride = value ? move.values.plane_stride : move.keys.plane_stride;
  const std::uint32_t row_bytes = value ? move.values.row_bytes : move.keys.row_bytes;
  const std::uint32_t row_units = row_bytes / sizeof(Unit);
  const std::uint32_t units = move.tokens * row_units;
  const std::uint32_t first = blockIdx.x * kBlockUnits + threadIdx.x;
  if (first >= units) return;
  if (kWay == Way::kScatter && *move.bad != 0) return;
  const std::uint32_t layer = blockIdx.z / 2;
  const PagedLayer& pages = move.layers[move.cache_layer + layer];
  std::byte* head = pages.base + std::uint64_t{move.cache_head + blockIdx.y} * pages.head_stride_bytes +
                    (value ? pages.value_offset_bytes : 0);
  const std::size_t plane = std::size_t{move.plane_layer + layer} * move.plane_heads + move.plane_head + blockIdx.y;
  auto* in_plane = reinterpret_cast<Unit*>(first_plane + plane * plane_stride);

  Unit* cells[kUnits];  // in the pages; null: nowhere
  Unit moved[kUnits];
  std::uint32_t token = first / row_units;
  std::uint32_t in_row = first % row_units;
#pragma unroll
  for (std::uint32_t i = 0; i < kUnits; ++i) {
    cells[i] = nullptr;
    moved[i] = Unit{};
    if (token < move.tokens) {
      const std::uint32_t block = move.block_ids[token / move.block_tokens];
      if (kWay == Way::kGather || block != 0) {
        const std::uint32_t in_block = token % move.block_tokens;
        const std::uint64_t page = std::uint64_t{block} * move.pages_per_block + in_block / move.page_tokens;
        cells[i] = reinterpret_cast<Unit*>(head + page * pages.page_stride_bytes +
                                           std::uint64_t{in_block % move.page_tokens} * pages.token_stride_bytes) +
                   in_row;
        if constexpr (kWay == Way::kGather) moved[i] = *cells[i];
        if constexpr (kWay == Way::kScatter) moved[i] = in_plane[first + i * kThreads];
      }
    }
    // The next of this thread, without a division.
    token += kThreads / row_units;
    in_row += kThreads % row_units;
    if (in_row >= row_units) {
      in_row -= row_units;
      ++token;
    }
  }
#pragma unroll
  for (std::uint32_t i = 0; i < kUnits; ++i) {
    if (cells[i] == nullptr) continue;
    if constexpr (kWay == Way::kGather) {
      in_plane[first + i * kThreads] = moved[i];
    } else {
      *cells[i] = moved[i];
    }
  }
}

template <Way kWay>
Status launch(const PageMove& move, CUstream_st* stream) {
  const PagedCache& cache = move.cache;
  const ShardShape& shape = move.shape;
  // Where the shard's layers and heads and those of the cache overlap.
  const std::uint32_t layer = std::max(shape.layer_begin, cache.layer_begin);
  const std::uint32_t last_layer =
      std::min(shape.layer_begin + shape.layers, cache.layer_begin + static_cast<std::uint32_t>(cache.layers.size()));
  const std::uint32_t head = std::max(shape.head_begin, cache.head_begin);
  const std::uint32_t last_head = std::min(shape.head_begin + shape.heads, cache.head_begin + cache.heads);
  if (layer >= last_layer || head >= last_head) return Status::ok();
  const std::uint32_t row_bytes = std::max(move.keys.row_bytes, move.values.row_bytes);
  const std::uint64_t most_units = std::uint64_t{move.tokens} * row_bytes / sizeof(std::uint16_t);
  if (most_units > kMaxUnits || last_head - head > kMaxGrid || 2 * (last_layer - layer) > kMaxGrid) {
    return {Code::kRefused, "the chunk has more rows than one launch moves"};
  }
  const Launch parameters{.bad = move.bad,
                          .layers = move.layers,
                          .block_ids = move.block_ids,
                          .block_tokens = cache.block_tokens,
                          .page_tokens = cache.page_tokens(),
                          .pages_per_block = cache.pages_per_block,
                          .tokens = move.tokens,
                          .cache_layer = layer - cache.layer_begin,
                          .cache_head = head - cache.head_begin,
                          .plane_layer = layer - shape.layer_begin,
                          .plane_head = head - shape.head_begin,
                          .plane_heads = shape.heads,
                          .keys = move.keys,
                          .values = move.values};
  // The widest unit that all addresses are multiples of.
  std::uint64_t bits = move.keys.row_bytes | move.values.row_bytes | move.keys.plane_stride | move.values.plane_stride |
                       reinterpret_cast<std::uintptr_t>(move.keys.first) |
                       reinterpret_cast<std::uintptr_t>(move.values.first) | address_bits(cache);
  const auto with_unit = [&]<typename Unit>(Unit) {
    const std::uint64_t units = std::uint64_t{move.tokens} * row_bytes / sizeof(Unit);
    const dim3 grid(static_cast<unsigned>((units + kBlockUnits - 1) / kBlockUnits), last_head - head,
                    2 * (last_layer - layer));
    move_rows<kWay, Unit><<<grid, kThreads, 0, stream>>>(parameters);
  };
  if (bits % 16 == 0) {
    with_unit(uint4{});
  } else if (bits % 4 == 0) {
    with_unit(std::uint32_t{});
  } else {
    with_unit(std::uint16_t{});
  }
  return cuda::launched("moving pages");
}

}  // namespace

std::uint64_t address_bits(const PagedCache& cache) {
  std::uint64_t bits = 0;
  for (const PagedLayer& each : cache.layers) {
    bits |= reinterpret_cast<std::uintptr_t>(each.base) | each.page_stride_bytes | each.head_stride_bytes |
            each.token_stride_bytes | each.value_offset_bytes;
  }
  return bits;
}

Status cuda_gather_pages(const PageMove& move, CUstream_st* stream) { return launch<Way::kGather>(move, stream); }
Status cuda_scatter_pages(const PageMove& move, CUstream_st* stream) { return launch<Way::kScatter>(move, stream); }
Status cuda_zero_pages(const PageMove& move, CUstream_st* stream) { return launch<Way::kZero>(move, stream); }

}  // namespace kvern
