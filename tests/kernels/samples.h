#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "base/keys.h"
#include "kernels/codec_registry.h"
#include "kernels/container.h"
#include "kernels/int8_arithmetic.h"

namespace kvern {

using Bytes = std::vector<std::byte>;

inline std::span<const std::uint8_t> as_uint8(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()};
}

/// A shard whose layers and heads are a part of the model's, so that numbering is put to the test.
inline ShardShape sample_shape(DType dtype, std::uint32_t tokens, std::uint32_t key_dim, std::uint32_t value_dim,
                               std::uint32_t layers = 2, std::uint32_t heads = 2) {
  return {dtype, 3, layers, 4, heads, tokens, key_dim, value_dim};
}

inline ContainerInfo sample_info(const ShardShape& shape, std::uint32_t block_tokens) {
  ContainerInfo info;
  for (std::size_t i = 0; i < info.key.namespace_id.bytes.size(); ++i) {
    info.key.namespace_id.bytes[i] = static_cast<std::uint8_t>(0xa0 + i);
  }
  info.key.group = 7;
  info.shape = shape;
  info.block_tokens = block_tokens;
  info.group_layers = shape.layer_begin + shape.layers + 5;
  info.model_heads = shape.head_begin + shape.heads;
  info.position = 4096;
  info.lossy_generations = 1;
  for (std::uint32_t i = 0; i < shape.tokens / block_tokens; ++i) {
    std::vector<std::uint8_t> hash(32, static_cast<std::uint8_t>(i));
    hash[0] = static_cast<std::uint8_t>(i >> 8);
    info.block_hashes.emplace_back(std::span<const std::uint8_t>(hash));
  }
  info.key.last_block = info.block_hashes.back();
  return info;
}

/// Random canonical bytes: values around zero with some channels ten times the others, as keys have.
inline Bytes sample_canonical(const ShardShape& shape, std::uint32_t seed) {
  std::mt19937 generator(seed);
  Bytes bytes(shape.raw_bytes());
  const std::size_t element = dtype_bytes(shape.dtype);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < bytes.size() / element; ++i) {
    const float value = normal(generator) * (i % 13 == 0 ? 10.0F : 1.0F);
    std::uint32_t bits = static_cast<std::uint32_t>(generator());
    if (shape.dtype == DType::kFloat32) bits = std::bit_cast<std::uint32_t>(value);
    if (shape.dtype == DType::kBFloat16) bits = to_bfloat16(value);
    if (shape.dtype == DType::kFloat16) bits = to_float16(value);
    std::memcpy(bytes.data() + i * element, &bits, element);
  }
  return bytes;
}

inline float element_at(DType dtype, const std::byte* bytes, std::size_t index) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, bytes + index * dtype_bytes(dtype), dtype_bytes(dtype));
  if (dtype == DType::kBFloat16) return from_bfloat16(static_cast<std::uint16_t>(bits));
  if (dtype == DType::kFloat16) return from_float16(static_cast<std::uint16_t>(bits));
  return std::bit_cast<float>(bits);
}

inline std::vector<std::uint64_t> sample_checksums(const ShardShape& shape, const Bytes& canonical) {
  std::vector<std::uint64_t> checksums;
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        checksums.push_back(
            checksum64(canonical.data() + shape.plane_offset(layer, part, head), shape.plane_bytes(part)));
      }
    }
  }
  return checksums;
}

/// Memory aligned as the store's extents are.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::size_t bytes) : storage_(bytes + 64), size_(bytes) {}
  explicit AlignedBytes(std::span<const std::byte> bytes) : AlignedBytes(bytes.size()) {
    std::ranges::copy(bytes, span().begin());
  }
  std::span<std::byte> span() {
    const std::size_t offset = (64 - reinterpret_cast<std::uintptr_t>(storage_.data()) % 64) % 64;
    return std::span(storage_).subspan(offset, size_);
  }

 private:
  Bytes storage_;
  std::size_t size_;
};

/// Keeps rows in the canonical layout of a whole shard and remembers which were written.
class CollectingSink final : public RowSink {
 public:
  explicit CollectingSink(const ShardShape& shape, std::uint32_t preferred_rows = 0)
      : shape_(shape), preferred_rows_(preferred_rows), bytes_(shape.raw_bytes()), written_(shape.raw_bytes()) {}

  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    if (layer >= shape_.layers || head >= shape_.heads || token + count > shape_.tokens || count == 0) {
      misplaced_ = true;
      return;
    }
    if (preferred_rows_ > 0 && token / preferred_rows_ != (token + count - 1) / preferred_rows_) misplaced_ = true;
    const std::size_t offset = shape_.plane_offset(layer, part, head) + token * shape_.row_bytes(part);
    std::memcpy(bytes_.data() + offset, rows, count * shape_.row_bytes(part));
    for (std::size_t i = 0; i < count * shape_.row_bytes(part); ++i) ++written_[offset + i];
  }
  std::uint32_t preferred_rows() const override { return preferred_rows_; }

  const Bytes& bytes() const { return bytes_; }
  /// How often each byte was written.
  const std::vector<std::uint8_t>& written() const { return written_; }
  bool every_byte_written_once() const {
    return std::ranges::all_of(written_, [](std::uint8_t times) { return times == 1; });
  }
  bool nothing_written() const {
    return std::ranges::all_of(written_, [](std::uint8_t times) { return times == 0; });
  }
  /// A row outside the shard, or rows across a border that the sink asked to cut at.
  bool misplaced() const { return misplaced_; }

 private:
  ShardShape shape_;
  std::uint32_t preferred_rows_;
  Bytes bytes_;
  std::vector<std::uint8_t> written_;
  bool misplaced_ = false;
};

/// Specs of codecs that take any shape with keys of 16 elements or more: every form, what stands around forms.
inline std::vector<std::string> sample_specs() {
  std::vector<std::string> specs = {"raw | zstd", "unrotate(dim=16) | int8", "unrotate(dim=16) | int8 | zstd"};
  for (const StepEntry& step : all_steps()) {
    if (step.kind == StepKind::kQuantise) specs.emplace_back(step.name);
  }
  return specs;
}

/// Decodes everything that the container holds.
inline Status decode_all(const ContainerReader& reader, RowSink& sink) {
  return reader.decode(0, 1000, 0, 1000, {0, reader.info().shape.tokens}, sink);
}

/// Encodes with a codec that must accept it and cuts to size.
inline Bytes encode_sample(const Codec& codec, const ContainerInfo& info, const Bytes& canonical) {
  AlignedBytes out(container_max_bytes(codec, info));
  const auto size = encode_container(codec, info, canonical, sample_checksums(info.shape, canonical), out.span());
  if (!size) throw std::runtime_error(size.error().to_string());
  const auto used = out.span().first(*size);
  return {used.begin(), used.end()};
}

}  // namespace kvern
