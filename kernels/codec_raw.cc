#include <cstring>

#include "kernels/codec_step.h"
#include "kernels/plane_codec.h"

namespace kvern {
namespace {

/// The planes as they are.
class RawCodec final : public PlaneCodec {
 public:
  std::string_view spec() const override { return "raw"; }
  bool lossless() const override { return true; }
  bool verbatim() const override { return true; }
  Status accepts(const ShardShape& shape) const override { return shape.validate(); }

 protected:
  std::size_t max_plane_bytes(const ShardShape& shape, Part part) const override { return shape.plane_bytes(part); }

  Result<std::size_t> encode_plane(const ShardShape&, Part, std::span<const std::byte> plane,
                                   std::span<std::byte> out) const override {
    std::memcpy(out.data(), plane.data(), plane.size());
    return plane.size();
  }

  Status decode_plane(const ShardShape& shape, Part part, std::span<const std::byte> payload, TokenRange tokens,
                      PlaneSink& sink) const override {
    if (payload.size() != shape.plane_bytes(part)) {
      return {Code::kCorrupt, "raw section has " + std::to_string(payload.size()) + " bytes, not " +
                                  std::to_string(shape.plane_bytes(part))};
    }
    sink.for_each_run(tokens, shape.tokens, [&](std::uint32_t begin, std::uint32_t end) {
      sink.write(begin, end - begin, payload.data() + begin * shape.row_bytes(part));
    });
    return Status::ok();
  }
};

}  // namespace

Result<std::shared_ptr<const Codec>> make_raw_codec(const CodecStep& step) {
  if (Status names = step.check_names({}); !names) return failure(names);
  return std::make_shared<RawCodec>();
}

}  // namespace kvern
