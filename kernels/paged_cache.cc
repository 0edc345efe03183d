#include "kernels/paged_cache.h"

#include <algorithm>
#include <limits>
#include <string>

namespace kvern {
namespace {

constexpr std::uint32_t kMaxBlockTokens = 1U << 16;
/// Strides and offsets beyond this are mistakes; below it no sum of them leaves 64 bits.
constexpr std::uint64_t kMaxStrideBytes = 1ULL << 40;

Status invalid(std::size_t layer, const std::string& why) {
  return {Code::kInvalid, "layer " + std::to_string(layer) + " of the registered pages: " + why};
}

}  // namespace

ShardShape PagedCache::shape(std::uint32_t blocks) const {
  return {.dtype = dtype,
          .layer_begin = layer_begin,
          .layers = static_cast<std::uint32_t>(layers.size()),
          .head_begin = head_begin,
          .heads = heads,
          .tokens = blocks * block_tokens,
          .key_dim = key_dim,
          .value_dim = value_dim};
}

bool PagedCache::has_block(std::uint32_t block) const {
  return std::ranges::all_of(
      layers, [&](const PagedLayer& layer) { return (std::uint64_t{block} + 1) * pages_per_block <= layer.pages; });
}

Status PagedCache::validate(std::span<const std::uint64_t> reachable) const {
  if (block_tokens == 0 || block_tokens > kMaxBlockTokens || pages_per_block == 0 ||
      block_tokens % pages_per_block != 0) {
    return {Code::kInvalid, "a block of " + std::to_string(block_tokens) + " tokens is not " +
                                std::to_string(pages_per_block) + " whole pages"};
  }
  if (dtype == DType::kOpaqueBytes || dtype_bytes(dtype) == 0) {
    return {Code::kInvalid, "device pages hold float32, float16 or bfloat16"};
  }
  if (layers.size() != reachable.size() || layers.size() > std::numeric_limits<std::uint16_t>::max()) {
    return {Code::kInvalid, "the registered pages have no layers, or too many"};
  }
  if (Status status = shape(1).validate(); !status) return status;
  if (std::uint64_t{layer_begin} + layers.size() > group_layers || std::uint64_t{head_begin} + heads > model_heads) {
    return {Code::kInvalid, "the registered pages hold layers or heads that the model does not have"};
  }
  const std::uint64_t element = dtype_bytes(dtype);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const PagedLayer& layer = layers[i];
    if (layer.pages == 0) return invalid(i, "there are no pages");
    for (const std::uint64_t stride :
         {layer.page_stride_bytes, layer.head_stride_bytes, layer.token_stride_bytes, layer.value_offset_bytes}) {
      if (stride > kMaxStrideBytes) return invalid(i, "a stride of " + std::to_string(stride) + " bytes is too large");
      if (stride % element != 0) return invalid(i, "a stride is no whole number of elements");
    }
    const std::uint64_t last_page = layer.pages - 1;
    if (layer.page_stride_bytes != 0 && last_page > kMaxStrideBytes / layer.page_stride_bytes * (1U << 10)) {
      return invalid(i, "the pages reach too far");
    }
    const std::uint64_t row = last_page * layer.page_stride_bytes + (heads - 1) * layer.head_stride_bytes +
                              (page_tokens() - 1) * layer.token_stride_bytes;
    const std::uint64_t end =
        row + std::max<std::uint64_t>(row_bytes(Part::kKey),
                                      value_dim == 0 ? 0 : layer.value_offset_bytes + row_bytes(Part::kValue));
    if (end > reachable[i]) {
      return invalid(
          i, "its pages end at byte " + std::to_string(end) + ", the memory at " + std::to_string(reachable[i]));
    }
  }
  return Status::ok();
}

}  // namespace kvern
