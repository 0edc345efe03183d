#include <string>

#include "kernels/codec_step.h"
#include "kernels/cpu/int8.h"
#include "kernels/plane_codec.h"

namespace kvern {
namespace {

using int8::Form;

/// Symmetric 8-bit codes: K with a scale per channel and group of tokens, V with a scale per token and group of
/// channels.
class Int8Codec final : public PlaneCodec {
 public:
  explicit Int8Codec(std::uint32_t token_group)
      : token_group_(token_group), spec_("int8(group=" + std::to_string(token_group) + ",version=1)") {}

  std::string_view spec() const override { return spec_; }
  bool lossless() const override { return false; }

  Status accepts(const ShardShape& shape) const override {
    if (Status status = shape.validate(); !status) return status;
    if (shape.dtype == DType::kOpaqueBytes) {
      return {Code::kRefused, "int8 needs numbers, but the cache is stored as opaque bytes; use raw"};
    }
    if (std::max(shape.key_dim, shape.value_dim) > int8::kMaxDim) {
      return {Code::kRefused, "int8 takes head dimensions up to " + std::to_string(int8::kMaxDim) + ", not " +
                                  std::to_string(std::max(shape.key_dim, shape.value_dim)) + "; use raw"};
    }
    return Status::ok();
  }

 protected:
  std::size_t max_plane_bytes(const ShardShape& shape, Part part) const override {
    return form(shape, part).section_bytes();
  }

  Result<std::size_t> encode_plane(const ShardShape& shape, Part part, std::span<const std::byte> plane,
                                   std::span<std::byte> out) const override {
    const Form f = form(shape, part);
    auto* scales = reinterpret_cast<std::uint16_t*>(out.data());
    if (!int8::encode_plane(f, plane.data(), scales, reinterpret_cast<std::int8_t*>(out.data() + f.codes_offset()))) {
      return failure(Code::kInvalid, "int8 cannot carry NaN or infinity");
    }
    std::fill(out.begin() + static_cast<std::ptrdiff_t>(f.scales() * sizeof(std::uint16_t)),
              out.begin() + static_cast<std::ptrdiff_t>(f.codes_offset()), std::byte{0});
    return f.section_bytes();
  }

  Status decode_plane(const ShardShape& shape, Part part, std::span<const std::byte> payload, TokenRange tokens,
                      PlaneSink& sink) const override {
    const Form f = form(shape, part);
    if (payload.size() != f.section_bytes()) {
      return {Code::kCorrupt, "int8 section has " + std::to_string(payload.size()) + " bytes, not " +
                                  std::to_string(f.section_bytes())};
    }
    const auto* scales = reinterpret_cast<const std::uint16_t*>(payload.data());
    const auto* codes = reinterpret_cast<const std::int8_t*>(payload.data() + f.codes_offset());
    alignas(64) std::byte tile[kTileBytes];
    bool good = true;
    sink.for_each_run(tokens, static_cast<std::uint32_t>(kTileBytes / shape.row_bytes(part)),
                      [&](std::uint32_t begin, std::uint32_t end) {
                        good = good && int8::decode_rows(f, scales, codes, begin, end, tile);
                        if (good) sink.write(begin, end - begin, tile);
                      });
    return good ? Status::ok() : Status(Code::kCorrupt, "a scale of the int8 section is not one that int8 writes");
  }

 private:
  /// Decoded rows wait here for the sink: a page of 128 tokens of 64 bf16 channels, well inside the L1 cache.
  static constexpr std::size_t kTileBytes = 16384;

  Form form(const ShardShape& shape, Part part) const {
    const bool key = part == Part::kKey;
    const std::uint32_t dim = key ? shape.key_dim : shape.value_dim;
    return {shape.dtype, key, shape.tokens, dim, key ? token_group_ : Form::channel_group(dim)};
  }

  std::uint32_t token_group_;
  std::string spec_;
};

}  // namespace

Result<std::shared_ptr<const Codec>> make_int8_codec(const CodecStep& step) {
  if (Status names = step.check_names({"group", "version"}); !names) return failure(names);
  const auto group = step.number("group", 64, {16, 32, 64, 128, 256});
  if (!group) return failure(group.error());
  if (const auto version = step.number("version", 1, {1}); !version) return failure(version.error());
  return std::make_shared<Int8Codec>(*group);
}

}  // namespace kvern
