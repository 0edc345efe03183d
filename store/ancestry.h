#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/keys.h"
#include "kernels/container.h"

namespace kvern {

/// Where a chunk stands in its prompt, and whether it holds the block that a prefix ends with.
struct ChunkAncestry {
  ChunkKey key;
  std::uint64_t position = 0;      ///< of its first token
  std::uint64_t end = 0;           ///< behind its last token
  std::uint32_t previous_tag = 0;  ///< ContainerInfo::previous_tag
  bool holds_block = false;

  static ChunkAncestry of(const ContainerInfo& info, const BlockHash& block);
};

/// Which of the chunks must go so that nothing of the prefix, which ends with the block, and nothing that continues it
/// is left: result[i] says it of chunks[i]. The chunks are all that any tier has, in any order; copies of one chunk may
/// be among them.
///
/// Those go that hold the block, and those that follow one that goes. In namespaces where the block was found, so do
/// those further on in their prompt of which it cannot be told what they continue, since no tier has the chunks
/// between: nobody can reach them as things are, and they may be what is to go.
std::vector<bool> continue_prefix(std::span<const ChunkAncestry> chunks, const BlockHash& block);

}  // namespace kvern
