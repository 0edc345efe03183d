#include <algorithm>
#include <array>
#include <cstring>
#include <numbers>
#include <optional>

#include "kernels/codec_step.h"
#include "kernels/element.h"
#include "kernels/finite.h"
#include "kernels/merge.h"
#include "kernels/plane_codec.h"
#include "kernels/scratch.h"

namespace kvern {
namespace {

constexpr std::size_t kAlignment = 64;
/// Restored rows of one layer wait here for the sink, as in plane_codec.cc.
constexpr std::size_t kTileBytes = 16384;

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// How a pair of planes is stored.
enum class Kind : std::uint32_t {
  kApart = 0,  ///< x, then y, each as the inner form writes it
  kMerged = 1,
};

/// The section's first bytes.
struct Header {
  Kind kind = Kind::kApart;
  std::uint32_t retained = 0;
  std::uint64_t first_bytes = 0;  ///< kApart: encoded bytes of x; kMerged: of the directions
};
constexpr std::size_t kHeaderBytes = kAlignment;
static_assert(sizeof(Header) == 16);

/// Where the parts of a merged pair lie: retained token numbers, lengths of x and y of the other tokens, retained rows
/// of x and y, then, aligned, the directions of the other tokens.
struct Layout {
  std::size_t retained = 0;
  std::size_t shared = 0;
  std::size_t element = 0;
  std::size_t row = 0;

  Layout(const PlaneShape& plane, std::size_t kept)
      : retained(kept), shared(plane.tokens - kept), element(dtype_bytes(plane.dtype)), row(plane.row_bytes()) {}
  static std::size_t tokens_at() { return kHeaderBytes; }
  std::size_t x_lengths_at() const { return kHeaderBytes + retained * sizeof(std::uint32_t); }
  std::size_t y_lengths_at() const { return x_lengths_at() + shared * element; }
  std::size_t x_rows_at() const { return y_lengths_at() + shared * element; }
  std::size_t y_rows_at() const { return x_rows_at() + retained * row; }
  std::size_t directions_at() const { return aligned(y_rows_at() + retained * row); }
};

void put_length(DType dtype, float length, std::byte* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &length, sizeof length);
    return;
  }
  const std::uint16_t bits = dtype == DType::kFloat16 ? to_float16(length) : to_bfloat16(length);
  std::memcpy(to, &bits, sizeof bits);
}

float get_length(DType dtype, const std::byte* from) {
  if (dtype == DType::kFloat32) {
    float length = 0;
    std::memcpy(&length, from, sizeof length);
    return length;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, from, sizeof bits);
  return dtype == DType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

/// Lengths that the dtype holds to its full precision, with room for what quantised directions lack in length.
bool storable(DType dtype, float length) {
  constexpr float kLeastNormalFloat16 = 0x1p-14F;
  return length <= largest_finite(dtype) / 4 && (dtype != DType::kFloat16 || length >= kLeastNormalFloat16);
}

struct Parameters {
  std::optional<std::uint32_t> start;  ///< layer of the group; absent: half of the shard's
  merge::Options merge;
  bool keys = false;
  bool values = true;
  double max_angle_degrees = 45;
};

/// MiniCache: K or V of two adjacent layers as one plane of directions and two lengths per token. A section is a pair
/// of layers, one part, one head; layers and parts that are not merged have the sections of a PlaneCodec. A pair whose
/// rows differ too much is stored apart, inside the same section.
class MinicacheCodec final : public Codec {
 public:
  MinicacheCodec(const Parameters& parameters, std::string step, std::shared_ptr<const PlaneForm> inner)
      : parameters_(parameters),
        spec_(std::move(step) + " | " + std::string(inner->spec())),
        form_(std::move(inner)),
        planes_(form_) {}

  std::string_view spec() const override { return spec_; }
  bool lossless() const override { return false; }

  Status accepts(const ShardShape& shape) const override {
    if (Status status = planes_.accepts(shape); !status) return status;
    if (shape.dtype == DType::kOpaqueBytes) {
      return {Code::kRefused, "minicache needs numbers, but the cache is stored as opaque bytes; use raw"};
    }
    for (const Part part : {Part::kKey, Part::kValue}) {
      const std::uint32_t dim = part == Part::kKey ? shape.key_dim : shape.value_dim;
      if (merges(part) && dim > merge::kMaxDim) {
        return {Code::kRefused, "minicache takes head dimensions up to " + std::to_string(merge::kMaxDim) + ", not " +
                                    std::to_string(dim) + "; use another codec"};
      }
    }
    return Status::ok();
  }

  std::vector<SectionPlan> plan(const ShardShape& shape) const override {
    std::vector<SectionPlan> sections;
    for (std::uint32_t layer = 0; layer < shape.layers;) {
      const std::uint32_t layers = begins_pair(shape, layer) ? 2 : 1;
      for (const Part part : {Part::kKey, Part::kValue}) {
        const PlaneShape plane = plane_of(shape, part);
        if (plane.bytes() == 0) continue;
        const bool key = part == Part::kKey;
        const std::uint32_t together = merges(part) ? layers : 1;
        for (std::uint32_t first = layer; first < layer + layers; first += together) {
          for (std::uint32_t head = 0; head < shape.heads; ++head) {
            sections.push_back({{first, together, head, 1, key, !key},
                                together == 2 ? pair_max_bytes(plane) : form_->max_bytes(plane)});
          }
        }
      }
      layer += layers;
    }
    return sections;
  }

  Result<std::size_t> encode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> planes,
                             std::span<std::byte> out) const override {
    if (extent.layers == 1) return planes_.encode(shape, extent, planes, out);
    const PlaneShape plane = plane_of(shape, part_of(extent));
    if (planes.size() != 2 * plane.bytes() || out.size() < pair_max_bytes(plane)) {
      return failure(Code::kInvalid, "the buffers do not have the size of the section's planes");
    }
    return encode_pair(plane, planes.first(plane.bytes()), planes.subspan(plane.bytes()), out);
  }

  Status decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const override {
    if (extent.layers == 1) return planes_.decode(shape, extent, payload, tokens, head_begin, head_end, sink);
    if (tokens.begin > tokens.end || tokens.end > shape.tokens) {
      return {Code::kInvalid, "the token range lies outside the chunk"};
    }
    if (extent.head < head_begin || extent.head >= head_end || tokens.begin == tokens.end) return Status::ok();
    Header header;
    if (payload.size() < kHeaderBytes) return {Code::kCorrupt, "a minicache section is shorter than its header"};
    std::memcpy(&header, payload.data(), sizeof header);
    const std::size_t room = payload.size() - kHeaderBytes;
    if (header.kind == Kind::kApart) {
      if (header.first_bytes > room || aligned(header.first_bytes) > room) {
        return {Code::kCorrupt, "the planes of a minicache section do not fit it"};
      }
      const std::size_t second = kHeaderBytes + aligned(header.first_bytes);
      SectionExtent layer = extent;
      layer.layers = 1;
      if (Status status = planes_.decode(shape, layer, payload.subspan(kHeaderBytes, header.first_bytes), tokens,
                                         head_begin, head_end, sink);
          !status) {
        return status;
      }
      ++layer.layer;
      return planes_.decode(shape, layer, payload.subspan(second), tokens, head_begin, head_end, sink);
    }
    if (header.kind != Kind::kMerged) return {Code::kCorrupt, "a minicache section of an unknown kind"};
    return decode_pair(plane_of(shape, part_of(extent)), extent, header, payload, tokens, sink);
  }

 private:
  static Part part_of(const SectionExtent& extent) { return extent.has_key ? Part::kKey : Part::kValue; }
  static PlaneShape plane_of(const ShardShape& shape, Part part) {
    return {shape.dtype, part, shape.tokens, part == Part::kKey ? shape.key_dim : shape.value_dim};
  }
  bool merges(Part part) const { return part == Part::kKey ? parameters_.keys : parameters_.values; }

  /// Pairs are counted in the layers of the group, so that shards of it agree. One that a shard holds half of is left
  /// alone there.
  bool begins_pair(const ShardShape& shape, std::uint32_t layer) const {
    const std::uint32_t start = parameters_.start.value_or(shape.layer_begin + shape.layers / 2);
    const std::uint32_t number = shape.layer_begin + layer;
    return number >= start && (number - start) % 2 == 0 && layer + 1 < shape.layers;
  }

  /// Tokens that may be retained before storing the pair apart costs less: those of the rule, and some forced ones.
  std::uint32_t most_retained(const PlaneShape& plane) const {
    return std::min(plane.tokens, merge::top_count(plane.tokens, parameters_.merge.retain) + plane.tokens / 8);
  }

  std::size_t pair_max_bytes(const PlaneShape& plane) const {
    const std::size_t retained = most_retained(plane);
    const std::size_t merged = kHeaderBytes + retained * (sizeof(std::uint32_t) + 2 * plane.row_bytes()) +
                               2 * plane.tokens * dtype_bytes(plane.dtype);
    return std::max(aligned(merged) + form_->max_bytes(plane), kHeaderBytes + 2 * aligned(form_->max_bytes(plane)));
  }

  Result<std::size_t> encode_apart(const PlaneShape& plane, std::span<const std::byte> x, std::span<const std::byte> y,
                                   std::span<std::byte> out) const {
    std::fill_n(out.begin(), kHeaderBytes, std::byte{0});
    const auto x_bytes = form_->encode(plane, x, out.subspan(kHeaderBytes));
    if (!x_bytes) return x_bytes;
    const Header header{Kind::kApart, 0, *x_bytes};
    std::memcpy(out.data(), &header, sizeof header);
    const std::size_t second = kHeaderBytes + aligned(*x_bytes);
    std::memset(out.data() + kHeaderBytes + *x_bytes, 0, second - kHeaderBytes - *x_bytes);
    const auto y_bytes = form_->encode(plane, y, out.subspan(second));
    if (!y_bytes) return y_bytes;
    return second + *y_bytes;
  }

  Result<std::size_t> encode_pair(const PlaneShape& plane, std::span<const std::byte> x, std::span<const std::byte> y,
                                  std::span<std::byte> out) const {
    if (!form_->lossless() && !(all_finite(plane.dtype, x) && all_finite(plane.dtype, y))) {
      return failure(Code::kInvalid, "minicache over a lossy form cannot carry NaN or infinity");
    }
    const std::uint32_t tokens = plane.tokens;
    std::vector<float> x_lengths(tokens);
    std::vector<float> y_lengths(tokens);
    std::vector<float> angles(tokens);
    const Scratch memory(plane.bytes());
    std::byte* directions = memory.data();
    const auto rows = [&](std::span<const std::byte> bytes) {
      return HeadRows::contiguous(bytes.data(), plane.dtype, 1, tokens, plane.dim);
    };
    if (Status status =
            merge::merge_layers(rows(x), rows(y), parameters_.merge.weight,
                                {directions, plane.dtype, x_lengths.data(), y_lengths.data(), angles.data()}, nullptr);
        !status) {
      return failure(status);
    }
    constexpr double kDegree = std::numbers::pi / 180;
    if (static_cast<double>(merge::mean_angle(angles)) > parameters_.max_angle_degrees * kDegree) {
      return encode_apart(plane, x, y, out);
    }
    std::vector<bool> is_retained(tokens);
    for (const std::uint32_t token : merge::retained_tokens(angles, parameters_.merge)) is_retained[token] = true;
    for (std::uint32_t token = 0; token < tokens; ++token) {
      if (!storable(plane.dtype, x_lengths[token]) || !storable(plane.dtype, y_lengths[token])) {
        is_retained[token] = true;
      }
    }
    const auto retained = static_cast<std::uint32_t>(std::ranges::count(is_retained, true));
    if (retained > most_retained(plane)) return encode_apart(plane, x, y, out);

    const Layout layout(plane, retained);
    std::fill_n(out.begin(), layout.directions_at(), std::byte{0});
    std::uint32_t kept = 0;
    std::uint32_t shared = 0;
    for (std::uint32_t token = 0; token < tokens; ++token) {
      const std::size_t row = token * layout.row;
      if (is_retained[token]) {
        std::memcpy(out.data() + Layout::tokens_at() + kept * sizeof token, &token, sizeof token);
        std::memcpy(out.data() + layout.x_rows_at() + kept * layout.row, x.data() + row, layout.row);
        std::memcpy(out.data() + layout.y_rows_at() + kept * layout.row, y.data() + row, layout.row);
        ++kept;
        continue;
      }
      if (shared != token) std::memcpy(directions + shared * layout.row, directions + row, layout.row);
      x_lengths[shared] = x_lengths[token];
      y_lengths[shared] = y_lengths[token];
      ++shared;
    }

    Header header{Kind::kMerged, retained, 0};
    if (shared > 0) {
      PlaneShape left = plane;
      left.tokens = shared;
      const std::span<std::byte> payload = out.subspan(layout.directions_at());
      const auto bytes = form_->encode(left, {directions, left.bytes()}, payload);
      if (!bytes) return bytes;
      header.first_bytes = *bytes;
      if (Status status = form_->decode(left, payload.first(*bytes), {0, shared}, directions); !status) {
        return failure(status);
      }
      const HeadRows read_back = HeadRows::contiguous(directions, plane.dtype, 1, shared, plane.dim);
      if (Status status = merge::fold_lengths(read_back, std::span(x_lengths).first(shared),
                                              std::span(y_lengths).first(shared), nullptr);
          !status) {
        return failure(status);
      }
    }
    const float most = largest_finite(plane.dtype) / 2;
    for (std::uint32_t i = 0; i < shared; ++i) {
      const std::size_t at = i * layout.element;
      put_length(plane.dtype, std::min(x_lengths[i], most), out.data() + layout.x_lengths_at() + at);
      put_length(plane.dtype, std::min(y_lengths[i], most), out.data() + layout.y_lengths_at() + at);
    }
    std::memcpy(out.data(), &header, sizeof header);
    return layout.directions_at() + header.first_bytes;
  }

  Status decode_pair(const PlaneShape& plane, const SectionExtent& extent, const Header& header,
                     std::span<const std::byte> payload, TokenRange tokens, RowSink& sink) const {
    if (header.retained > plane.tokens) return {Code::kCorrupt, "a minicache section retains more tokens than it has"};
    const Layout layout(plane, header.retained);
    if (payload.size() < layout.directions_at() || payload.size() - layout.directions_at() != header.first_bytes) {
      return {Code::kCorrupt, "a minicache section does not have the size of its parts"};
    }
    std::vector<std::uint32_t> retained(header.retained);
    if (!retained.empty()) {
      std::memcpy(retained.data(), payload.data() + Layout::tokens_at(), retained.size() * sizeof(std::uint32_t));
    }
    if (std::ranges::adjacent_find(retained, std::greater_equal<>()) != retained.end() ||
        (!retained.empty() && retained.back() >= plane.tokens)) {
      return {Code::kCorrupt, "the retained tokens of a minicache section are not tokens in order"};
    }
    const auto retained_rows = payload.subspan(layout.x_rows_at(), 2 * layout.retained * layout.row);
    if (!form_->lossless() && !all_finite(plane.dtype, retained_rows)) {
      return {Code::kCorrupt, "a retained row of a minicache section is not finite"};
    }
    PlaneShape left = plane;
    left.tokens = static_cast<std::uint32_t>(layout.shared);
    const std::span<const std::byte> directions = payload.subspan(layout.directions_at());

    alignas(64) std::byte shared_rows[kTileBytes];
    alignas(64) std::byte tile[kTileBytes];
    const auto tile_rows = static_cast<std::uint32_t>(kTileBytes / layout.row);
    std::vector<float> lengths(tile_rows);
    const std::uint32_t preferred = sink.preferred_rows();
    for (std::uint32_t begin = tokens.begin; begin < tokens.end;) {
      std::uint32_t count = std::min(tokens.end - begin, tile_rows);
      if (preferred > 0) count = std::min(count, preferred - begin % preferred);
      const auto first = static_cast<std::uint32_t>(std::ranges::lower_bound(retained, begin) - retained.begin());
      const auto last =
          static_cast<std::uint32_t>(std::ranges::lower_bound(retained, begin + count) - retained.begin());
      const TokenRange shared{begin - first, begin + count - last};
      if (shared.begin < shared.end) {
        if (Status status = form_->decode(left, directions, shared, shared_rows); !status) return status;
      }
      for (const std::uint32_t layer : {0U, 1U}) {
        const std::byte* stored = payload.data() + (layer == 0 ? layout.x_lengths_at() : layout.y_lengths_at());
        const float most = largest_finite(plane.dtype);
        for (std::uint32_t i = shared.begin; i < shared.end; ++i) {
          const float length = get_length(plane.dtype, stored + i * layout.element);
          if (!(length >= 0 && length <= most)) return {Code::kCorrupt, "a length of a minicache section is not one"};
          lengths[i - shared.begin] = length;
        }
        const std::byte* exact = payload.data() + (layer == 0 ? layout.x_rows_at() : layout.y_rows_at());
        if (Status status = restore(plane, {begin, begin + count}, retained, first, shared_rows, lengths, exact, tile);
            !status) {
          return status;
        }
        sink.write(extent.layer + layer, plane.part, extent.head, begin, count, tile);
      }
      begin += count;
    }
    return Status::ok();
  }

  /// Rows of one layer: runs of shared tokens, and the retained ones between them.
  static Status restore(const PlaneShape& plane, TokenRange tokens, std::span<const std::uint32_t> retained,
                        std::uint32_t next_retained, const std::byte* shared_rows, std::span<const float> lengths,
                        const std::byte* exact, std::byte* out) {
    const std::size_t row = plane.row_bytes();
    std::uint32_t shared = 0;
    for (std::uint32_t token = tokens.begin; token < tokens.end;) {
      const std::uint32_t end =
          next_retained < retained.size() ? std::min(retained[next_retained], tokens.end) : tokens.end;
      if (token == end) {
        std::memcpy(out, exact + next_retained * row, row);
        ++next_retained;
        ++token;
        out += row;
        continue;
      }
      const std::uint32_t run = end - token;
      const HeadRows directions = HeadRows::contiguous(shared_rows + shared * row, plane.dtype, 1, run, plane.dim);
      if (Status status = merge::restore_rows(directions, lengths.subspan(shared, run), out, nullptr); !status) {
        return status;
      }
      shared += run;
      token = end;
      out += run * row;
    }
    return Status::ok();
  }

  Parameters parameters_;
  std::string spec_;
  std::shared_ptr<const PlaneForm> form_;
  PlaneCodec planes_;
};

}  // namespace

Result<std::shared_ptr<const Codec>> make_minicache_reducer(const CodecStep& step,
                                                            std::shared_ptr<const PlaneForm> inner) {
  if (Status names = step.check_names({"start", "t", "retain", "rule", "k", "v", "max_angle", "version"}); !names) {
    return failure(names);
  }
  constexpr std::uint32_t kMostLayers = 65535;
  Parameters parameters;
  const auto half = step.word("start", "half", {"half"});
  if (!half) {
    const auto start = step.number_within("start", 0, 0, kMostLayers);
    if (!start) {
      return failure(Code::kInvalid,
                     "codec minicache: start must be a layer or half, not '" + *step.find("start") + "'");
    }
    parameters.start = *start;
  }
  const auto weight = step.decimal("t", 0.6, 0, 1);
  if (!weight) return failure(weight.error());
  const auto retain = step.decimal("retain", 0.05, 0, 1);
  if (!retain) return failure(retain.error());
  const auto rule = step.word("rule", "topk", {"topk", "range"});
  if (!rule) return failure(rule.error());
  const auto keys = step.number("k", 0, {0, 1});
  if (!keys) return failure(keys.error());
  const auto values = step.number("v", 1, {0, 1});
  if (!values) return failure(values.error());
  const auto max_angle = step.decimal("max_angle", 45, 0, 180);
  if (!max_angle) return failure(max_angle.error());
  if (const auto version = step.number("version", 1, {1}); !version) return failure(version.error());
  if (*keys == 0 && *values == 0) {
    return failure(Code::kInvalid, "codec minicache with k=0 and v=0 merges nothing; leave it out");
  }
  parameters.merge.weight = static_cast<float>(*weight);
  parameters.merge.retain = *retain;
  parameters.merge.rule = *rule == "topk" ? merge::Retention::kTopK : merge::Retention::kRange;
  parameters.keys = *keys == 1;
  parameters.values = *values == 1;
  parameters.max_angle_degrees = *max_angle;
  const std::string canonical = "minicache(start=" + (parameters.start ? std::to_string(*parameters.start) : "half") +
                                ",t=" + decimal_text(*weight) + ",retain=" + decimal_text(*retain) +
                                ",rule=" + std::string(*rule) + ",k=" + std::to_string(*keys) +
                                ",v=" + std::to_string(*values) + ",max_angle=" + decimal_text(*max_angle) +
                                ",version=1)";
  return std::make_shared<MinicacheCodec>(parameters, canonical, std::move(inner));
}

}  // namespace kvern
