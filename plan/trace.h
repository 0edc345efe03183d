#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "base/status.h"

namespace kvern::plan {

struct TraceRequest {
  std::int64_t timestamp_ms = 0;
  std::uint32_t input_tokens = 0;
  std::uint32_t output_tokens = 0;
  std::vector<std::uint32_t> blocks = {};  ///< numbered from 0 in the order of appearance
};

/// Requests in the order of their arrival. A block's number names the whole prompt up to its end.
struct Trace {
  std::vector<TraceRequest> requests = {};
  std::uint32_t block_tokens = 0;
  std::uint32_t distinct_blocks = 0;
  std::uint64_t input_tokens = 0;  ///< of all requests
};

inline constexpr std::uint32_t kMooncakeBlockTokens = 512;

/// Reads a trace in the Mooncake format (docs/planner.md). kInvalid with the number of the line that is malformed.
Result<Trace> read_trace(std::istream& in, std::uint32_t block_tokens = kMooncakeBlockTokens);
/// kNotFound when the file cannot be read.
Result<Trace> load_trace(const std::string& path, std::uint32_t block_tokens = kMooncakeBlockTokens);

}  // namespace kvern::plan
