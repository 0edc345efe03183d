#include "store/transcode.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "kernels/chain.h"
#include "kernels/element.h"

namespace kvern {
namespace {

// Layers and heads of a container that are compared, and queries on each: some 10 million operations in all, far less
// than encoding takes.
constexpr std::uint32_t kComparedLayers = 2;
constexpr std::uint32_t kComparedHeads = 2;
constexpr std::uint32_t kQueries = 16;

float element_at(DType dtype, const std::byte* rows, std::size_t index) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, rows + index * dtype_bytes(dtype), dtype_bytes(dtype));
  if (dtype == DType::kBFloat16) return from_bfloat16(static_cast<std::uint16_t>(bits));
  if (dtype == DType::kFloat16) return from_float16(static_cast<std::uint16_t>(bits));
  return std::bit_cast<float>(bits);
}

/// Rows to where they belong in the canonical layout of a shard.
class CanonicalSink final : public RowSink {
 public:
  CanonicalSink(const ShardShape& shape, std::span<std::byte> canonical) : shape_(shape), canonical_(canonical) {}
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    const std::size_t row = shape_.row_bytes(part);
    std::memcpy(canonical_.data() + shape_.plane_offset(layer, part, head) + token * row, rows, count * row);
  }

 private:
  const ShardShape& shape_;
  std::span<std::byte> canonical_;
};

/// Keys and values of one layer and head as floats.
class PlaneSink final : public RowSink {
 public:
  PlaneSink(const ShardShape& shape, std::uint32_t layer, std::uint32_t head)
      : shape_(shape), layer_(layer), head_(head) {
    keys.resize(std::size_t{shape.tokens} * shape.key_dim);
    values.resize(std::size_t{shape.tokens} * shape.value_dim);
  }
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    if (layer != layer_ || head != head_) return;
    auto& plane = part == Part::kKey ? keys : values;
    const std::size_t dim = part == Part::kKey ? shape_.key_dim : shape_.value_dim;
    for (std::size_t i = 0; i < count * dim; ++i) plane[token * dim + i] = element_at(shape_.dtype, rows, i);
  }

  std::vector<float> keys;
  std::vector<float> values;

 private:
  const ShardShape& shape_;
  std::uint32_t layer_;
  std::uint32_t head_;
};

/// softmax(q K^T / sqrt(d)) V, all in fp32.
std::vector<float> attend_to(std::span<const float> query, std::span<const float> keys, std::span<const float> values,
                             std::size_t tokens) {
  const std::size_t key_dim = query.size();
  const std::size_t value_dim = values.size() / tokens;
  std::vector<float> weights(tokens);
  float most = -std::numeric_limits<float>::infinity();
  for (std::size_t token = 0; token < tokens; ++token) {
    float dot = 0;
    for (std::size_t i = 0; i < key_dim; ++i) dot += query[i] * keys[token * key_dim + i];
    weights[token] = dot / std::sqrt(static_cast<float>(key_dim));
    most = std::max(most, weights[token]);
  }
  float sum = 0;
  for (float& weight : weights) sum += weight = std::exp(weight - most);
  std::vector<float> output(value_dim);
  for (std::size_t token = 0; token < tokens; ++token) {
    for (std::size_t i = 0; i < value_dim; ++i) output[i] += weights[token] / sum * values[token * value_dim + i];
  }
  return output;
}

/// Which of count, so that they lie evenly.
std::vector<std::uint32_t> spread(std::uint32_t count, std::uint32_t most) {
  std::vector<std::uint32_t> chosen;
  const std::uint32_t picks = std::min(count, most);
  for (std::uint32_t i = 0; i < picks; ++i) chosen.push_back((2 * i + 1) * count / (2 * picks));
  return chosen;
}

Result<double> compare(const ContainerReader& before, const ContainerReader& after) {
  const ShardShape& shape = before.info().shape;
  double difference = 0;
  double whole = 0;
  for (const std::uint32_t layer : spread(shape.layers, kComparedLayers)) {
    for (const std::uint32_t head : spread(shape.heads, kComparedHeads)) {
      const auto read = [&](const ContainerReader& from, PlaneSink& sink) {
        const std::uint32_t model_layer = shape.layer_begin + layer;
        const std::uint32_t model_head = shape.head_begin + head;
        return from.decode(model_layer, model_layer + 1, model_head, model_head + 1, {0, shape.tokens}, sink);
      };
      PlaneSink exact(shape, layer, head);
      PlaneSink made(shape, layer, head);
      if (Status status = read(before, exact); !status) return failure(std::move(status));
      if (Status status = read(after, made); !status) return failure(std::move(status));
      // Where K and V share their rows, keys are values.
      const bool shared = shape.value_dim == 0;
      for (const std::uint32_t token : spread(shape.tokens, kQueries)) {
        const auto query =
            std::span<const float>(exact.keys).subspan(std::size_t{token} * shape.key_dim, shape.key_dim);
        const auto wanted = attend_to(query, exact.keys, shared ? exact.keys : exact.values, shape.tokens);
        const auto got = attend_to(query, made.keys, shared ? made.keys : made.values, shape.tokens);
        for (std::size_t i = 0; i < wanted.size(); ++i) {
          difference += std::pow(double{wanted[i]} - got[i], 2);
          whole += std::pow(double{wanted[i]}, 2);
        }
      }
    }
  }
  // NaN comes out as the worst that there is.
  const double error = whole > 0 ? std::sqrt(difference / whole) : (difference > 0 ? 1.0 : 0.0);
  return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

}  // namespace

Result<Transcoded> Transcoder::run(const ContainerReader& from, const Codec& to, std::uint32_t lossy_generations,
                                   std::span<std::byte> out) {
  ContainerInfo info = from.info();
  if (Status accepts = to.accepts(info.shape); !accepts) return failure(std::move(accepts));
  const auto chain = parse_chunk_chain(info.codec_spec);
  if (!info.layer_slots.empty()) {
    const auto target = parse_chunk_chain(to.spec());
    if (target && target->merges_rows()) {
      return failure(Code::kRefused, "pages of several layers lie side by side in this compact cache");
    }
  }
  Result<std::size_t> bytes = failure(Code::kInternal, "not made yet");
  if (chain && chain->steps.size() == 1 && chain->form->base_spec() == to.spec()) {
    bytes = from.write_base(out);
  } else {
    canonical_.resize(info.shape.raw_bytes());
    CanonicalSink sink(from.info().shape, canonical_);
    const Status decoded = from.decode(0, info.group_layers, 0, info.model_heads, {0, info.shape.tokens}, sink);
    if (!decoded) return failure(decoded);
    info.codec_spec = to.spec();
    info.lossy_generations = lossy_generations;
    bytes = encode_container(to, info, canonical_, {}, out);
  }
  if (!bytes) return failure(bytes.error());
  if (to.lossless()) return Transcoded{*bytes, 0};
  const auto made = ContainerReader::parse(out.first(*bytes));
  if (!made) return failure(Code::kInternal, "the new form cannot be read: " + made.error().message());
  const auto error = compare(from, *made);
  if (!error) return failure(error.error());
  return Transcoded{*bytes, *error};
}

}  // namespace kvern
