#include <cstring>

#include "kernels/codec_step.h"
#include "kernels/plane_form.h"

namespace kvern {
namespace {

/// The rows as they are.
class RawForm final : public PlaneForm {
 public:
  std::string_view spec() const override { return "raw"; }
  bool lossless() const override { return true; }
  bool verbatim() const override { return true; }
  Status accepts(DType, std::uint32_t) const override { return Status::ok(); }
  std::size_t max_bytes(const PlaneShape& plane) const override { return plane.bytes(); }

  Result<std::size_t> encode(const PlaneShape& plane, std::span<const std::byte> rows,
                             std::span<std::byte> out) const override {
    if (plane.bytes() > 0) std::memcpy(out.data(), rows.data(), plane.bytes());
    return plane.bytes();
  }

  Status decode(const PlaneShape& plane, std::span<const std::byte> payload, TokenRange tokens,
                std::byte* rows) const override {
    if (payload.size() != plane.bytes()) {
      return {Code::kCorrupt,
              "raw rows have " + std::to_string(payload.size()) + " bytes, not " + std::to_string(plane.bytes())};
    }
    const std::size_t bytes = (tokens.end - tokens.begin) * plane.row_bytes();
    if (bytes > 0) std::memcpy(rows, payload.data() + tokens.begin * plane.row_bytes(), bytes);
    return Status::ok();
  }
};

}  // namespace

Result<std::shared_ptr<const PlaneForm>> make_raw_form(const CodecStep& step) {
  if (Status names = step.check_names({}); !names) return failure(names);
  return std::make_shared<RawForm>();
}

}  // namespace kvern
