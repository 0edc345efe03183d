#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/kv_shape.h"
#include "kernels/plane_form.h"

namespace kvern {
class Executor;
}

/// CentroidKV (arXiv 2506.11418): similar neighbouring keys of a KV head become one centroid, and their values with
/// them. Chunked soft matching: a chunk's entries alternate between sources (even) and targets (odd), every source
/// knows its most similar target, and the best pairs are merged. The paper's constants are not public; those here are
/// ours.
namespace kvern::cluster {

struct Options {
  /// Entries that are matched with one another: even, 2 to kMaxChunk. Averaged rotary keys of distant tokens cancel.
  std::uint32_t chunk = 64;
  /// The first and the last tokens stay as they are: attention sinks are unlike everything else, and the newest tokens
  /// may still be rolled back.
  std::uint32_t sinks = 4;
  std::uint32_t recent = 128;
  /// r: merges in a full chunk, one number per pass, each 0 to chunk / 2; a shorter chunk gets its share.
  std::vector<std::uint32_t> merges = {32};
  /// Pairs whose cosine is lower are not merged.
  float min_similarity = -std::numeric_limits<float>::infinity();

  Status validate() const;
};

constexpr std::uint32_t kMaxChunk = 256;
constexpr std::uint32_t kMaxPasses = 8;
constexpr std::uint32_t kMaxDim = 256;

/// Merges per pass that leave a share `keep` (0 to 1) of a chunk: as few passes as can, since a pass halves at most.
std::vector<std::uint32_t> merges_for(double keep, std::uint32_t chunk);

/// What a centroid stands for.
struct Members {
  std::uint32_t count = 1;     ///< N, how many tokens; attention adds ln N to the logit
  std::uint32_t position = 0;  ///< the token at whose place the entry stands
  std::uint32_t first = 0;     ///< lowest and highest token
  std::uint32_t last = 0;
  bool operator==(const Members&) const = default;
};

/// The entries of one KV head in the order of their positions.
struct HeadClusters {
  std::uint32_t entries = 0;
  std::span<const float> keys;    ///< [entry][key dim]: means of the members
  std::span<const float> values;  ///< [entry][value dim]
  std::span<const Members> members;
  std::span<const std::uint32_t> assignment;  ///< the entry of every token; empty in the streaming form
};

/// Entries of several heads, with the memory that compress() works in: use it again to save allocations. Heads may
/// have different numbers of entries. Not thread-safe.
class Clusters {
 public:
  Clusters();
  ~Clusters();
  Clusters(Clusters&&) noexcept;
  Clusters& operator=(Clusters&&) noexcept;

  std::uint32_t heads() const;
  /// Valid until the clusters change.
  HeadClusters head(std::uint32_t head) const;

  struct Storage;

 private:
  friend Status compress(const HeadRows&, const HeadRows&, const Options&, Clusters&, Executor*);
  std::unique_ptr<Storage> storage_;
};

/// Clusters all heads; compact form: centroids and counts. values.dim may be 0 (a cache of keys alone). Tokens between
/// sinks and recent ones are cut into chunks in order, once per pass; keys that are zero, not finite or longer than a
/// float can say are never merged. With nothing to merge every entry is the token itself, bit for bit. Bitwise equal
/// for every executor and instruction set. kInvalid for options that validate() refuses, keys and values that differ in
/// heads, tokens or dtype, opaque bytes and dimensions above kMaxDim.
Status compress(const HeadRows& keys, const HeadRows& values, const Options& options, Clusters& out,
                Executor* executor);

/// Restore form: tokens of one head, each with its centroid's row (dim elements of dtype, saturating, without gaps).
/// Attention over them equals attention over the centroids with ln N. entry_rows: fp32 rows [entry][dim] as in
/// HeadClusters; assignment: that of the wanted tokens.
void restore_rows(std::span<const float> entry_rows, std::uint32_t dim, std::span<const std::uint32_t> assignment,
                  DType dtype, std::byte* out);

/// The streaming form: entries = sinks | body | recent. Tokens are appended as they come; when the recent part is a
/// chunk longer than it has to be, its oldest chunk moves to the body and is clustered; when the body then exceeds its
/// budget, the oldest entries of the body, which were not clustered again for longest, are matched once more with their
/// counts. Cost per token is bounded.
struct OnlineOptions {
  Options clustering;
  /// Entries that the body may hold; at least one chunk.
  std::uint32_t body_entries = 1024;

  Status validate() const;
};

class OnlineClusters {
 public:
  /// options must be valid.
  OnlineClusters(OnlineOptions options, std::uint32_t heads, std::uint32_t key_dim, std::uint32_t value_dim);
  ~OnlineClusters();

  /// Appends tokens of all heads. kInvalid, and nothing done, for shapes other than the constructor's.
  Status append(const HeadRows& keys, const HeadRows& values, Executor* executor);
  std::uint32_t tokens() const;
  /// Tokens that can still be taken back, since they are not clustered yet.
  std::uint32_t recent_tokens() const;
  /// Valid until the next append().
  HeadClusters head(std::uint32_t head) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvern::cluster
