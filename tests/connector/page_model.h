#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "connector/cache_layout.h"

namespace kvern::test {

/// A cache of an engine in host memory, and where each of its elements lies by the definition of its packing: element
/// by element, independent of the code under test.
class PageModel {
 public:
  struct Options {
    PagePacking packing = PagePacking::kRows;
    DType dtype = DType::kBFloat16;
    std::uint32_t page_tokens = 32;
    std::uint32_t pages_per_block = 1;
    std::uint32_t blocks = 8;
    std::uint32_t heads = 2;
    std::uint32_t head_begin = 0;
    std::uint32_t model_heads = 2;
    std::uint32_t layers = 2;
    std::uint32_t layer_begin = 0;
    std::uint32_t group_layers = 2;
    std::uint32_t key_dim = 64;
    std::uint32_t value_dim = 64;
    std::uint16_t group = 0;
    bool heads_inside_tokens = false;  ///< kRows: [tokens, heads, 2D] rather than [heads, tokens, 2D]
    bool split_values = false;         ///< kRows: [K of all pages][V of all pages]
    std::uint32_t padding_bytes = 0;   ///< after each row, head and page
  };

  explicit PageModel(const Options& options, std::uint32_t seed = 1) : options_(options) {
    const std::size_t element = dtype_bytes(options.dtype);
    const std::size_t key_row = options.key_dim * element;
    const std::size_t value_row = options.value_dim * element;
    const std::size_t pad = options.padding_bytes;
    const std::uint32_t pages = options.blocks * options.pages_per_block;
    LayerPages layer;
    layer.pages = pages;
    if (options.packing == PagePacking::kRows) {
      const std::size_t row = options.split_values ? std::max(key_row, value_row) + pad : key_row + value_row + pad;
      if (options.heads_inside_tokens) {
        layer.head_stride_bytes = row;
        layer.token_stride_bytes = row * options.heads + pad;
        layer.page_stride_bytes = layer.token_stride_bytes * options.page_tokens + pad;
      } else {
        layer.token_stride_bytes = row;
        layer.head_stride_bytes = row * options.page_tokens + pad;
        layer.page_stride_bytes = layer.head_stride_bytes * options.heads + pad;
      }
      layer.value_offset_bytes = options.split_values ? layer.page_stride_bytes * pages : key_row;
      layer.reachable_bytes = layer.page_stride_bytes * pages * (options.split_values ? 2 : 1);
    } else {
      layer.head_stride_bytes = (key_row + value_row) * options.page_tokens + pad;
      layer.page_stride_bytes = layer.head_stride_bytes * options.heads + pad;
      layer.reachable_bytes = layer.page_stride_bytes * pages;
    }
    std::mt19937_64 random(seed);
    memory_.resize(options.layers);
    for (auto& bytes : memory_) {
      bytes.resize(layer.reachable_bytes);
      for (auto& byte : bytes) byte = static_cast<std::byte>(random());
      layer.base = bytes.data();
      pages_.layers.push_back(layer);
    }
    pages_.group = options.group;
    pages_.packing = options.packing;
    pages_.dtype = options.dtype;
    pages_.block_tokens = options.page_tokens * options.pages_per_block;
    pages_.pages_per_block = options.pages_per_block;
    pages_.heads = options.heads;
    pages_.head_begin = options.head_begin;
    pages_.model_heads = options.model_heads;
    pages_.layer_begin = options.layer_begin;
    pages_.group_layers = options.group_layers;
    pages_.key_dim = options.key_dim;
    pages_.value_dim = options.value_dim;
  }
  PageModel(const PageModel&) = delete;
  PageModel& operator=(const PageModel&) = delete;

  const GroupPages& pages() const { return pages_; }
  std::vector<std::vector<std::byte>>& memory() { return memory_; }
  void fill(std::byte value) {
    for (auto& bytes : memory_) std::fill(bytes.begin(), bytes.end(), value);
  }

  /// Where element dim of a token of a block lies in memory()[layer].
  std::size_t offset(Part part, std::uint32_t head, std::uint32_t block, std::uint32_t token, std::uint32_t dim) const {
    const std::size_t element = dtype_bytes(options_.dtype);
    const LayerPages& layer = pages_.layers[0];
    const std::size_t page = block * options_.pages_per_block + token / options_.page_tokens;
    const std::size_t t = token % options_.page_tokens;
    const std::size_t tokens = options_.page_tokens;
    const std::size_t dims = part == Part::kKey ? options_.key_dim : options_.value_dim;
    std::size_t at = page * layer.page_stride_bytes + head * layer.head_stride_bytes;
    if (options_.packing == PagePacking::kRows) {
      if (part == Part::kValue) at += layer.value_offset_bytes;
      return at + t * layer.token_stride_bytes + dim * element;
    }
    if (part == Part::kValue) at += tokens * options_.key_dim * element;
    if (options_.packing == PagePacking::kCpuVec && part == Part::kKey) return at + (dim * tokens + t) * element;
    if (options_.packing == PagePacking::kCpuAmx) {
      if (part == Part::kKey) return at + (((t / 16) * (dims / 2) + dim / 2) * 16 + t % 16) * 4 + dim % 2 * 2;
      return at + (((dim / 16) * (tokens / 2) + t / 2) * 16 + dim % 16) * 4 + t % 2 * 2;
    }
    return at + (t * dims + dim) * element;
  }

  std::byte* element(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t block, std::uint32_t token,
                     std::uint32_t dim) {
    return memory_[layer].data() + offset(part, head, block, token, dim);
  }

  /// The blocks in the canonical layout.
  std::vector<std::byte> canonical(const std::vector<std::uint32_t>& blocks) {
    const std::size_t size = dtype_bytes(options_.dtype);
    std::vector<std::byte> out;
    for (std::uint32_t layer = 0; layer < options_.layers; ++layer) {
      for (const Part part : {Part::kKey, Part::kValue}) {
        const std::uint32_t dims = part == Part::kKey ? options_.key_dim : options_.value_dim;
        for (std::uint32_t head = 0; head < options_.heads; ++head) {
          for (const std::uint32_t block : blocks) {
            for (std::uint32_t token = 0; token < pages_.block_tokens; ++token) {
              for (std::uint32_t dim = 0; dim < dims; ++dim) {
                const std::byte* from = element(layer, part, head, block, token, dim);
                out.insert(out.end(), from, from + size);
              }
            }
          }
        }
      }
    }
    return out;
  }

 private:
  Options options_;
  GroupPages pages_;
  std::vector<std::vector<std::byte>> memory_;
};

}  // namespace kvern::test
