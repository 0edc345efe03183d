#include <string>

#include "kernels/codec_step.h"
#include "kernels/cpu/int8.h"
#include "kernels/plane_form.h"

namespace kvern {
namespace {

using int8::Form;

/// Symmetric 8-bit codes: K with a scale per channel and group of tokens, V with a scale per token and group of
/// channels.
class Int8Form final : public PlaneForm {
 public:
  explicit Int8Form(std::uint32_t token_group)
      : token_group_(token_group), spec_("int8(group=" + std::to_string(token_group) + ",version=1)") {}

  std::string_view spec() const override { return spec_; }
  bool lossless() const override { return false; }

  Status accepts(DType dtype, std::uint32_t dim) const override {
    if (dtype == DType::kOpaqueBytes) {
      return {Code::kRefused, "int8 needs numbers, but the cache is stored as opaque bytes; use raw"};
    }
    if (dim > int8::kMaxDim) {
      return {Code::kRefused, "int8 takes head dimensions up to " + std::to_string(int8::kMaxDim) + ", not " +
                                  std::to_string(dim) + "; use raw"};
    }
    return Status::ok();
  }

  std::size_t max_bytes(const PlaneShape& plane) const override { return form(plane).section_bytes(); }

  Result<std::size_t> encode(const PlaneShape& plane, std::span<const std::byte> rows,
                             std::span<std::byte> out) const override {
    const Form f = form(plane);
    auto* scales = reinterpret_cast<std::uint16_t*>(out.data());
    if (!int8::encode_plane(f, rows.data(), scales, reinterpret_cast<std::int8_t*>(out.data() + f.codes_offset()))) {
      return failure(Code::kInvalid, "int8 cannot carry NaN or infinity");
    }
    std::fill(out.begin() + static_cast<std::ptrdiff_t>(f.scales() * sizeof(std::uint16_t)),
              out.begin() + static_cast<std::ptrdiff_t>(f.codes_offset()), std::byte{0});
    return f.section_bytes();
  }

  Status decode(const PlaneShape& plane, std::span<const std::byte> payload, TokenRange tokens,
                std::byte* rows) const override {
    const Form f = form(plane);
    if (payload.size() != f.section_bytes()) {
      return {Code::kCorrupt, "int8 section has " + std::to_string(payload.size()) + " bytes, not " +
                                  std::to_string(f.section_bytes())};
    }
    const auto* scales = reinterpret_cast<const std::uint16_t*>(payload.data());
    const auto* codes = reinterpret_cast<const std::int8_t*>(payload.data() + f.codes_offset());
    if (!int8::decode_rows(f, scales, codes, tokens.begin, tokens.end, rows)) {
      return {Code::kCorrupt, "a scale or code of the int8 section is not one that int8 writes"};
    }
    return Status::ok();
  }

 private:
  Form form(const PlaneShape& plane) const {
    const bool key = plane.part == Part::kKey;
    return {plane.dtype, key, plane.tokens, plane.dim, key ? token_group_ : Form::channel_group(plane.dim)};
  }

  std::uint32_t token_group_;
  std::string spec_;
};

}  // namespace

Result<std::shared_ptr<const PlaneForm>> make_int8_form(const CodecStep& step) {
  if (Status names = step.check_names({"group", "version"}); !names) return failure(names);
  const auto group = step.number("group", 64, {16, 32, 64, 128, 256});
  if (!group) return failure(group.error());
  if (const auto version = step.number("version", 1, {1}); !version) return failure(version.error());
  return std::make_shared<Int8Form>(*group);
}

}  // namespace kvern
