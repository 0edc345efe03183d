#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "connector/cache_layout.h"
#include "connector/client.h"
#include "connector/prefix_matcher.h"
#include "connector/transfer_worker.h"

namespace kvern {

/// The shape of the cache that a ProbeEngine plays.
struct ProbeShape {
  PagePacking packing = PagePacking::kRows;
  DType dtype = DType::kBFloat16;
  std::uint32_t layers = 8;
  std::uint32_t heads = 2;
  std::uint32_t head_dim = 128;
  std::uint32_t block_tokens = 32;
  std::uint32_t chunk_blocks = 8;
  std::uint32_t chunks = 8;  ///< pages are made for so many chunks

  std::uint64_t chunk_bytes() const;
  /// A shape whose chunks have about that many bytes: 256 tokens, two heads of 128, layers as needed.
  static ProbeShape of_chunk_bytes(std::uint64_t bytes, PagePacking packing);
};

/// Plays the part of an engine, over the very path that one uses: pages in ordinary memory, a scheduler's client with a
/// matcher, a worker's client with a transfer worker, a namespace of its own ("kvern-probe", with a random fact, so
/// that probes never meet). For `kvernctl doctor`, `kvernctl bench` and the benchmarks. Not thread-safe.
class ProbeEngine {
 public:
  /// Connects both sides and registers layout and namespace; fails with the reason (no daemon, namespace refused, …).
  static Result<std::unique_ptr<ProbeEngine>> start(const ClientConfig& address, const ProbeShape& shape,
                                                    std::uint32_t timeout_ms);

  /// Chunk i gets the contents that seed gives; pages of all chunks.
  void fill_pages(std::uint64_t seed);
  void clear_pages();
  /// True when the pages of chunk i hold what seed gives, to the bit.
  bool pages_equal(std::uint32_t chunk, std::uint64_t seed) const;
  /// Largest difference between the pages of chunk i and what seed gives, relative to the largest magnitude.
  double largest_relative_difference(std::uint32_t chunk, std::uint64_t seed) const;

  struct StoreTimes {
    double gathered_seconds = 0;  ///< until the pages were free again
    double stored_seconds = 0;    ///< until others could read
    std::uint32_t stored_chunks = 0;
    std::string reason;
  };
  /// Stores chunks [first, first+count) of prompt number prompt as one job and waits.
  StoreTimes store(std::uint64_t prompt, std::uint32_t first, std::uint32_t count, const std::string& codec,
                   std::uint32_t timeout_ms);
  /// Tokens of the prompt that the matcher finds (asks until the answer is known); claims stay until release().
  PrefixMatcher::Answer match(std::uint64_t prompt, std::uint32_t chunks);
  /// The same for hashes that hashes() gave: nothing but the look-up itself, for measuring it.
  PrefixMatcher::Answer match_hashes(std::uint64_t prompt, const std::string& joined);
  void release(std::uint64_t prompt);
  struct LoadTimes {
    double seconds = 0;
    bool loaded = false;
    std::string reason;
    std::uint64_t encoded_bytes = 0;
  };
  LoadTimes load(std::uint64_t prompt, std::uint32_t first, std::uint32_t count, std::uint32_t timeout_ms);

  const ProbeShape& shape() const { return shape_; }
  Client& scheduler_client() { return *scheduler_client_; }
  Client& worker_client() { return *worker_client_; }
  /// Block hashes of the first chunks of a prompt, joined (32 bytes each).
  std::string hashes(std::uint64_t prompt, std::uint32_t chunks) const;

 private:
  ProbeEngine(const ProbeShape& shape);
  GroupPages group_pages();
  /// Ends with the last event of the job, or with the time-out.
  std::vector<JobResult> wait_for(std::uint64_t job, std::uint32_t timeout_ms);
  void fill_chunk(std::uint32_t chunk, std::uint64_t seed, std::byte* pages) const;
  std::uint64_t page_bytes() const;

  ProbeShape shape_;
  std::shared_ptr<std::byte[]> pages_;
  std::size_t pages_bytes_ = 0;
  std::shared_ptr<Client> scheduler_client_;
  std::shared_ptr<Client> worker_client_;
  int scheduler_namespace_ = 0;
  int worker_namespace_ = 0;
  std::unique_ptr<PrefixMatcher> matcher_;
  std::unique_ptr<TransferWorker> worker_;
  std::uint64_t next_job_ = 1;
};

}  // namespace kvern
