#include "connector/cache_layout.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>

#include "connector/page_rows.h"
#include "kernels/checksum.h"
#include "kernels/copy.h"
#include "kernels/transpose.h"

namespace kvern {
namespace {

/// Rows are turned and packed in pieces of this size, which stay in the first-level cache beside their source.
constexpr std::size_t kTileBytes = 16384;
/// Tile boundaries at multiples of this many tokens keep every piece a multiple of 64 bytes and suit the transposes.
constexpr std::uint32_t kTileTokens = 32;
/// Rows fit a tile; those of opaque pages, which are never turned, only need to keep sums within 64 bits.
constexpr std::size_t kMaxRowBytes = kTileBytes;
constexpr std::size_t kMaxOpaqueRowBytes = std::size_t{1} << 30;
/// AMX tiles: 16 tokens of K, 16 dims of V, pairs of 2-byte elements.
constexpr std::uint32_t kAmxTile = 16;
constexpr std::size_t kAmxUnitBytes = 64;

constexpr std::array kParts{Part::kKey, Part::kValue};
constexpr std::size_t index_of(Part part) { return static_cast<std::size_t>(part); }

struct Tile {
  alignas(64) std::array<std::byte, kTileBytes> bytes;
};

/// K or V of one (page, head) of a layer.
struct PageView {
  PagePacking packing;
  std::byte* base;  ///< of the part
  std::uint32_t page_tokens;
  std::uint32_t dim;
  std::size_t element;
  std::size_t row_bytes;
  std::size_t token_stride;  ///< kRows

  /// Rows that lie in the page as they do in the canonical layout.
  bool is_plain(Part part) const {
    switch (packing) {
      case PagePacking::kRows:
        return token_stride == row_bytes;
      case PagePacking::kCpuVec:
        return part == Part::kValue;
      case PagePacking::kCpuAmx:
        return false;
      case PagePacking::kOpaque:
        return true;
    }
    return false;
  }
};

PageView view_page(const GroupPages& pages, std::size_t layer, Part part, std::uint32_t head, std::uint64_t page) {
  const LayerPages& at = pages.layers[layer];
  PageView view{};
  view.packing = pages.packing;
  view.page_tokens = pages.page_tokens();
  view.dim = part == Part::kKey ? pages.key_dim : pages.value_dim;
  view.element = dtype_bytes(pages.dtype);
  view.row_bytes = pages.row_bytes(part);
  view.token_stride = at.token_stride_bytes;
  view.base = at.base + page * at.page_stride_bytes + head * at.head_stride_bytes;
  if (part == Part::kValue) {
    view.base +=
        pages.packing == PagePacking::kRows ? at.value_offset_bytes : view.page_tokens * pages.row_bytes(Part::kKey);
  }
  return view;
}

std::byte* amx_value(const PageView& view, std::uint32_t token, std::uint32_t dim) {
  return view.base + std::size_t{dim / kAmxTile} * view.page_tokens * kAmxTile * 2 +
         std::size_t{token / 2} * kAmxUnitBytes + std::size_t{dim % kAmxTile} * 4 + std::size_t{token % 2} * 2;
}

/// Applies unit(first, count) to the pieces of [token, token + count) that lie in one AMX tile of tokens each.
template <typename Function>
void for_each_amx_tile(std::uint32_t token, std::uint32_t count, Function&& unit) {
  for (std::uint32_t done = 0; done < count;) {
    const std::uint32_t piece = std::min(count - done, kAmxTile - (token + done) % kAmxTile);
    unit(token + done, done, piece);
    done += piece;
  }
}

/// Page -> rows at out, for packings that are not plain.
void unpack(const PageView& view, Part part, std::uint32_t token, std::uint32_t count, std::byte* out) {
  switch (view.packing) {
    case PagePacking::kRows:
      gather_rows(out, view.row_bytes, view.base + token * view.token_stride, view.token_stride, count);
      return;
    case PagePacking::kCpuVec:
      transpose(out, view.row_bytes, view.base + token * view.element, view.page_tokens * view.element, view.dim, count,
                view.element);
      return;
    case PagePacking::kCpuAmx:
      if (part == Part::kKey) {
        for_each_amx_tile(token, count, [&](std::uint32_t first, std::uint32_t done, std::uint32_t piece) {
          const std::byte* source =
              view.base + first / kAmxTile * view.row_bytes * kAmxTile + first % kAmxTile * std::size_t{4};
          transpose(out + done * view.row_bytes, view.row_bytes, source, kAmxUnitBytes, view.dim / 2, piece, 4);
        });
      } else if (token % 2 == 0 && count % 2 == 0) {
        for (std::uint32_t dim = 0; dim < view.dim; dim += kAmxTile) {
          deinterleave_pairs(out + dim * view.element, view.row_bytes, amx_value(view, token, dim), count / 2);
        }
      } else {
        for (std::uint32_t i = 0; i < count; ++i) {
          for (std::uint32_t dim = 0; dim < view.dim; ++dim) {
            std::memcpy(out + i * view.row_bytes + dim * view.element, amx_value(view, token + i, dim), view.element);
          }
        }
      }
      return;
    case PagePacking::kOpaque:
      return;
  }
}

/// A whole page, packed piece by piece in the cache and streamed out, so that the page is neither read nor cached.
void pack_whole_page(const PageView& view, Part part, const std::byte* rows, Tile& tile) {
  const std::size_t page_elements_bytes = view.page_tokens * view.element;  // one dim of all tokens
  if (part == Part::kKey && view.packing == PagePacking::kCpuAmx) {
    const std::size_t unit_bytes = view.row_bytes * kAmxTile;
    const auto units = static_cast<std::uint32_t>(tile.bytes.size() / unit_bytes);
    for (std::uint32_t first = 0; first < view.page_tokens; first += units * kAmxTile) {
      const std::uint32_t count = std::min(units * kAmxTile, view.page_tokens - first);
      for (std::uint32_t at = 0; at < count; at += kAmxTile) {
        transpose(tile.bytes.data() + at * view.row_bytes, kAmxUnitBytes, rows + (first + at) * view.row_bytes,
                  view.row_bytes, kAmxTile, view.dim / 2, 4);
      }
      stream_copy_unfenced(view.base + first * view.row_bytes, tile.bytes.data(), count * view.row_bytes);
    }
    return;
  }
  // kCpuVec keys and kCpuAmx values: strips of dims, all tokens each.
  const auto fitting = static_cast<std::uint32_t>(tile.bytes.size() / page_elements_bytes);
  const std::uint32_t strip = fitting / kAmxTile * kAmxTile;
  for (std::uint32_t dim = 0; dim < view.dim; dim += strip) {
    const std::uint32_t dims = std::min(strip, view.dim - dim);
    if (view.packing == PagePacking::kCpuVec) {
      transpose(tile.bytes.data(), page_elements_bytes, rows + dim * view.element, view.row_bytes, view.page_tokens,
                dims, view.element);
    } else {
      for (std::uint32_t at = 0; at < dims; at += kAmxTile) {
        interleave_pairs(tile.bytes.data() + at * page_elements_bytes, rows + (dim + at) * view.element, view.row_bytes,
                         view.page_tokens / 2);
      }
    }
    stream_copy_unfenced(view.base + dim * page_elements_bytes, tile.bytes.data(), dims * page_elements_bytes);
  }
}

/// Rows -> page, for packings that are not plain.
void pack(const PageView& view, Part part, std::uint32_t token, std::uint32_t count, const std::byte* rows,
          Tile& tile) {
  const bool strip_fits = kAmxTile * std::max(view.page_tokens * view.element, view.row_bytes) <= tile.bytes.size();
  if (view.packing != PagePacking::kRows && count == view.page_tokens && strip_fits) {
    pack_whole_page(view, part, rows, tile);
    return;
  }
  switch (view.packing) {
    case PagePacking::kRows:
      stream_rows(view.base + token * view.token_stride, view.token_stride, rows, view.row_bytes, count);
      return;
    case PagePacking::kCpuVec:
      transpose(view.base + token * view.element, view.page_tokens * view.element, rows, view.row_bytes, count,
                view.dim, view.element);
      return;
    case PagePacking::kCpuAmx:
      if (part == Part::kKey) {
        for_each_amx_tile(token, count, [&](std::uint32_t first, std::uint32_t done, std::uint32_t piece) {
          std::byte* target =
              view.base + first / kAmxTile * view.row_bytes * kAmxTile + first % kAmxTile * std::size_t{4};
          transpose(target, kAmxUnitBytes, rows + done * view.row_bytes, view.row_bytes, piece, view.dim / 2, 4);
        });
      } else if (token % 2 == 0 && count % 2 == 0) {
        for (std::uint32_t dim = 0; dim < view.dim; dim += kAmxTile) {
          interleave_pairs(amx_value(view, token, dim), rows + dim * view.element, view.row_bytes, count / 2);
        }
      } else {
        for (std::uint32_t i = 0; i < count; ++i) {
          for (std::uint32_t dim = 0; dim < view.dim; ++dim) {
            std::memcpy(amx_value(view, token + i, dim), rows + i * view.row_bytes + dim * view.element, view.element);
          }
        }
      }
      return;
    case PagePacking::kOpaque:
      return;
  }
}

void gather_page(const PageView& view, Part part, Tile& tile, Checksum64& checksum, std::byte* out) {
  const std::size_t bytes = view.page_tokens * view.row_bytes;
  if (view.is_plain(part)) {
    checksum.stream_copy(out, view.base, bytes);
    return;
  }
  const auto fitting = static_cast<std::uint32_t>(tile.bytes.size() / view.row_bytes);
  const std::uint32_t step = fitting < kTileTokens ? fitting : fitting / kTileTokens * kTileTokens;
  for (std::uint32_t token = 0; token < view.page_tokens; token += step) {
    const std::uint32_t count = std::min(step, view.page_tokens - token);
    unpack(view, part, token, count, tile.bytes.data());
    checksum.stream_copy(out + token * view.row_bytes, tile.bytes.data(), count * view.row_bytes);
  }
}

/// The bytes that strided items reach, or nullopt when items overlap or the sum does not fit. Each dimension must hold
/// the extent of the ones inside it.
struct Dimension {
  std::uint64_t count = 1;
  std::uint64_t stride = 0;
};
std::optional<std::uint64_t> nested_extent(std::uint64_t item_bytes, std::vector<Dimension> dimensions) {
  std::erase_if(dimensions, [](const Dimension& dimension) { return dimension.count <= 1; });
  std::ranges::sort(dimensions, {}, &Dimension::stride);
  std::uint64_t extent = item_bytes;
  for (const Dimension& dimension : dimensions) {
    if (dimension.stride < extent) return std::nullopt;
    if (dimension.stride > std::numeric_limits<std::uint64_t>::max() / 4 / dimension.count) return std::nullopt;
    extent += dimension.stride * (dimension.count - 1);
  }
  return extent;
}

Status layer_status(const GroupPages& group, std::size_t index) {
  const LayerPages& layer = group.layers[index];
  const std::string name = "layer " + std::to_string(index) + " of KV-cache group " + std::to_string(group.group);
  if (layer.base == nullptr || layer.pages < group.pages_per_block) {
    return {Code::kInvalid, name + " has no memory or fewer pages than one block needs"};
  }
  const std::uint64_t key_row = group.row_bytes(Part::kKey);
  const std::uint64_t value_row = group.row_bytes(Part::kValue);
  std::vector<Dimension> dimensions{{layer.pages, layer.page_stride_bytes}, {group.heads, layer.head_stride_bytes}};
  std::uint64_t item = group.page_tokens() * (key_row + value_row);
  if (group.packing == PagePacking::kRows) {
    if (value_row > 0 && layer.value_offset_bytes < key_row) {
      return {Code::kInvalid, name + ": values begin inside the keys' rows"};
    }
    dimensions.push_back({group.page_tokens(), layer.token_stride_bytes});
    const bool packed_row = layer.value_offset_bytes + value_row <= layer.token_stride_bytes;
    if (value_row == 0 || packed_row) {
      item = value_row == 0 ? key_row : layer.value_offset_bytes + value_row;
    } else {
      item = std::max(key_row, value_row);
      dimensions.push_back({2, layer.value_offset_bytes});
    }
  }
  const auto extent = nested_extent(item, std::move(dimensions));
  if (!extent) return {Code::kInvalid, name + ": the strides let rows, heads or pages overlap"};
  if (*extent > layer.reachable_bytes) {
    return {Code::kInvalid, name + " reaches " + std::to_string(*extent) + " bytes, but only " +
                                std::to_string(layer.reachable_bytes) + " are registered"};
  }
  return Status::ok();
}

template <typename Function>
void for_each_page(const GroupPages& pages, std::uint32_t block_id, Function&& function) {
  const std::uint64_t first = std::uint64_t{block_id} * pages.pages_per_block;
  for (std::uint32_t i = 0; i < pages.pages_per_block; ++i) function(first + i);
}

}  // namespace

Status GroupPages::validate() const {
  const std::string name = "KV-cache group " + std::to_string(group);
  if (block_tokens == 0 || pages_per_block == 0 || block_tokens % pages_per_block != 0) {
    return {Code::kInvalid, name + ": " + std::to_string(block_tokens) + " tokens of a block do not fill " +
                                std::to_string(pages_per_block) + " pages"};
  }
  if (heads == 0 || head_begin > model_heads || heads > model_heads - head_begin) {
    return {Code::kInvalid, name + ": its heads are not among the model's " + std::to_string(model_heads)};
  }
  if (layers.empty() || layer_begin > group_layers || layers.size() > group_layers - layer_begin) {
    return {Code::kInvalid, name + ": its layers are not among the group's " + std::to_string(group_layers)};
  }
  if (dtype_bytes(dtype) == 0) return {Code::kInvalid, name + ": unknown dtype"};
  if (device != nullptr && packing != PagePacking::kRows) {
    return {Code::kRefused, name + ": pages on a device must hold token rows of keys and values"};
  }
  const std::size_t max_row_bytes = packing == PagePacking::kOpaque ? kMaxOpaqueRowBytes : kMaxRowBytes;
  if (key_dim == 0 || row_bytes(Part::kKey) > max_row_bytes || row_bytes(Part::kValue) > max_row_bytes) {
    return {Code::kInvalid,
            name + ": a row of keys or values must have 1 to " + std::to_string(max_row_bytes) + " bytes"};
  }
  if ((packing == PagePacking::kOpaque) != (dtype == DType::kOpaqueBytes)) {
    return {Code::kInvalid, name + ": opaque pages go with dtype opaque, and only they do"};
  }
  if (packing == PagePacking::kOpaque && heads != 1) {
    return {Code::kInvalid, name + ": opaque pages count as one head per rank"};
  }
  if (packing == PagePacking::kCpuAmx) {
    if (dtype_bytes(dtype) != 2) {
      return {Code::kRefused, name + ": AMX pages hold 2-byte elements, not " + std::string(dtype_name(dtype))};
    }
    if (page_tokens() % kAmxTile != 0 || key_dim % 2 != 0 || value_dim % kAmxTile != 0) {
      return {Code::kRefused, name +
                                  ": AMX pages need tokens and value size in multiples of 16 and an even key size; "
                                  "set --block-size to a multiple of 32"};
    }
  }
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    if (Status status = layer_status(*this, layer); !status) return status;
  }
  return Status::ok();
}

bool GroupPages::has_block(std::uint32_t block_id) const {
  const std::uint64_t end = (std::uint64_t{block_id} + 1) * pages_per_block;
  return std::ranges::all_of(layers, [&](const LayerPages& layer) { return end <= layer.pages; });
}

ShardShape GroupPages::shape(std::uint32_t blocks) const {
  return {.dtype = dtype,
          .layer_begin = layer_begin,
          .layers = static_cast<std::uint32_t>(layers.size()),
          .head_begin = head_begin,
          .heads = heads,
          .tokens = blocks * block_tokens,
          .key_dim = key_dim,
          .value_dim = value_dim};
}

void gather(const GroupPages& pages, std::span<const std::uint32_t> block_ids, std::span<std::byte> out,
            std::span<std::uint64_t> plane_checksums) {
  const ShardShape shape = pages.shape(static_cast<std::uint32_t>(block_ids.size()));
  Tile tile;
  std::size_t plane = 0;
  // In the order in which pages lie in memory, with a running checksum for each plane of the layer: long sequential
  // reads keep the prefetchers going.
  std::vector<Checksum64> checksums;
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    checksums.assign(std::size_t{2} * shape.heads, Checksum64());
    std::size_t gathered_tokens = 0;
    for (const std::uint32_t block : block_ids) {
      for_each_page(pages, block, [&](std::uint64_t page) {
        for (std::uint32_t head = 0; head < shape.heads; ++head) {
          for (const Part part : kParts) {
            const PageView view = view_page(pages, layer, part, head, page);
            if (view.row_bytes == 0) continue;
            gather_page(view, part, tile, checksums[index_of(part) * shape.heads + head],
                        out.data() + shape.plane_offset(layer, part, head) + gathered_tokens * view.row_bytes);
          }
        }
        gathered_tokens += pages.page_tokens();
      });
    }
    for (const Checksum64& checksum : checksums) plane_checksums[plane++] = checksum.digest();
  }
}

PageSink::PageSink(const GroupPages& pages, std::span<const std::uint32_t> block_ids, std::uint32_t first_token,
                   std::uint32_t shard_layer_begin, std::uint32_t shard_head_begin)
    : pages_(pages),
      block_ids_(block_ids),
      first_token_(first_token),
      shard_layer_begin_(shard_layer_begin),
      shard_head_begin_(shard_head_begin) {}

PageSink::~PageSink() { stream_fence(); }

std::uint32_t PageSink::preferred_rows() const { return pages_.page_tokens(); }

void PageSink::write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
                     const std::byte* rows) {
  write_rows(layer, part, head, token, count, rows, nullptr);
}

void PageSink::write_hashing(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token,
                             std::uint32_t count, std::span<const std::byte> rows, Checksum64& checksum) {
  write_rows(layer, part, head, token, count, rows.data(), &checksum);
}

void PageSink::write_rows(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
                          const std::byte* rows, Checksum64* checksum) {
  const std::uint64_t at_layer = std::uint64_t{shard_layer_begin_} + layer - pages_.layer_begin;
  const std::uint64_t at_head = std::uint64_t{shard_head_begin_} + head - pages_.head_begin;
  const std::size_t row_bytes = pages_.row_bytes(part);
  const auto hash = [&](std::uint64_t from, std::uint64_t to) {
    if (checksum != nullptr) checksum->update(rows + (from - token) * row_bytes, (to - from) * row_bytes);
  };
  const std::uint64_t all_end = std::uint64_t{token} + count;
  const std::uint64_t held_end = first_token_ + std::uint64_t{pages_.block_tokens} * block_ids_.size();
  const bool held = at_layer < pages_.layers.size() && at_head < pages_.heads && row_bytes > 0;
  const std::uint64_t begin = held ? std::clamp<std::uint64_t>(first_token_, token, all_end) : all_end;
  const std::uint64_t end = std::clamp(held_end, begin, all_end);
  hash(token, begin);
  Tile tile;
  for (std::uint64_t at = begin; at < end;) {
    const auto offset = static_cast<std::uint32_t>((at - first_token_) % pages_.block_tokens);
    const std::uint32_t block = block_ids_[(at - first_token_) / pages_.block_tokens];
    const std::uint32_t in_page = offset % pages_.page_tokens();
    const auto piece = static_cast<std::uint32_t>(std::min<std::uint64_t>(end - at, pages_.page_tokens() - in_page));
    const std::uint64_t page = std::uint64_t{block} * pages_.pages_per_block + offset / pages_.page_tokens();
    const PageView view = view_page(pages_, at_layer, part, static_cast<std::uint32_t>(at_head), page);
    const std::byte* source = rows + (at - token) * row_bytes;
    if (block == 0) {
      hash(at, at + piece);
    } else if (view.is_plain(part) && checksum != nullptr) {
      checksum->stream_copy(view.base + in_page * row_bytes, source, piece * row_bytes);
    } else if (view.is_plain(part)) {
      stream_copy_unfenced(view.base + in_page * row_bytes, source, piece * row_bytes);
    } else {
      hash(at, at + piece);  // brings the rows into the cache
      pack(view, part, in_page, piece, source, tile);
    }
    at += piece;
  }
  hash(end, all_end);
}

void zero_blocks(const GroupPages& pages, std::span<const std::uint32_t> block_ids) {
  for (const std::uint32_t block : block_ids) {
    if (block == 0) continue;
    for (std::size_t layer = 0; layer < pages.layers.size(); ++layer) {
      for (std::uint32_t head = 0; head < pages.heads; ++head) {
        for (const Part part : {Part::kKey, Part::kValue}) {
          const std::size_t row_bytes = pages.row_bytes(part);
          for_each_page(pages, block, [&](std::uint64_t page) {
            const PageView view = view_page(pages, layer, part, head, page);
            if (view.packing != PagePacking::kRows || view.is_plain(part)) {
              std::memset(view.base, 0, view.page_tokens * row_bytes);
              return;
            }
            for (std::uint32_t token = 0; token < view.page_tokens; ++token) {
              std::memset(view.base + token * view.token_stride, 0, row_bytes);
            }
          });
        }
      }
    }
  }
}

}  // namespace kvern
