#include "kernels/plane_codec.h"

namespace kvern {
namespace {

Part part_of(const SectionExtent& extent) { return extent.has_key ? Part::kKey : Part::kValue; }

}  // namespace

std::vector<SectionPlan> PlaneCodec::plan(const ShardShape& shape) const {
  std::vector<SectionPlan> sections;
  sections.reserve(std::size_t{2} * shape.layers * shape.heads);
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      if (shape.plane_bytes(part) == 0) continue;
      const bool key = part == Part::kKey;
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        sections.push_back({{layer, 1, head, 1, key, !key}, max_plane_bytes(shape, part)});
      }
    }
  }
  return sections;
}

Result<std::size_t> PlaneCodec::encode(const ShardShape& shape, const SectionExtent& extent,
                                       std::span<const std::byte> planes, std::span<std::byte> out) const {
  const Part part = part_of(extent);
  if (planes.size() != shape.plane_bytes(part) || out.size() < max_plane_bytes(shape, part)) {
    return failure(Code::kInvalid, "the buffers do not have the size of the section's plane");
  }
  return encode_plane(shape, part, planes, out);
}

Status PlaneCodec::decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                          TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const {
  if (tokens.begin > tokens.end || tokens.end > shape.tokens) {
    return {Code::kInvalid, "the token range lies outside the chunk"};
  }
  if (extent.head < head_begin || extent.head >= head_end || tokens.begin == tokens.end) return Status::ok();
  PlaneSink plane(sink, extent.layer, part_of(extent), extent.head);
  return decode_plane(shape, part_of(extent), payload, tokens, plane);
}

}  // namespace kvern
