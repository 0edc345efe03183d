#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "plan/replay.h"

namespace kvern::plan {

/// How fast things are. The defaults are those of one engine on a server with an 80 GB GPU, PCIe 4 NVMe and a 25 Gbit/s
/// network; give your own.
struct Speeds {
  double prefill_tokens_per_second = 10'000;
  double dram_bytes_per_second = 20e9;
  double nvme_bytes_per_second = 5e9;
  double remote_bytes_per_second = 2.5e9;
  /// Until the first byte of a request's chunks comes.
  double nvme_seconds = 0.0005;
  double remote_seconds = 0.005;
  Status validate() const;
};

struct PlanOptions {
  double bytes_per_token = 0;
  std::vector<std::uint64_t> dram_bytes;
  std::vector<std::uint64_t> nvme_bytes;    ///< empty: no such tier
  std::vector<std::uint64_t> remote_bytes;  ///< empty: no such tier; 0: without a limit
  /// Ladder profiles, or single codec chains that a profile has as a rung.
  std::vector<std::string> codecs;
  double max_relative_error = 1;
  std::string policy{kDefaultEvictionPolicy};
  DemotionConfig demotion = {};
  Speeds speeds = {};
};

/// One configuration, and what the trace finds in it.
struct PlanRow {
  std::uint64_t dram_bytes = 0;
  std::optional<std::uint64_t> nvme_bytes;
  std::optional<std::uint64_t> remote_bytes;
  std::string codec;
  ReplayReport report;
  double first_token_seconds = 0;  ///< mean
  double first_token_seconds_p95 = 0;

  std::string label() const;
};

struct Plan {
  std::vector<PlanRow> rows;
  std::size_t chosen = 0;
  double first_token_seconds_without = 0;  ///< when everything is computed
};

/// Replays the trace in every combination of the options. Of the configurations whose mean time to first token is
/// within 2 % of the best, the one with the least DRAM is chosen, then NVMe, then error. Time to first token: the bytes
/// that are read at the speed of their tier, one tier after another, and the rest of the prompt computed; no queueing.
/// kInvalid when an option means nothing.
Result<Plan> make_plan(const Trace& trace, const PlanOptions& options);

void print_plan(const Trace& trace, const Plan& plan, std::ostream& out);
/// Hits by tier of each configuration, as SVG.
void write_chart(const Plan& plan, std::ostream& out);

/// "1.5 GiB".
std::string format_bytes(double bytes);

}  // namespace kvern::plan
