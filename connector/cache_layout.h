#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/codec.h"
#include "kernels/kv_shape.h"

namespace kvern {

struct EngineDevice;

/// How K and V lie inside one (page, head), told by the shim; decoded semantically (token, dim).
enum class PagePacking : std::uint8_t {
  kRows,    ///< token rows [K dims | V dims], strides free (GPU backends)
  kCpuVec,  ///< vLLM's CPU attention, `vec`, `vec16`: K transposed [key_dim][page_tokens], then V
            ///< [page_tokens][value_dim]
  kCpuAmx,  ///< vLLM's CPU attention, `amx` (bf16): K [page/16][key_dim/2][16 tokens][2], V
            ///< [value_dim/16][page/2][16][2]
  kOpaque,  ///< unknown layout of known size: whole pages as bytes, lossless only, no sub-head access. Each rank is one
            ///< "head" (head_begin: the rank, model_heads: ranks) and a page is page_tokens * (key_dim + value_dim)
            ///< bytes: its first page_tokens * key_dim bytes travel as keys, the rest as values.
};

/// One layer of the engine's cache. Addresses are of this process, or of its device; nothing is owned.
struct LayerPages {
  std::byte* base = nullptr;        ///< first byte of page 0, head 0
  std::size_t reachable_bytes = 0;  ///< from base: every access is checked against it once, at registration
  std::uint32_t pages = 0;
  std::uint64_t page_stride_bytes = 0;
  std::uint64_t head_stride_bytes = 0;
  std::uint64_t token_stride_bytes = 0;  ///< kRows only
  std::uint64_t value_offset_bytes = 0;  ///< kRows: from a token's K to its V
};

/// The pages of one KV-cache group on this rank.
struct GroupPages {
  std::uint16_t group = 0;
  PagePacking packing = PagePacking::kRows;
  DType dtype = DType::kBFloat16;
  std::uint32_t block_tokens = 0;     ///< tokens of a scheduler block
  std::uint32_t pages_per_block = 1;  ///< kernel blocks per scheduler block: block b is pages [b*r, (b+1)*r)
  std::uint32_t heads = 0;            ///< KV heads on this rank
  std::uint32_t head_begin = 0;       ///< first of them in the model
  std::uint32_t model_heads = 0;
  std::uint32_t layer_begin = 0;   ///< first layer of this rank within the group (pipeline parallel)
  std::uint32_t group_layers = 0;  ///< layers of the group over all ranks
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
  std::vector<LayerPages> layers;
  /// Where the pages are; nullptr: in host memory. On a device they must be kRows, and neither gather() nor PageSink
  /// reaches them: see DeviceGroup.
  std::shared_ptr<const EngineDevice> device = nullptr;
  std::uint32_t page_tokens() const { return block_tokens / pages_per_block; }
  std::size_t row_bytes(Part part) const { return (part == Part::kKey ? key_dim : value_dim) * dtype_bytes(dtype); }
  /// True when every layer has the pages of this block.
  bool has_block(std::uint32_t block_id) const;
  /// kInvalid/kRefused with a sentence: overlapping strides, pages outside of reachable_bytes, dims that the packing
  /// cannot hold, dtype that it does not know.
  Status validate() const;
  /// The shape of a chunk of so many blocks on this rank.
  ShardShape shape(std::uint32_t blocks) const;
};

/// Gathers the blocks into the canonical layout [layer][K|V][head][token][dim] at out (shape(blocks).raw_bytes() bytes,
/// non-temporal stores) and writes the XXH3-64 of each plane (plane_count() of them) in the same pass. has_block() must
/// hold for every id.
void gather(const GroupPages& pages, std::span<const std::uint32_t> block_ids, std::span<std::byte> out,
            std::span<std::uint64_t> plane_checksums);

/// The inverse, one plane piece at a time: writes decoded rows into pages. block_ids[0] begins with chunk token
/// first_token; block id 0 (vLLM's null block) is skipped, and so are tokens, layers and heads that the pages do not
/// hold. After a failed decode the caller must zero the blocks. Layers and heads of write() count from
/// shard_layer_begin and shard_head_begin. pages and block_ids must outlive the sink; has_block() must hold for every
/// id.
class PageSink final : public RowSink {
 public:
  PageSink(const GroupPages& pages, std::span<const std::uint32_t> block_ids, std::uint32_t first_token,
           std::uint32_t shard_layer_begin, std::uint32_t shard_head_begin);
  /// Until then other threads may see the rows late.
  ~PageSink() override;
  PageSink(const PageSink&) = delete;
  PageSink& operator=(const PageSink&) = delete;
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override;
  /// A load that fails has its pages zeroed.
  bool accepts_unverified() const override { return true; }
  void write_hashing(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
                     std::span<const std::byte> rows, Checksum64& checksum) override;
  std::uint32_t preferred_rows() const override;

 private:
  void write_rows(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
                  const std::byte* rows, Checksum64* checksum);

  const GroupPages& pages_;
  std::span<const std::uint32_t> block_ids_;
  std::uint32_t first_token_;
  std::uint32_t shard_layer_begin_;
  std::uint32_t shard_head_begin_;
};

/// Overwrites the blocks (id 0 skipped) with zero bytes, all layers and heads: after a failed load.
void zero_blocks(const GroupPages& pages, std::span<const std::uint32_t> block_ids);

}  // namespace kvern
