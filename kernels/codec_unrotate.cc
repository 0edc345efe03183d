#include "kernels/codec_unrotate.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "kernels/codec_step.h"
#include "kernels/scratch.h"

namespace kvern {
namespace {

using rope::Direction;
using rope::Turns;

/// Rows wait here, turned, for the sink.
constexpr std::size_t kTileBytes = 16384;

ShardShape as_floats(ShardShape shape) {
  shape.dtype = DType::kFloat32;
  return shape;
}

constexpr rope::TurnsView kNone;

/// Gets rows of fp32, gives the sink rows of the shard's dtype: keys turned forward.
class TurningSink final : public RowSink {
 public:
  /// turns: called when there are keys at last, so that a damaged section costs no table.
  TurningSink(const ShardShape& shape, std::function<const Turns&()> turns, rope::Style style, RowSink& sink)
      : shape_(shape), turns_(std::move(turns)), style_(style), sink_(sink) {}

  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    const std::uint32_t dim = part == Part::kKey ? shape_.key_dim : shape_.value_dim;
    const auto tile_rows = static_cast<std::uint32_t>(kTileBytes / shape_.row_bytes(part));
    alignas(64) std::byte tile[kTileBytes];
    for (std::uint32_t end = token + count; token < end;) {
      const std::uint32_t some = std::min(end - token, tile_rows);
      const auto from = HeadRows::contiguous(rows, DType::kFloat32, 1, some, dim);
      const Status turned = rope::rotate(from, part == Part::kKey ? turns_().view(token, some) : kNone, style_,
                                         Direction::kForward, shape_.dtype, tile);
      if (!turned) return;  // cannot be: accepts() has seen the shape
      sink_.write(layer, part, head, token, some, tile);
      token += some;
      rows += std::size_t{some} * dim * sizeof(float);
    }
  }
  std::uint32_t preferred_rows() const override { return sink_.preferred_rows(); }

 private:
  const ShardShape& shape_;
  std::function<const Turns&()> turns_;
  rope::Style style_;
  RowSink& sink_;
};

}  // namespace

UnrotateCodec::UnrotateCodec(const rope::Parameters& rotation, std::shared_ptr<const Codec> inner)
    : rotation_(rotation),
      inverse_frequencies_(rotation.inverse_frequencies()),
      inner_(std::move(inner)),
      spec_("unrotate(" + rotation.to_string() + ") | " + std::string(inner_->spec())) {}

Status UnrotateCodec::accepts(const ShardShape& shape) const {
  if (Status status = shape.validate(); !status) return status;
  if (shape.dtype == DType::kOpaqueBytes) {
    return {Code::kRefused, "unrotate needs numbers, but the cache is stored as opaque bytes; use raw"};
  }
  if (shape.value_dim == 0) {
    return {Code::kRefused, "unrotate needs keys of their own; here they share their rows with the values"};
  }
  if (rotation_.rotary_dim > shape.key_dim) {
    return {Code::kRefused, "unrotate turns " + std::to_string(rotation_.rotary_dim) + " elements, but keys have " +
                                std::to_string(shape.key_dim)};
  }
  if (std::max(shape.key_dim, shape.value_dim) > rope::kMaxDim) {
    return {Code::kRefused, "unrotate takes head dimensions up to " + std::to_string(rope::kMaxDim)};
  }
  return inner_->accepts(as_floats(shape));
}

std::vector<SectionPlan> UnrotateCodec::plan(const ShardShape& shape) const {
  auto sections = inner_->plan(shape);
  const auto floats = inner_->plan(as_floats(shape));
  for (std::size_t i = 0; i < sections.size(); ++i) {
    if (sections[i].extent.has_key) sections[i].max_bytes = floats[i].max_bytes;
  }
  return sections;
}

std::size_t UnrotateCodec::max_bytes(const ShardShape& shape, const SectionExtent& extent) const {
  return inner_->max_bytes(extent.has_key ? as_floats(shape) : shape, extent);
}

const Turns& UnrotateCodec::turns(const ShardShape& shape) const {
  // All sections of a chunk, and often all chunks at one place of many prompts, need the same ones.
  struct Kept {
    std::vector<double> inverse_frequencies;
    std::uint64_t position = 0;
    Turns turns;
  };
  thread_local Kept kept;
  if (kept.position != shape.position || kept.turns.rows < shape.tokens ||
      kept.inverse_frequencies != inverse_frequencies_) {
    kept = {inverse_frequencies_, shape.position,
            Turns::from(inverse_frequencies_, static_cast<std::int64_t>(shape.position), shape.tokens)};
  }
  return kept.turns;
}

Result<std::size_t> UnrotateCodec::encode(const ShardShape& shape, const SectionExtent& extent,
                                          std::span<const std::byte> planes, std::span<std::byte> out) const {
  if (!extent.has_key) return inner_->encode(shape, extent, planes, out);
  if (planes.size() != extent.raw_bytes(shape)) {
    return failure(Code::kInvalid, "the planes do not have the size of the section");
  }
  const ShardShape floats = as_floats(shape);
  const Scratch turned(extent.raw_bytes(floats));
  const rope::TurnsView turns = this->turns(shape).view(0, shape.tokens);
  std::byte* to = turned.data();
  const std::byte* from = planes.data();
  for (std::uint32_t layer = 0; layer < extent.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      if (part == Part::kValue && !extent.has_value) continue;
      const std::uint32_t dim = part == Part::kKey ? shape.key_dim : shape.value_dim;
      const auto rows = HeadRows::contiguous(from, shape.dtype, extent.heads, shape.tokens, dim);
      const Status status = rope::rotate(rows, part == Part::kKey ? turns : kNone, rotation_.style, Direction::kBack,
                                         DType::kFloat32, to);
      if (!status) return failure(status);
      from += extent.heads * shape.plane_bytes(part);
      to += extent.heads * floats.plane_bytes(part);
    }
  }
  return inner_->encode(floats, extent, turned.first(extent.raw_bytes(floats)), out);
}

Status UnrotateCodec::decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                             TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const {
  if (!extent.has_key) return inner_->decode(shape, extent, payload, tokens, head_begin, head_end, sink);
  TurningSink turning(
      shape, [&]() -> const Turns& { return turns(shape); }, rotation_.style, sink);
  return inner_->decode(as_floats(shape), extent, payload, tokens, head_begin, head_end, turning);
}

MakeWrapper make_unrotate_wrapper;

Result<std::shared_ptr<const Codec>> make_unrotate_wrapper(const CodecStep& step, std::shared_ptr<const Codec> inner) {
  const auto rotation = rope::Parameters::from(step);
  if (!rotation) return failure(rotation.error());
  return std::make_shared<UnrotateCodec>(*rotation, std::move(inner));
}

}  // namespace kvern
