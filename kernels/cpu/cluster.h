#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "kernels/cluster.h"

/// Work on one chunk of one head, on one thread, with the best instruction set of the machine.
namespace kvern::cluster {

/// Rows of one head.
struct Rows {
  DType dtype = DType::kFloat32;
  const std::byte* data = nullptr;
  std::size_t stride_bytes = 0;
  std::uint32_t dim = 0;

  Rows from(std::size_t index) const { return {dtype, data + index * stride_bytes, stride_bytes, dim}; }
};

/// The most similar target of a source.
struct Partner {
  float similarity;      ///< cosine; -infinity: there is none
  std::uint32_t target;  ///< number among the targets
};

constexpr std::uint32_t kMaxSources = kMaxChunk / 2;

/// Memory for match_chunk(), 64 bytes aligned; too large for a stack.
struct MatchScratch {
  alignas(64) float sources[kMaxSources * kMaxDim];  ///< [dim][source]
  alignas(64) float targets[kMaxSources * kMaxDim];  ///< [dim][target]
  alignas(64) std::byte elements[kMaxSources * kMaxDim * 2];
  Partner partners[kMaxSources];
};

/// Entries 0, 2, 4 … of the chunk are sources, 1, 3, 5 … targets; fills scratch.partners for each source. Equal
/// similarities go to the lower target. Products of 16-bit elements are exact in fp32, so that it does not matter where
/// they are added fused; those of fp32 elements are rounded before they are added.
void match_chunk(const Rows& keys, std::uint32_t entries, MatchScratch& scratch);

/// Writes the mean of each surviving entry's members, one row of floats after the other. into[i]: the entry that entry
/// i goes to, itself when it survives. weights[i]: what row i counts; of an entry that nobody joins it must be 1.
/// inverses[i], of survivors: 1 / sum of the weights, or 1 where nobody joins.
void average_chunk(const Rows& rows, std::uint32_t entries, const std::uint32_t* into, const float* weights,
                   const float* inverses, float* out);

/// Elements of dtype from rows of floats, saturating: out row i is rows[index[i]].
void gather_rows(const float* rows, std::uint32_t dim, const std::uint32_t* index, std::size_t count, DType dtype,
                 std::byte* out);

}  // namespace kvern::cluster
