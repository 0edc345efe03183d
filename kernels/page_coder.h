#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/executor.h"
#include "base/status.h"
#include "kernels/codec.h"
#include "kernels/container.h"
#include "kernels/paged_cache.h"

namespace kvern {

/// Blocks that rows of a chunk go to: block_ids[i] gets the tokens of block first_block + i of the chunk. Block 0 is
/// the engine's null block and left alone.
struct PageTarget {
  std::span<const std::uint32_t> block_ids;
  std::uint32_t first_block = 0;
};

/// Codes chunks between pages on a device and host memory, so that encoded bytes cross the bus. Calls return when the
/// device is done. has_block() must hold for every block id. For one thread at a time; each has a stream of its own.
class PageCoder {
 public:
  virtual ~PageCoder() = default;

  /// Whether encode() and decode() know the chain; others cross the bus raw.
  virtual bool codes(const Codec& codec) const = 0;

  /// Gathers the blocks and encodes them: the sections of codec.plan(cache.shape(blocks)), each of max_bytes, in that
  /// order to sections, every one from a multiple of 64 on, gaps zeroed. The same bytes as on the CPU. kInvalid when
  /// the form cannot carry a value (NaN, infinities).
  virtual Status encode(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const Codec& codec,
                        std::span<std::byte> sections) = 0;

  /// Decodes what the container (of which bytes are the whole) holds for the target's blocks, layers and heads. While
  /// the device works meanwhile() runs here; pages are written only if it returns ok, and kCorrupt comes back, with
  /// pages untouched, for what encode() cannot have written.
  virtual Status decode(const PagedCache& cache, const PageTarget& target, const ContainerReader& container,
                        std::span<const std::byte> bytes, const std::function<Status()>& meanwhile) = 0;

  /// Raw rows in the canonical layout of cache.shape(blocks).
  virtual Status gather(const PagedCache& cache, std::span<const std::uint32_t> block_ids,
                        std::span<std::byte> canonical) = 0;
  /// Raw rows in the canonical layout of shape, whose tokens are those of the target's blocks alone, to the pages.
  virtual Status scatter(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const ShardShape& shape,
                         std::span<const std::byte> canonical) = 0;
  /// Zero bytes to the blocks, all layers and heads.
  virtual Status zero(const PagedCache& cache, std::span<const std::uint32_t> block_ids) = 0;

  /// Bytes that have crossed the bus so far, small things included.
  struct Moved {
    std::uint64_t to_host = 0;
    std::uint64_t to_device = 0;
  };
  virtual Moved moved() const = 0;
};

/// A container of the blocks, made on the device where the coder knows the chain and on the CPU elsewhere: the same
/// bytes. gathered is asked once the pages are not read any more; what it refuses is not finished. executor, where
/// given, shares the work of checksums.
Result<std::size_t> encode_pages(PageCoder& coder, const PagedCache& cache, std::span<const std::uint32_t> block_ids,
                                 const Codec& codec, const ContainerInfo& info, std::span<std::byte> out,
                                 const std::function<Status()>& gathered, Executor* executor);

/// Verifies and decodes what the container (of which bytes are the whole) holds of the target into the pages, on the
/// device where the coder knows the chain. Pages are written only after verification.
Status decode_pages(PageCoder& coder, const PagedCache& cache, const PageTarget& target,
                    const ContainerReader& container, std::span<const std::byte> bytes, Executor* executor);

}  // namespace kvern
