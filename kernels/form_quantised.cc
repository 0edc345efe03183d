#include "kernels/form_quantised.h"

#include <algorithm>

#include "kernels/cpu/quantise.h"

namespace kvern {
namespace {

using quantise::Form;
using quantise::Kind;
using quantise::Scheme;

/// Groups of codes with a scale each: K per channel over tokens, V per token over channels.
class QuantisedForm final : public PlaneForm {
 public:
  QuantisedForm(std::string name, Kind kind, std::uint32_t group, Scheme scheme)
      : name_(std::move(name)), kind_(kind), group_(group), scheme_(scheme), spec_(spec_of(name_)) {
    if (kind == Kind::kInt8Residual) base_spec_ = spec_of("int4");
  }

  std::string_view spec() const override { return spec_; }
  bool lossless() const override { return false; }
  std::string_view base_spec() const override { return base_spec_; }
  std::size_t base_bytes(const PlaneShape& plane) const override {
    return base_spec_.empty() ? 0 : form(plane).first_end();
  }

  Status accepts(DType dtype, std::uint32_t dim) const override {
    if (dtype == DType::kOpaqueBytes) {
      return {Code::kRefused, name_ + " needs numbers, but the cache is stored as opaque bytes; use raw"};
    }
    if (dim > quantise::kMaxDim || dim % Form::kDimStep != 0) {
      return {Code::kRefused, name_ + " takes head dimensions that are multiples of " + std::to_string(Form::kDimStep) +
                                  " up to " + std::to_string(quantise::kMaxDim) + ", not " + std::to_string(dim) +
                                  "; use raw or int8"};
    }
    return Status::ok();
  }

  std::size_t max_bytes(const PlaneShape& plane) const override { return form(plane).section_bytes(); }

  Result<std::size_t> encode(const PlaneShape& plane, std::span<const std::byte> rows,
                             std::span<std::byte> out) const override {
    const Form f = form(plane);
    const auto clear = [&](std::size_t begin, std::size_t end) {
      std::fill(out.begin() + static_cast<std::ptrdiff_t>(begin), out.begin() + static_cast<std::ptrdiff_t>(end),
                std::byte{0});
    };
    // The gaps between the parts, which checksums cover.
    clear(f.scales() * sizeof(std::uint16_t), f.offsets_at());
    if (f.has_offsets()) clear(f.offsets_at() + f.scales() * f.element_bytes(), f.first_at());
    if (quantise::second_bits(kind_) > 0) clear(f.first_end(), f.second_at());
    if (!quantise::encode_plane(f, rows.data(), out.data())) {
      return failure(Code::kInvalid, name_ + " cannot carry NaN or infinity");
    }
    return f.section_bytes();
  }

  Status decode(const PlaneShape& plane, std::span<const std::byte> payload, TokenRange tokens,
                std::byte* rows) const override {
    const Form f = form(plane);
    if (payload.size() != f.section_bytes()) {
      return {Code::kCorrupt, name_ + " section has " + std::to_string(payload.size()) + " bytes, not " +
                                  std::to_string(f.section_bytes())};
    }
    if (!quantise::decode_rows(f, payload.data(), tokens.begin, tokens.end, rows)) {
      return {Code::kCorrupt, "a scale or code of the " + name_ + " section is not one that " + name_ + " writes"};
    }
    return Status::ok();
  }

 private:
  std::string spec_of(const std::string& name) const {
    std::string text = name + "(group=" + std::to_string(group_);
    if (kind_ != Kind::kFp8) text += scheme_ == Scheme::kSymmetric ? ",scheme=symmetric" : ",scheme=asymmetric";
    return text + ",version=1)";
  }

  Form form(const PlaneShape& plane) const {
    const bool key = plane.part == Part::kKey;
    return {plane.dtype, key,    plane.tokens, plane.dim, key ? group_ : Form::channel_group(plane.dim, group_),
            kind_,       scheme_};
  }

  std::string name_;
  Kind kind_;
  std::uint32_t group_;
  Scheme scheme_;
  std::string spec_;
  std::string base_spec_;
};

}  // namespace

Result<std::shared_ptr<const PlaneForm>> make_quantised_form(const CodecStep& step, Kind kind) {
  const bool fp8 = kind == Kind::kFp8;
  const Status names = fp8 ? step.check_names({"group", "version"}) : step.check_names({"group", "scheme", "version"});
  if (!names) return failure(names);
  const auto group = step.number("group", 64, {32, 64, 128});
  if (!group) return failure(group.error());
  if (const auto version = step.number("version", 1, {1}); !version) return failure(version.error());
  Scheme scheme = Scheme::kSymmetric;
  if (!fp8) {
    const auto word = step.word("scheme", "asymmetric", {"asymmetric", "symmetric"});
    if (!word) return failure(word.error());
    if (*word == "asymmetric") scheme = Scheme::kAsymmetric;
  }
  return std::make_shared<QuantisedForm>(step.name, kind, *group, scheme);
}

}  // namespace kvern
