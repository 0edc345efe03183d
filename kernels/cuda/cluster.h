#pragma once

#include <cstddef>

#include "base/status.h"
#include "kernels/cluster.h"

struct CUstream_st;

namespace kvern::cluster {

/// Where clusters go, each [head][token]: room for an entry per token, of which entries[head] are used.
struct DeviceClusters {
  float* keys = nullptr;    ///< [head][token][key dim]
  float* values = nullptr;  ///< [head][token][value dim]; not used where value dim is 0
  Members* members = nullptr;
  std::uint32_t* assignment = nullptr;  ///< the entry of each token
  std::uint32_t* entries = nullptr;     ///< [head]
};

/// Bytes of device memory that cuda_compress() works in.
std::size_t cuda_compress_workspace_bytes(const HeadRows& keys, const HeadRows& values, const Options& options);

/// compress() on the GPU: a block per chunk and head, all passes without a host round trip. Means and similarities are
/// bit for bit those of the CPU. All pointers are to memory that the device can reach; workspace is aligned to 256
/// bytes. Queues its work on the stream and returns; neither allocates nor synchronises. kRefused for chunks whose keys
/// do not fit the shared memory of every device (chunk * (dim + 1) above kMaxChunkElements), kInternal when a launch
/// fails; else as compress().
Status cuda_compress(const HeadRows& keys, const HeadRows& values, const Options& options, const DeviceClusters& out,
                     std::byte* workspace, CUstream_st* stream);

/// 96 KiB of fp32, which devices from compute capability 8.0 on have.
constexpr std::size_t kMaxChunkElements = 24576;

}  // namespace kvern::cluster
