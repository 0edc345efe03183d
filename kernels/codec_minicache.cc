#include <algorithm>
#include <array>
#include <cstring>
#include <numbers>
#include <optional>

#include "kernels/align.h"
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

/// Tokens that are turned back together.
constexpr std::uint32_t kAlignedTokens = 256;

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

  Layout(const PlaneShape& plane, DType exact, std::size_t kept)
      : retained(kept), shared(plane.tokens - kept), element(dtype_bytes(exact)), row(plane.dim * element) {}
  static std::size_t tokens_at() { return kHeaderBytes; }
  std::size_t x_lengths_at() const { return kHeaderBytes + retained * sizeof(std::uint32_t); }
  std::size_t y_lengths_at() const { return x_lengths_at() + shared * element; }
  std::size_t x_rows_at() const { return y_lengths_at() + shared * element; }
  std::size_t y_rows_at() const { return x_rows_at() + retained * row; }
  std::size_t directions_at() const { return aligned(y_rows_at() + retained * row); }
};

void put_value(DType dtype, float value, std::byte* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &value, sizeof value);
    return;
  }
  const std::uint16_t bits = dtype == DType::kFloat16 ? to_float16(value) : to_bfloat16(value);
  std::memcpy(to, &bits, sizeof bits);
}

float get_value(DType dtype, const std::byte* from) {
  if (dtype == DType::kFloat32) {
    float value = 0;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, from, sizeof bits);
  return dtype == DType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

/// Elements of one dtype as another: the same, or fp32 as bfloat16, saturating, and back.
void convert(DType from_dtype, const std::byte* from, DType to_dtype, std::size_t count, std::byte* to) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, count * dtype_bytes(to_dtype));
    return;
  }
  const float most = largest_finite(DType::kBFloat16);
  for (std::size_t i = 0; i < count; ++i) {
    const float value = get_value(from_dtype, from + i * dtype_bytes(from_dtype));
    put_value(to_dtype, std::clamp(value, -most, most), to + i * dtype_bytes(to_dtype));
  }
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
  std::shared_ptr<const align::ModelProfile> profile;  ///< null: keys are merged as they are
};

/// Rows of both layers of a section, kept until they are complete: [layer][head][token].
class Collector final : public RowSink {
 public:
  Collector(const SectionExtent& extent, TokenRange tokens, std::size_t row_bytes)
      : extent_(extent),
        tokens_(tokens),
        row_bytes_(row_bytes),
        rows_(std::size_t{2} * extent.heads * (tokens.end - tokens.begin) * row_bytes) {}
  void write(std::uint32_t layer, Part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    std::memcpy(row(layer - extent_.layer, head - extent_.head, token), rows, count * row_bytes_);
  }
  std::byte* row(std::uint32_t layer, std::uint32_t head, std::uint32_t token) {
    const std::size_t count = tokens_.end - tokens_.begin;
    return rows_.data() + ((std::size_t{layer} * extent_.heads + head) * count + token - tokens_.begin) * row_bytes_;
  }

 private:
  SectionExtent extent_;
  TokenRange tokens_;
  std::size_t row_bytes_;
  std::vector<std::byte> rows_;
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
    if (Status status = accepts_profile(shape); !status) return status;
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
        const std::uint32_t heads = together == 2 && key ? heads_together(shape) : 1;
        for (std::uint32_t first = layer; first < layer + layers; first += together) {
          for (std::uint32_t head = 0; head < shape.heads; head += heads) {
            const SectionExtent extent{first, together, head, heads, key, !key};
            sections.push_back({extent, is_aligned(extent) ? aligned_max_bytes(plane, heads)
                                        : together == 2    ? pair_max_bytes(plane)
                                                           : form_->max_bytes(plane)});
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
    if (is_aligned(extent)) return encode_aligned(shape, extent, planes, out);
    if (planes.size() != 2 * plane.bytes() || out.size() < pair_max_bytes(plane)) {
      return failure(Code::kInvalid, "the buffers do not have the size of the section's planes");
    }
    return encode_pair(plane, plane.dtype, planes.first(plane.bytes()), planes.subspan(plane.bytes()), out);
  }

  Status decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const override {
    if (extent.layers == 1) return planes_.decode(shape, extent, payload, tokens, head_begin, head_end, sink);
    if (tokens.begin > tokens.end || tokens.end > shape.tokens) {
      return {Code::kInvalid, "the token range lies outside the chunk"};
    }
    if (extent.head + extent.heads <= head_begin || extent.head >= head_end || tokens.begin == tokens.end) {
      return Status::ok();
    }
    if (is_aligned(extent)) return decode_aligned(shape, extent, payload, tokens, head_begin, head_end, sink);
    return decode_section(shape, extent, payload, tokens, sink);
  }

 private:
  static Part part_of(const SectionExtent& extent) { return extent.has_key ? Part::kKey : Part::kValue; }
  static PlaneShape plane_of(const ShardShape& shape, Part part) {
    return {shape.dtype, part, shape.tokens, part == Part::kKey ? shape.key_dim : shape.value_dim};
  }
  bool merges(Part part) const { return part == Part::kKey ? parameters_.keys : parameters_.values; }

  /// Sections of keys that are multiplied with a matrix.
  bool is_aligned(const SectionExtent& extent) const {
    return parameters_.profile != nullptr && extent.layers == 2 && extent.has_key;
  }
  std::uint32_t heads_together(const ShardShape& shape) const {
    return parameters_.profile != nullptr && shape.heads == parameters_.profile->heads ? shape.heads : 1;
  }
  /// The dtype of lengths and retained rows: the cache's. Keys that were multiplied with a matrix are not the cache's
  /// numbers any more, and as fp32 would outweigh the directions: where these are rounded, so are they.
  DType exact_dtype(const PlaneShape& plane, const SectionExtent& extent) const {
    return is_aligned(extent) && !form_->lossless() ? DType::kBFloat16 : plane.dtype;
  }
  std::span<const float> matrix_of(const ShardShape& shape, const SectionExtent& extent) const {
    const align::Pair& pair = *parameters_.profile->find(shape.layer_begin + extent.layer);
    if (heads_together(shape) == extent.heads && extent.heads > 1) return pair.whole;
    const std::size_t block = std::size_t{shape.key_dim} * shape.key_dim;
    return std::span(pair.blocks).subspan((shape.head_begin + extent.head) * block, block);
  }

  static Status not_position_free() {
    return {Code::kRefused, "minicache with a profile merges position-free keys in fp32: put unrotate before it"};
  }

  Status accepts_profile(const ShardShape& shape) const {
    if (parameters_.profile == nullptr) return Status::ok();
    const align::ModelProfile& profile = *parameters_.profile;
    if (shape.key_dim != profile.dim || shape.key_dim % 16 != 0 || shape.head_begin + shape.heads > profile.heads ||
        shape.layer_begin + shape.layers > profile.layers) {
      return {Code::kRefused, "the profile of minicache is of another model: it has " + std::to_string(profile.layers) +
                                  " layers, " + std::to_string(profile.heads) + " KV heads of dimension " +
                                  std::to_string(profile.dim)};
    }
    return shape.dtype == DType::kFloat32 ? Status::ok() : not_position_free();
  }

  /// Pairs are counted in the layers of the group, so that shards of it agree. One that a shard holds half of is left
  /// alone there.
  bool begins_pair(const ShardShape& shape, std::uint32_t layer) const {
    const std::uint32_t start = parameters_.start.value_or(shape.layer_begin + shape.layers / 2);
    const std::uint32_t number = shape.layer_begin + layer;
    if (parameters_.profile != nullptr) {
      return number >= parameters_.start.value_or(0) && parameters_.profile->find(number) != nullptr &&
             layer + 1 < shape.layers;
    }
    return number >= start && (number - start) % 2 == 0 && layer + 1 < shape.layers;
  }

  /// Tokens that may be retained before storing the pair apart costs less: those of the rule, and some forced ones.
  std::uint32_t most_retained(const PlaneShape& plane) const {
    return std::min(plane.tokens, merge::top_count(plane.tokens, parameters_.merge.retain) + plane.tokens / 8);
  }

  std::size_t pair_max_bytes(const PlaneShape& plane) const {
    const std::size_t retained = most_retained(plane);
    const std::size_t merged = kHeaderBytes + retained * (sizeof(std::uint32_t) + 2 * plane.row_bytes()) +
                               std::size_t{2} * plane.tokens * dtype_bytes(plane.dtype);
    return std::max(aligned(merged) + form_->max_bytes(plane), kHeaderBytes + 2 * aligned(form_->max_bytes(plane)));
  }

  std::size_t aligned_max_bytes(const PlaneShape& plane, std::uint32_t heads) const {
    return aligned(heads * sizeof(std::uint64_t)) + heads * aligned(pair_max_bytes(plane));
  }

  /// The sizes of the heads' pairs, then these, each aligned; the first layer's rows are multiplied with the matrix.
  Result<std::size_t> encode_aligned(const ShardShape& shape, const SectionExtent& extent,
                                     std::span<const std::byte> planes, std::span<std::byte> out) const {
    const PlaneShape plane = plane_of(shape, Part::kKey);
    if (plane.dtype != DType::kFloat32) return failure(not_position_free());
    const std::size_t layer = extent.heads * plane.bytes();
    if (planes.size() != 2 * layer || out.size() < aligned_max_bytes(plane, extent.heads)) {
      return failure(Code::kInvalid, "the buffers do not have the size of the section's planes");
    }
    std::vector<float> turned(layer / sizeof(float));
    const HeadRows x = HeadRows::contiguous(planes.data(), plane.dtype, extent.heads, plane.tokens, plane.dim);
    if (Status status = align::multiply_rows(x, matrix_of(shape, extent), turned, nullptr); !status) {
      return failure(status);
    }
    const auto turned_bytes = std::as_bytes(std::span(turned));
    // A number that is none would spread over all heads.
    if (!all_finite(plane.dtype, turned_bytes) || !all_finite(plane.dtype, planes)) {
      return failure(Code::kInvalid, "minicache with a profile cannot carry NaN or infinity");
    }
    std::size_t at = aligned(extent.heads * sizeof(std::uint64_t));
    std::fill_n(out.begin(), at, std::byte{0});
    std::size_t end = at;
    for (std::size_t head = 0; head < extent.heads; ++head) {
      std::memset(out.data() + end, 0, at - end);
      auto bytes =
          encode_pair(plane, exact_dtype(plane, extent), turned_bytes.subspan(head * plane.bytes(), plane.bytes()),
                      planes.subspan(layer + head * plane.bytes(), plane.bytes()), out.subspan(at));
      if (!bytes) return bytes;
      const std::uint64_t size = *bytes;
      std::memcpy(out.data() + head * sizeof size, &size, sizeof size);
      end = at + *bytes;
      at = aligned(end);
    }
    return end;
  }

  Status decode_aligned(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                        TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const {
    const PlaneShape plane = plane_of(shape, Part::kKey);
    if (plane.dtype != DType::kFloat32) return not_position_free();
    std::vector<std::span<const std::byte>> pairs;
    std::size_t at = aligned(extent.heads * sizeof(std::uint64_t));
    std::size_t end = at;
    for (std::size_t head = 0; head < extent.heads; ++head) {
      std::uint64_t size = 0;
      if (at > payload.size()) return {Code::kCorrupt, "an aligned minicache section is cut off"};
      std::memcpy(&size, payload.data() + head * sizeof size, sizeof size);
      if (size > payload.size() - at) return {Code::kCorrupt, "a pair of an aligned minicache section does not fit it"};
      pairs.push_back(payload.subspan(at, size));
      end = at + size;
      at = aligned(end);
    }
    if (end != payload.size()) {
      return {Code::kCorrupt, "an aligned minicache section does not have the size of its parts"};
    }
    const std::uint32_t width = extent.heads * plane.dim;
    const std::vector<float> back = align::transposed(matrix_of(shape, extent), width);
    const std::uint32_t preferred = sink.preferred_rows();
    for (std::uint32_t begin = tokens.begin; begin < tokens.end;) {
      std::uint32_t count = std::min(tokens.end - begin, kAlignedTokens);
      if (preferred > 0) count = std::min(count, preferred - begin % preferred);
      Collector rows(extent, {begin, begin + count}, plane.row_bytes());
      for (std::uint32_t head = 0; head < extent.heads; ++head) {
        SectionExtent one = extent;
        one.head = extent.head + head;
        one.heads = 1;
        if (Status status = decode_section(shape, one, pairs[head], {begin, begin + count}, rows); !status)
          return status;
      }
      std::vector<float> x(std::size_t{count} * width);
      const HeadRows turned = HeadRows::contiguous(rows.row(0, 0, begin), plane.dtype, extent.heads, count, plane.dim);
      if (Status status = align::multiply_rows(turned, back, x, nullptr); !status) return status;
      if (!all_finite(plane.dtype, std::as_bytes(std::span(x)))) {
        return {Code::kCorrupt, "rows of an aligned minicache section are too large"};
      }
      for (std::uint32_t head = 0; head < extent.heads; ++head) {
        if (extent.head + head < head_begin || extent.head + head >= head_end) continue;
        const float* first = x.data() + std::size_t{head} * count * plane.dim;
        sink.write(extent.layer, plane.part, extent.head + head, begin, count,
                   reinterpret_cast<const std::byte*>(first));
        sink.write(extent.layer + 1, plane.part, extent.head + head, begin, count, rows.row(1, head, begin));
      }
      begin += count;
    }
    return Status::ok();
  }

  /// A pair of one head.
  Status decode_section(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                        TokenRange tokens, RowSink& sink) const {
    Header header;
    if (payload.size() < kHeaderBytes) return {Code::kCorrupt, "a minicache section is shorter than its header"};
    std::memcpy(&header, payload.data(), sizeof header);
    if (header.kind == Kind::kMerged) {
      return decode_pair(plane_of(shape, part_of(extent)), extent, header, payload, tokens, sink);
    }
    if (header.kind != Kind::kApart) return {Code::kCorrupt, "a minicache section of an unknown kind"};
    const std::size_t room = payload.size() - kHeaderBytes;
    if (header.first_bytes > room || aligned(header.first_bytes) > room) {
      return {Code::kCorrupt, "the planes of a minicache section do not fit it"};
    }
    const auto x = payload.subspan(kHeaderBytes, header.first_bytes);
    const auto y = payload.subspan(kHeaderBytes + aligned(header.first_bytes));
    SectionExtent layer = extent;
    layer.layers = 1;
    if (Status status = planes_.decode(shape, layer, x, tokens, extent.head, extent.head + 1, sink); !status) {
      return status;
    }
    ++layer.layer;
    return planes_.decode(shape, layer, y, tokens, extent.head, extent.head + 1, sink);
  }

  Result<std::size_t> encode_apart(const PlaneShape& plane, std::span<const std::byte> x, std::span<const std::byte> y,
                                   std::span<std::byte> out) const {
    std::fill_n(out.begin(), kHeaderBytes, std::byte{0});
    auto x_bytes = form_->encode(plane, x, out.subspan(kHeaderBytes));
    if (!x_bytes) return x_bytes;
    const Header header{Kind::kApart, 0, *x_bytes};
    std::memcpy(out.data(), &header, sizeof header);
    const std::size_t second = kHeaderBytes + aligned(*x_bytes);
    std::memset(out.data() + kHeaderBytes + *x_bytes, 0, second - kHeaderBytes - *x_bytes);
    auto y_bytes = form_->encode(plane, y, out.subspan(second));
    if (!y_bytes) return y_bytes;
    return second + *y_bytes;
  }

  Result<std::size_t> encode_pair(const PlaneShape& plane, DType exact, std::span<const std::byte> x,
                                  std::span<const std::byte> y, std::span<std::byte> out) const {
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
      if (!storable(exact, x_lengths[token]) || !storable(exact, y_lengths[token])) {
        is_retained[token] = true;
      }
    }
    const auto retained = static_cast<std::uint32_t>(std::ranges::count(is_retained, true));
    if (retained > most_retained(plane)) return encode_apart(plane, x, y, out);

    const Layout layout(plane, exact, retained);
    std::fill_n(out.begin(), layout.directions_at(), std::byte{0});
    std::uint32_t kept = 0;
    std::uint32_t shared = 0;
    for (std::uint32_t token = 0; token < tokens; ++token) {
      const std::size_t row = token * plane.row_bytes();
      if (is_retained[token]) {
        std::memcpy(out.data() + Layout::tokens_at() + kept * sizeof token, &token, sizeof token);
        const std::size_t at = kept * layout.row;
        convert(plane.dtype, x.data() + row, exact, plane.dim, out.data() + layout.x_rows_at() + at);
        convert(plane.dtype, y.data() + row, exact, plane.dim, out.data() + layout.y_rows_at() + at);
        ++kept;
        continue;
      }
      if (shared != token) std::memcpy(directions + shared * plane.row_bytes(), directions + row, plane.row_bytes());
      x_lengths[shared] = x_lengths[token];
      y_lengths[shared] = y_lengths[token];
      ++shared;
    }

    Header header{Kind::kMerged, retained, 0};
    if (shared > 0) {
      PlaneShape left = plane;
      left.tokens = shared;
      const std::span<std::byte> payload = out.subspan(layout.directions_at());
      auto bytes = form_->encode(left, {directions, left.bytes()}, payload);
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
    const float most = largest_finite(exact) / 2;
    for (std::uint32_t i = 0; i < shared; ++i) {
      const std::size_t at = i * layout.element;
      put_value(exact, std::min(x_lengths[i], most), out.data() + layout.x_lengths_at() + at);
      put_value(exact, std::min(y_lengths[i], most), out.data() + layout.y_lengths_at() + at);
    }
    std::memcpy(out.data(), &header, sizeof header);
    return layout.directions_at() + header.first_bytes;
  }

  Status decode_pair(const PlaneShape& plane, const SectionExtent& extent, const Header& header,
                     std::span<const std::byte> payload, TokenRange tokens, RowSink& sink) const {
    if (header.retained > plane.tokens) return {Code::kCorrupt, "a minicache section retains more tokens than it has"};
    const DType exact = exact_dtype(plane, extent);
    const Layout layout(plane, exact, header.retained);
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
    if (!form_->lossless() && !all_finite(exact, retained_rows)) {
      return {Code::kCorrupt, "a retained row of a minicache section is not finite"};
    }
    PlaneShape left = plane;
    left.tokens = static_cast<std::uint32_t>(layout.shared);
    const std::span<const std::byte> directions = payload.subspan(layout.directions_at());

    alignas(64) std::byte shared_rows[kTileBytes];
    alignas(64) std::byte tile[kTileBytes];
    const auto tile_rows = static_cast<std::uint32_t>(kTileBytes / plane.row_bytes());
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
        const float most = largest_finite(exact);
        for (std::uint32_t i = shared.begin; i < shared.end; ++i) {
          const float length = get_value(exact, stored + i * layout.element);
          if (!(length >= 0 && length <= most)) return {Code::kCorrupt, "a length of a minicache section is not one"};
          lengths[i - shared.begin] = length;
        }
        const std::byte* kept = payload.data() + (layer == 0 ? layout.x_rows_at() : layout.y_rows_at());
        if (Status status =
                restore(plane, {begin, begin + count}, retained, first, shared_rows, lengths, exact, kept, tile);
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
                        DType exact, const std::byte* kept, std::byte* out) {
    const std::size_t row = plane.row_bytes();
    std::uint32_t shared = 0;
    for (std::uint32_t token = tokens.begin; token < tokens.end;) {
      const std::uint32_t end =
          next_retained < retained.size() ? std::min(retained[next_retained], tokens.end) : tokens.end;
      if (token == end) {
        convert(exact, kept + std::size_t{next_retained} * plane.dim * dtype_bytes(exact), plane.dtype, plane.dim, out);
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
  if (Status names = step.check_names({"start", "t", "retain", "rule", "k", "v", "max_angle", "profile", "version"});
      !names) {
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
  // Keys merge well when they are aligned, values do when they are not.
  const std::string* profile = step.find("profile");
  const auto keys = step.number("k", profile != nullptr ? 1 : 0, {0, 1});
  if (!keys) return failure(keys.error());
  const auto values = step.number("v", profile != nullptr ? 0 : 1, {0, 1});
  if (!values) return failure(values.error());
  const auto max_angle = step.decimal("max_angle", 45, 0, 180);
  if (!max_angle) return failure(max_angle.error());
  if (const auto version = step.number("version", 1, {1}); !version) return failure(version.error());
  if (*keys == 0 && *values == 0) {
    return failure(Code::kInvalid, "codec minicache with k=0 and v=0 merges nothing; leave it out");
  }
  if (profile != nullptr) {
    auto found = align::find_profile(*profile);
    if (!found) return failure(found.error().code(), "codec minicache: " + found.error().message());
    parameters.profile = *std::move(found);
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
                                (profile != nullptr ? ",profile=" + *profile : "") + ",version=1)";
  return std::make_shared<MinicacheCodec>(parameters, canonical, std::move(inner));
}

}  // namespace kvern
