#pragma once

#include <memory>
#include <string>

#include "kernels/codec.h"
#include "kernels/rope.h"

namespace kvern {

/// Keys without their positions: turns every key back by its position, hands it to the inner codec as fp32 and turns
/// what that one decodes forward again, in fp32, rounding once. Sections that hold values too take these as fp32 along
/// with the keys; sections of values alone are the inner codec's own.
class UnrotateCodec final : public Codec {
 public:
  UnrotateCodec(const rope::Parameters& rotation, std::shared_ptr<const Codec> inner);

  std::string_view spec() const override { return spec_; }
  bool lossless() const override { return false; }
  Status accepts(const ShardShape& shape) const override;
  std::vector<SectionPlan> plan(const ShardShape& shape) const override;
  std::size_t max_bytes(const ShardShape& shape, const SectionExtent& extent) const override;
  Result<std::size_t> encode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> planes,
                             std::span<std::byte> out) const override;
  Status decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const override;

 private:
  /// The turns of a shard's tokens. Valid on this thread until the next call.
  const rope::Turns& turns(const ShardShape& shape) const;

  rope::Parameters rotation_;
  std::vector<double> inverse_frequencies_;
  std::shared_ptr<const Codec> inner_;
  std::string spec_;
};

}  // namespace kvern
