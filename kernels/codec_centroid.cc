#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "kernels/cluster.h"
#include "kernels/codec_step.h"
#include "kernels/finite.h"
#include "kernels/plane_codec.h"
#include "kernels/scratch.h"

namespace kvern {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kTileBytes = 16384;

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// The section's first bytes. The numbers of the tokens' entries follow, then, aligned, the encoded keys and, aligned,
/// the encoded values of the entries.
struct Header {
  std::uint32_t entries = 0;
  std::uint32_t reserved = 0;
  std::uint64_t key_bytes = 0;
};
static_assert(sizeof(Header) == 16);

/// Numbers below `entries`, each in as few bits as the largest needs, from the lowest bit of the first byte on. Eight
/// bytes can be read at any of them.
struct Packing {
  std::uint32_t bits = 0;

  explicit Packing(std::uint32_t entries) : bits(static_cast<std::uint32_t>(std::bit_width(entries - 1))) {}
  std::size_t bytes(std::size_t count) const { return (count * bits + 7) / 8 + sizeof(std::uint64_t); }
  std::uint32_t get(const std::byte* from, std::size_t index) const {
    std::uint64_t word = 0;
    std::memcpy(&word, from + index * bits / 8, sizeof word);
    return static_cast<std::uint32_t>((word >> (index * bits % 8)) & ((std::uint64_t{1} << bits) - 1));
  }
  /// to: zeros where nothing was put yet.
  void put(std::byte* to, std::size_t index, std::uint32_t number) const {
    std::uint64_t word = 0;
    std::memcpy(&word, to + index * bits / 8, sizeof word);
    word |= std::uint64_t{number} << (index * bits % 8);
    std::memcpy(to + index * bits / 8, &word, sizeof word);
  }
};

std::size_t keys_at(std::uint32_t entries, std::uint32_t tokens) {
  return aligned(sizeof(Header) + Packing(entries).bytes(tokens));
}

/// CentroidKV in the restore form: the rows of the centroids and which of them every token has. A section is one layer
/// and one head, K and V together, since they share the assignment.
class CentroidCodec final : public Codec {
 public:
  CentroidCodec(cluster::Options options, std::string step, std::shared_ptr<const PlaneForm> inner)
      : options_(std::move(options)),
        spec_(std::move(step) + " | " + std::string(inner->spec())),
        form_(std::move(inner)) {}

  std::string_view spec() const override { return spec_; }
  bool lossless() const override { return false; }

  Status accepts(const ShardShape& shape) const override {
    if (Status status = PlaneCodec(form_).accepts(shape); !status) return status;
    if (shape.dtype == DType::kOpaqueBytes) {
      return {Code::kRefused, "centroid needs numbers, but the cache is stored as opaque bytes; use raw"};
    }
    if (shape.key_dim > cluster::kMaxDim || shape.value_dim > cluster::kMaxDim) {
      return {Code::kRefused,
              "centroid takes head dimensions up to " + std::to_string(cluster::kMaxDim) + "; use another codec"};
    }
    return Status::ok();
  }

  std::vector<SectionPlan> plan(const ShardShape& shape) const override {
    const std::size_t bytes = section_max_bytes(shape);
    std::vector<SectionPlan> sections;
    sections.reserve(std::size_t{shape.layers} * shape.heads);
    for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        sections.push_back({{layer, 1, head, 1, true, shape.value_dim > 0}, bytes});
      }
    }
    return sections;
  }

  Result<std::size_t> encode(const ShardShape& shape, const SectionExtent&, std::span<const std::byte> planes,
                             std::span<std::byte> out) const override {
    const PlaneShape key = plane_of(shape, Part::kKey);
    const PlaneShape value = plane_of(shape, Part::kValue);
    if (planes.size() != key.bytes() + value.bytes() || out.size() < section_max_bytes(shape)) {
      return failure(Code::kInvalid, "the buffers do not have the size of the section's planes");
    }
    if (!all_finite(shape.dtype, planes)) return failure(Code::kInvalid, "centroid cannot carry NaN or infinity");
    cluster::Options options = options_;
    options.recent = std::min(shape.exact_tail, shape.tokens);
    options.sinks -= static_cast<std::uint32_t>(std::min<std::uint64_t>(shape.position, options.sinks));
    cluster::Clusters clusters;
    const auto rows = [&](const PlaneShape& plane, std::size_t offset) {
      return HeadRows::contiguous(planes.data() + offset, plane.dtype, 1, plane.tokens, plane.dim);
    };
    if (Status status = cluster::compress(rows(key, 0), rows(value, key.bytes()), options, clusters, nullptr);
        !status) {
      return failure(status);
    }
    const cluster::HeadClusters head = clusters.head(0);

    const std::size_t at = keys_at(head.entries, shape.tokens);
    std::fill_n(out.begin(), at, std::byte{0});
    const Packing packing(head.entries);
    for (std::size_t token = 0; token < head.assignment.size(); ++token) {
      packing.put(out.data() + sizeof(Header), token, head.assignment[token]);
    }
    auto key_bytes = encode_entries(key, head.keys, head.entries, out.subspan(at));
    if (!key_bytes) return key_bytes;
    const Header header{head.entries, 0, *key_bytes};
    std::memcpy(out.data(), &header, sizeof header);
    if (value.dim == 0) return at + *key_bytes;
    const std::size_t values_at = at + aligned(*key_bytes);
    std::memset(out.data() + at + *key_bytes, 0, values_at - at - *key_bytes);
    auto value_bytes = encode_entries(value, head.values, head.entries, out.subspan(values_at));
    if (!value_bytes) return value_bytes;
    return values_at + *value_bytes;
  }

  Status decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const override {
    if (tokens.begin > tokens.end || tokens.end > shape.tokens) {
      return {Code::kInvalid, "the token range lies outside the chunk"};
    }
    if (extent.head < head_begin || extent.head >= head_end || tokens.begin == tokens.end) return Status::ok();
    Header header;
    if (payload.size() < sizeof header) return {Code::kCorrupt, "a centroid section is shorter than its header"};
    std::memcpy(&header, payload.data(), sizeof header);
    if (header.entries == 0 || header.entries > shape.tokens) {
      return {Code::kCorrupt, "a centroid section has more entries than tokens, or none"};
    }
    const std::size_t at = keys_at(header.entries, shape.tokens);
    if (payload.size() < at || header.key_bytes > payload.size() - at ||
        (shape.value_dim > 0 ? aligned(header.key_bytes) > payload.size() - at
                             : header.key_bytes != payload.size() - at)) {
      return {Code::kCorrupt, "a centroid section does not have the size of its parts"};
    }
    const Packing packing(header.entries);
    std::vector<std::uint32_t> numbers(tokens.end - tokens.begin);
    for (std::uint32_t token = tokens.begin; token < tokens.end; ++token) {
      numbers[token - tokens.begin] = packing.get(payload.data() + sizeof header, token);
    }
    const auto entries = std::ranges::minmax(numbers);
    if (entries.max >= header.entries) return {Code::kCorrupt, "a token of a centroid section belongs to no entry"};
    const auto emit = [&](Part part, std::span<const std::byte> encoded) {
      PlaneShape plane = plane_of(shape, part);
      plane.tokens = header.entries;
      return restore(plane, encoded, {entries.min, entries.max + 1}, extent, numbers, tokens, sink);
    };
    if (Status status = emit(Part::kKey, payload.subspan(at, header.key_bytes)); !status) return status;
    if (shape.value_dim == 0) return Status::ok();
    return emit(Part::kValue, payload.subspan(at + aligned(header.key_bytes)));
  }

 private:
  static PlaneShape plane_of(const ShardShape& shape, Part part) {
    return {shape.dtype, part, shape.tokens, part == Part::kKey ? shape.key_dim : shape.value_dim};
  }

  /// Where no keys may be merged there is an entry per token.
  std::size_t section_max_bytes(const ShardShape& shape) const {
    const std::size_t keys = keys_at(shape.tokens, shape.tokens) + form_->max_bytes(plane_of(shape, Part::kKey));
    return shape.value_dim == 0 ? keys : aligned(keys) + form_->max_bytes(plane_of(shape, Part::kValue));
  }

  Result<std::size_t> encode_entries(PlaneShape plane, std::span<const float> rows, std::uint32_t entries,
                                     std::span<std::byte> out) const {
    plane.tokens = entries;
    std::vector<std::uint32_t> each(entries);
    std::iota(each.begin(), each.end(), 0U);
    const Scratch elements(plane.bytes());
    cluster::restore_rows(rows, plane.dim, each, plane.dtype, elements.data());
    return form_->encode(plane, elements.first(plane.bytes()), out);
  }

  /// Decodes the entries that the tokens have and hands their rows on, token by token.
  Status restore(const PlaneShape& plane, std::span<const std::byte> encoded, TokenRange entries,
                 const SectionExtent& extent, std::span<const std::uint32_t> numbers, TokenRange tokens,
                 RowSink& sink) const {
    const std::size_t row = plane.row_bytes();
    const Scratch rows((entries.end - entries.begin) * row);
    if (Status status = form_->decode(plane, encoded, entries, rows.data()); !status) return status;
    alignas(64) std::byte tile[kTileBytes];
    const auto tile_rows = static_cast<std::uint32_t>(kTileBytes / row);
    const std::uint32_t preferred = sink.preferred_rows();
    for (std::uint32_t begin = tokens.begin; begin < tokens.end;) {
      std::uint32_t count = std::min(tokens.end - begin, tile_rows);
      if (preferred > 0) count = std::min(count, preferred - begin % preferred);
      for (std::uint32_t i = 0; i < count; ++i) {
        const std::uint32_t number = numbers[begin - tokens.begin + i];
        std::memcpy(tile + i * row, rows.data() + (number - entries.begin) * row, row);
      }
      sink.write(extent.layer, plane.part, extent.head, begin, count, tile);
      begin += count;
    }
    return Status::ok();
  }

  cluster::Options options_;
  std::string spec_;
  std::shared_ptr<const PlaneForm> form_;
};

}  // namespace

Result<std::shared_ptr<const Codec>> make_centroid_reducer(const CodecStep& step,
                                                           std::shared_ptr<const PlaneForm> inner) {
  if (Status names = step.check_names({"ratio", "chunk", "sinks", "min_similarity", "version"}); !names) {
    return failure(names);
  }
  // Fewer than one in 256 cannot be reached in the passes that there are.
  const auto ratio = step.decimal("ratio", 0.5, 1.0 / 256, 1);
  if (!ratio) return failure(ratio.error());
  const auto chunk = step.number("chunk", 64, {16, 32, 64, 128, 256});
  if (!chunk) return failure(chunk.error());
  const auto sinks = step.number_within("sinks", 4, 0, 65536);
  if (!sinks) return failure(sinks.error());
  const auto similarity = step.decimal("min_similarity", -1, -1, 1);
  if (!similarity) return failure(similarity.error());
  if (const auto version = step.number("version", 1, {1}); !version) return failure(version.error());
  cluster::Options options;
  options.chunk = *chunk;
  options.sinks = *sinks;
  options.recent = 0;
  options.merges = cluster::merges_for(*ratio, *chunk);
  // Rounding may take a cosine below -1.
  if (*similarity > -1) options.min_similarity = static_cast<float>(*similarity);
  if (Status status = options.validate(); !status) return failure(status);
  const std::string canonical = "centroid(ratio=" + decimal_text(*ratio) + ",chunk=" + std::to_string(*chunk) +
                                ",sinks=" + std::to_string(*sinks) + ",min_similarity=" + decimal_text(*similarity) +
                                ",version=1)";
  return std::make_shared<CentroidCodec>(std::move(options), canonical, std::move(inner));
}

}  // namespace kvern
