#pragma once

#include <memory>
#include <utility>

#include "kernels/codec.h"
#include "kernels/plane_form.h"

namespace kvern {

/// A chain that only quantises. Its sections are one plane each (one layer, K or V, one head): readers with another
/// tensor-parallel size decode just their heads. Sections are stored in the order layer, part, head; planes of no bytes
/// have none.
class PlaneCodec final : public Codec {
 public:
  explicit PlaneCodec(std::shared_ptr<const PlaneForm> form) : form_(std::move(form)) {}

  std::string_view spec() const override { return form_->spec(); }
  bool lossless() const override { return form_->lossless(); }
  bool verbatim() const override { return form_->verbatim(); }
  Status accepts(const ShardShape& shape) const override;
  std::vector<SectionPlan> plan(const ShardShape& shape) const override;
  std::size_t max_bytes(const ShardShape& shape, const SectionExtent& extent) const override;
  Result<std::size_t> encode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> planes,
                             std::span<std::byte> out) const override;
  Status decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const override;

 private:
  std::shared_ptr<const PlaneForm> form_;
};

}  // namespace kvern
