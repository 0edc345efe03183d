#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kernels/checksum.h"
#include "kernels/kv_shape.h"
#include "kernels/plane_form.h"

namespace kvern {

/// What a section of a container covers, relative to the shard: layers [layer, layer+layers), one part or both, heads
/// [head, head+heads), all tokens.
struct SectionExtent {
  std::uint32_t layer = 0;
  std::uint32_t layers = 1;
  std::uint32_t head = 0;
  std::uint32_t heads = 1;
  bool has_key = false;
  bool has_value = false;
  bool operator==(const SectionExtent&) const = default;

  std::size_t planes() const { return std::size_t{layers} * heads * ((has_key ? 1U : 0U) + (has_value ? 1U : 0U)); }
  /// Of its planes as they are.
  std::size_t raw_bytes(const ShardShape& shape) const {
    return std::size_t{layers} * heads *
           ((has_key ? shape.plane_bytes(Part::kKey) : 0) + (has_value ? shape.plane_bytes(Part::kValue) : 0));
  }
};

struct SectionPlan {
  SectionExtent extent;
  std::size_t max_bytes = 0;  ///< upper bound of the encoded section
};

/// Receives decoded rows and puts them where the engine wants them. Called from the thread that decodes.
class RowSink {
 public:
  virtual ~RowSink() = default;
  /// rows: count rows of the shard's dtype, row-major without gaps, tokens token .. token+count-1 of the chunk. Layer
  /// and head are relative to the shard. The sink copies (and transposes, packs …) before it returns.
  virtual void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
                     const std::byte* rows) = 0;
  /// True for a sink whose owner cleans up after a failed decode: it may get rows that are not verified yet. Rows of
  /// verbatim codecs then come through write_hashing(), which reads them from memory once rather than twice.
  virtual bool accepts_unverified() const { return false; }
  /// write() of rows.size() bytes that also feeds all of them to the checksum.
  virtual void write_hashing(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token,
                             std::uint32_t count, std::span<const std::byte> rows, Checksum64& checksum) {
    checksum.update(rows.data(), rows.size());
    write(layer, part, head, token, count, rows.data());
  }
  /// Rows per call that suit the sink (a page, say): decoders cut their output there. 0: no preference.
  virtual std::uint32_t preferred_rows() const { return 0; }
};

/// One codec chain, ready to run: immutable, thread-safe, deterministic (the same bytes from run to run and on every
/// instruction set).
class Codec {
 public:
  virtual ~Codec() = default;

  /// Canonical spec, for instance "raw" or "int8(group=64)". Part of the container header.
  virtual std::string_view spec() const = 0;
  /// False when decoding does not give back the very bytes.
  virtual bool lossless() const = 0;
  /// Refuses (kRefused) shapes that it cannot encode, in a sentence: dtype, head size, footprint.
  virtual Status accepts(const ShardShape& shape) const = 0;
  /// Sections in the order in which they are stored. Depends on the shape alone.
  virtual std::vector<SectionPlan> plan(const ShardShape& shape) const = 0;
  /// max_bytes of one section of the plan. Override it where one can say so without making the plan.
  virtual std::size_t max_bytes(const ShardShape& shape, const SectionExtent& extent) const;

  /// True when every section is one plane, byte for byte: encode_container() then copies and checks in a single pass
  /// and does not call encode().
  virtual bool verbatim() const { return false; }

  /// Encodes the section into out (at least max_bytes; both spans aligned to 64 bytes). planes: the planes of the
  /// extent in the order layer, part, head, without gaps. Returns the bytes used. Refuses (kInvalid) non-finite input
  /// that the form cannot carry; raw carries everything.
  virtual Result<std::size_t> encode(const ShardShape& shape, const SectionExtent& extent,
                                     std::span<const std::byte> planes, std::span<std::byte> out) const = 0;

  /// Decodes tokens of the planes (layer in extent, part, head in [head_begin, head_end), relative to the shard) from
  /// the section's verified bytes into the sink. kCorrupt when sizes do not fit or scales are not finite; then some
  /// rows may have been written already, and the caller cleans the pages. Never reads outside payload.
  virtual Status decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                        TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const = 0;
};

/// The codec of chunks that a spec names, or a sentence that says what is wrong with it and what there is. Equal specs
/// give codecs that produce and read the same bytes. rotation: see parse_chain() in kernels/chain.h.
Result<std::shared_ptr<const Codec>> make_codec(std::string_view spec, std::string_view rotation = {});

}  // namespace kvern
