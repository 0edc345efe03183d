#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/keys.h"
#include "base/status.h"
#include "kernels/codec.h"
#include "kernels/kv_shape.h"

namespace kvern {

class Executor;

/// The container format (docs/format.md): header, codec chain, block hashes, section table, sections aligned to 64
/// bytes; little-endian, versioned, every section under XXH3-64, the header (with all tables) under one more.

/// Newest container version. Every older one can be read, and the oldest that can say what is to be said is written: 1,
/// or 2 for chunks with layer_slots.
inline constexpr std::uint32_t kContainerVersion = 2;

/// What a container says of itself. Everything here is covered by the header checksum.
struct ContainerInfo {
  ChunkKey key;
  ShardShape shape;
  std::uint32_t block_tokens = 0;       ///< tokens per block; blocks * block_tokens == shape.tokens
  std::uint32_t group_layers = 0;       ///< layers of the whole group, over all ranks
  std::uint32_t model_heads = 0;        ///< KV heads of the whole model, over all ranks
  std::uint64_t position = 0;           ///< position of the chunk's first token in the prompt
  std::uint32_t previous_tag = 0;       ///< block_tag() of the block before the chunk; 0: there is none, or not known
  std::vector<BlockHash> block_hashes;  ///< one per block, the last is key.last_block
  std::string codec_spec;               ///< canonical
  std::uint32_t lossy_generations = 0;  ///< how many lossy encodings lie behind these bytes
  /// Of a compact cache whose layers keep different numbers of slots: how many each layer of the group keeps, a
  /// multiple of block_tokens. Empty: the chunk is not of such a cache.
  std::vector<std::uint32_t> layer_slots = {};
  /// For encode_container() alone, and not kept: tokens at the end that steps which make one row of several leave as
  /// they are.
  std::uint32_t exact_tail = 0;
};

struct SectionInfo {
  SectionExtent extent;
  std::uint64_t offset = 0;  ///< from the start of the container, multiple of 64
  std::uint64_t bytes = 0;
  std::uint64_t checksum = 0;
};

/// Upper bound of the container's size for this codec, shape and number of blocks. 0 when the codec does not accept the
/// shape.
std::size_t container_max_bytes(const Codec& codec, const ContainerInfo& info);

/// Number of plane checksums of the canonical input: one per plane in the order layer, part, head (planes of no bytes
/// too), as the writer saw them while gathering.
std::size_t plane_count(const ShardShape& shape);

/// Encodes a shard from the canonical layout into out and returns the container's size. Each plane of the input is
/// verified against plane_checksums (empty: not verified) in the pass that encodes it; kCorrupt when one differs, so
/// that a writer which scribbles over its staging cannot store torn bytes under a good checksum.
/// Single-threaded: the caller parallelises over chunks.
Result<std::size_t> encode_container(const Codec& codec, const ContainerInfo& info,
                                     std::span<const std::byte> canonical,
                                     std::span<const std::uint64_t> plane_checksums, std::span<std::byte> out);

/// Where the first section of a container begins.
std::size_t container_header_bytes(const Codec& codec, const ContainerInfo& info);

/// Makes a container of sections that somebody else has encoded in place: those of codec.plan(info.shape), each of
/// max_bytes, one behind the other from container_header_bytes() on, aligned to 64 bytes, gaps zeroed. Takes their
/// checksums (which are the first that anybody takes) and writes the header; returns the container's size.
/// executor, where given, shares the work.
Result<std::size_t> seal_container(const Codec& codec, const ContainerInfo& info, std::span<std::byte> out,
                                   Executor* executor);

/// What the start of a container says of it, without a look at the rest: nothing is verified but that it can be read.
/// nullopt when it cannot, since it is damaged, of a newer version or cut off before the last block hash.
std::optional<ContainerInfo> peek_container_info(std::span<const std::byte> start);

/// A parsed container over memory that it does not own. Parsing checks the header checksum and all sizes and offsets;
/// sections are verified when they are decoded. Bad bytes give kCorrupt, a newer version kRefused ("… written by a
/// newer Kvern …"). Safe on any input.
class ContainerReader {
 public:
  static Result<ContainerReader> parse(std::span<const std::byte> bytes);

  const ContainerInfo& info() const { return info_; }
  const Codec& codec() const { return *codec_; }
  std::span<const SectionInfo> sections() const { return sections_; }
  std::size_t size_bytes() const { return size_bytes_; }

  /// Verifies and decodes, section by section, the planes of layers [layer_begin, layer_end) and heads
  /// [head_begin, head_end) — numbered as in the model, intersected with what this shard holds — for the tokens.
  /// kCorrupt names the section. The sink gets rows of verified sections only, unless it accepts_unverified().
  Status decode(std::uint32_t layer_begin, std::uint32_t layer_end, std::uint32_t head_begin, std::uint32_t head_end,
                TokenRange tokens, RowSink& sink) const;
  /// Verifies every section without decoding. executor, where given, shares the work.
  Status verify(Executor* executor = nullptr) const;
  /// Demotion that encodes nothing: writes the container of the base that the codec's sections begin with (see
  /// kernels/demote.h) and returns its size. Verifies what it reads. kRefused when the codec has no base; kInvalid when
  /// out is smaller than container_max_bytes() of the base.
  Result<std::size_t> write_base(std::span<std::byte> out) const;

 private:
  Status copy_hashing(std::size_t section, TokenRange tokens, RowSink& sink) const;

  std::span<const std::byte> bytes_;
  ContainerInfo info_;
  std::shared_ptr<const Codec> codec_;
  std::vector<SectionInfo> sections_;
  std::size_t size_bytes_ = 0;
};

}  // namespace kvern
