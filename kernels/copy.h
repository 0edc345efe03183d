#pragma once

#include <cstddef>
#include <cstdint>

namespace kvern {

/// Copies between areas that do not overlap, with non-temporal stores where the copy is long enough to gain by them:
/// the destination is neither read first nor left in the cache. For bytes that this core does not read again soon. The
/// stores are visible to other threads and processes, in order, when it returns.
void stream_copy(void* destination, const void* source, std::size_t bytes);

/// stream_copy() without its fence, for many pieces in a row: nobody else may look at the bytes before stream_fence().
void stream_copy_unfenced(void* destination, const void* source, std::size_t bytes);
/// Makes all non-temporal stores of this thread visible to others before whatever it stores next.
void stream_fence();

/// stream_copy() that returns the XXH3-64 of the bytes that it wrote. Each source byte is read once, so what was hashed
/// is what was stored, even while somebody scribbles over the source.
std::uint64_t stream_copy_checksum(void* destination, const void* source, std::size_t bytes);

}  // namespace kvern
