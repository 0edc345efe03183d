#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "plan/trace.h"
#include "store/demotion.h"
#include "store/ladder.h"

namespace kvern::plan {

/// A tier below DRAM, as the replay sees it.
struct LowerTierModel {
  enum class Kind {
    kLog,  ///< the oldest leaves, unless it was read since it was written: the NVMe log
    kLru,  ///< a cache of its own, such as Redis; without a limit, such as S3
  };
  std::string name;
  Kind kind = Kind::kLog;
  double bytes = std::numeric_limits<double>::infinity();
};

struct ReplayConfig {
  std::string policy;  ///< of the DRAM tier
  Ladder ladder;
  DemotionConfig demotion = {};
  double block_bytes = 1;  ///< raw bytes of one block of the trace
  double dram_bytes = 0;
  std::vector<LowerTierModel> lower = {};  ///< fastest first; each gets every chunk when it is stored

  Status validate() const;
};

struct ReplayTierFigures {
  std::string name;
  std::uint64_t hit_tokens = 0;
  double read_bytes = 0;
  double written_bytes = 0;
};

struct ReplayRungFigures {
  std::string codec_spec;
  std::uint64_t hit_tokens = 0;
  std::uint64_t steps_to = 0;  ///< chunks that stepped down to it
};

/// What one request found.
struct RequestOutcome {
  std::vector<double> read_bytes;  ///< by tier, DRAM first
  std::uint32_t hit_tokens = 0;
};

struct ReplayReport {
  std::uint64_t prompt_tokens = 0;
  std::uint64_t hit_tokens = 0;
  std::vector<ReplayTierFigures> tiers;  ///< DRAM first
  std::vector<ReplayRungFigures> rungs;
  std::uint64_t dropped_chunks = 0;  ///< that left DRAM
  double mean_error = 0;             ///< of the tokens that were found
  std::vector<RequestOutcome> requests;

  double hit_rate() const { return static_cast<double>(hit_tokens) / static_cast<double>(prompt_tokens); }
};

/// Serves a trace from an empty store that decides as the daemon does: the same eviction policy, the same ladder. Time
/// is that of the trace, and takes none. A request finds the longest stored prefix of its blocks, in whichever tier,
/// and then stores all of them. kInvalid when the configuration is not valid.
Result<ReplayReport> replay(const Trace& trace, const ReplayConfig& config);

/// The tokens that a store of so many raw blocks would find if it knew the future (Belady: whoever is used again last
/// leaves, and of those the end of a prompt first). Every block is stored.
std::uint64_t belady_hit_tokens(const Trace& trace, std::size_t capacity_blocks);

/// The tokens of the first so many blocks of a request.
std::uint32_t tokens_of(const Trace& trace, const TraceRequest& request, std::size_t blocks);

}  // namespace kvern::plan
