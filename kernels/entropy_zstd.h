#pragma once

#include <memory>
#include <string>

#include "kernels/codec.h"

namespace kvern {

/// The lossless last stage: the sections of another codec, compressed with zstd. Sections of raw rows are split into
/// byte planes first (kernels/byte_planes.h), one zstd frame per plane; all others are one frame. Equal input gives
/// equal bytes with the same version of libzstd; every version reads them.
///
/// Section: u32 bytes of the inner section, u32 bytes of each frame, the frames.
class ZstdCodec final : public Codec {
 public:
  ZstdCodec(std::shared_ptr<const Codec> inner, int level);

  std::string_view spec() const override { return spec_; }
  bool lossless() const override { return inner_->lossless(); }
  Status accepts(const ShardShape& shape) const override;
  std::vector<SectionPlan> plan(const ShardShape& shape) const override;
  Result<std::size_t> encode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> planes,
                             std::span<std::byte> out) const override;
  Status decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const override;

 private:
  /// Byte planes that a section is split into.
  std::size_t frames(const ShardShape& shape) const;

  std::shared_ptr<const Codec> inner_;
  int level_;
  std::string spec_;
};

}  // namespace kvern
