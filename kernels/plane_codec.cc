#include "kernels/plane_codec.h"

#include <algorithm>

namespace kvern {
namespace {

/// Decoded rows wait here for the sink: a page of 128 tokens of 64 bf16 channels, well inside the L1 cache.
constexpr std::size_t kTileBytes = 16384;

Part part_of(const SectionExtent& extent) { return extent.has_key ? Part::kKey : Part::kValue; }

PlaneShape plane_shape(const ShardShape& shape, Part part) {
  return {shape.dtype, part, shape.tokens, part == Part::kKey ? shape.key_dim : shape.value_dim};
}

}  // namespace

Status PlaneCodec::accepts(const ShardShape& shape) const {
  if (Status status = shape.validate(); !status) return status;
  if (Status status = form_->accepts(shape.dtype, shape.key_dim); !status) return status;
  return shape.value_dim == 0 ? Status::ok() : form_->accepts(shape.dtype, shape.value_dim);
}

std::vector<SectionPlan> PlaneCodec::plan(const ShardShape& shape) const {
  std::vector<SectionPlan> sections;
  sections.reserve(std::size_t{2} * shape.layers * shape.heads);
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      const PlaneShape plane = plane_shape(shape, part);
      if (plane.bytes() == 0) continue;
      const bool key = part == Part::kKey;
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        sections.push_back({{layer, 1, head, 1, key, !key}, form_->max_bytes(plane)});
      }
    }
  }
  return sections;
}

std::size_t PlaneCodec::max_bytes(const ShardShape& shape, const SectionExtent& extent) const {
  return form_->max_bytes(plane_shape(shape, part_of(extent)));
}

Result<std::size_t> PlaneCodec::encode(const ShardShape& shape, const SectionExtent& extent,
                                       std::span<const std::byte> planes, std::span<std::byte> out) const {
  const PlaneShape plane = plane_shape(shape, part_of(extent));
  if (planes.size() != plane.bytes() || out.size() < form_->max_bytes(plane)) {
    return failure(Code::kInvalid, "the buffers do not have the size of the section's plane");
  }
  return form_->encode(plane, planes, out);
}

Status PlaneCodec::decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                          TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const {
  if (tokens.begin > tokens.end || tokens.end > shape.tokens) {
    return {Code::kInvalid, "the token range lies outside the chunk"};
  }
  if (extent.head < head_begin || extent.head >= head_end || tokens.begin == tokens.end) return Status::ok();
  const Part part = part_of(extent);
  const PlaneShape plane = plane_shape(shape, part);
  const bool verbatim = form_->verbatim();
  if (verbatim && payload.size() != plane.bytes()) {
    return {Code::kCorrupt, std::string(spec()) + " section has " + std::to_string(payload.size()) + " bytes, not " +
                                std::to_string(plane.bytes())};
  }
  alignas(64) std::byte tile[kTileBytes];
  const auto tile_rows = verbatim ? plane.tokens : static_cast<std::uint32_t>(kTileBytes / plane.row_bytes());
  const std::uint32_t preferred = sink.preferred_rows();
  for (std::uint32_t begin = tokens.begin; begin < tokens.end;) {
    std::uint32_t count = std::min(tokens.end - begin, tile_rows);
    if (preferred > 0) count = std::min(count, preferred - begin % preferred);
    const std::byte* rows = tile;
    if (verbatim) {
      rows = payload.data() + begin * plane.row_bytes();
    } else if (Status status = form_->decode(plane, payload, {begin, begin + count}, tile); !status) {
      return status;
    }
    sink.write(extent.layer, part, extent.head, begin, count, rows);
    begin += count;
  }
  return Status::ok();
}

}  // namespace kvern
