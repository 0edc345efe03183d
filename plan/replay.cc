#include "plan/replay.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>
#include <utility>

#include "plan/tier_models.h"

namespace kvern::plan {
namespace {

constexpr std::size_t kDram = 0;

/// Where one block of the prompt is served from.
struct Found {
  std::uint32_t block = 0;
  std::size_t tier = kDram;
};

class Replay {
 public:
  Replay(const Trace& trace, const ReplayConfig& config)
      : trace_(trace), config_(config), dram_(config, trace.distinct_blocks) {
    report_.tiers.push_back({.name = "dram"});
    for (const LowerTierModel& tier : config.lower) {
      lower_.emplace_back(tier, trace.distinct_blocks);
      report_.tiers.push_back({.name = tier.name});
    }
    for (const Rung& rung : config.ladder.rungs()) report_.rungs.push_back({.codec_spec = rung.codec_spec});
  }

  ReplayReport run() {
    for (const TraceRequest& request : trace_.requests) serve(request);
    report_.prompt_tokens = trace_.input_tokens;
    report_.dropped_chunks = dram_.dropped();
    for (std::size_t rung = 0; rung < report_.rungs.size(); ++rung) {
      report_.rungs[rung].steps_to = dram_.demotion().figures(0, rung).steps_to;
    }
    if (report_.hit_tokens > 0) report_.mean_error = error_tokens_ / static_cast<double>(report_.hit_tokens);
    return std::move(report_);
  }

 private:
  std::vector<Found> find(const TraceRequest& request) const {
    std::vector<Found> found;
    for (const std::uint32_t block : request.blocks) {
      std::size_t tier = kDram;
      if (!dram_.contains(block)) {
        tier = 1;
        while (tier <= lower_.size() && !lower_[tier - 1].contains(block)) ++tier;
        if (tier > lower_.size()) break;
      }
      found.push_back({block, tier});
    }
    return found;
  }

  void serve(const TraceRequest& request) {
    const std::vector<Found> found = find(request);
    RequestOutcome outcome{.read_bytes = std::vector<double>(report_.tiers.size()), .hit_tokens = 0};
    std::vector<StoredForm> forms(found.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      const auto [block, tier] = found[i];
      const std::uint32_t tokens = tokens_of(trace_, request, i + 1) - tokens_of(trace_, request, i);
      forms[i] = tier == kDram ? dram_.form(block) : lower_[tier - 1].form(block);
      outcome.read_bytes[tier] += tier == kDram ? dram_.bytes(block) : lower_[tier - 1].bytes(block);
      outcome.hit_tokens += tokens;
      report_.tiers[tier].hit_tokens += tokens;
      report_.rungs[forms[i].rung].hit_tokens += tokens;
      error_tokens_ += config_.ladder.rung(forms[i]).error * tokens;
      if (tier != kDram) lower_[tier - 1].read(block);
    }
    for (std::size_t tier = 0; tier < report_.tiers.size(); ++tier) {
      report_.tiers[tier].read_bytes += outcome.read_bytes[tier];
    }
    report_.hit_tokens += outcome.hit_tokens;
    report_.requests.push_back(std::move(outcome));

    // Uses are told from the end of the prompt, as ChunkStore::match() does; what comes up from below and what is new
    // enters in the order of the prompt.
    for (std::size_t i = found.size(); i-- > 0;) {
      if (dram_.contains(found[i].block)) dram_.use(found[i].block);
    }
    std::uint32_t parent = kNoChunk;
    for (std::size_t i = 0; i < request.blocks.size(); ++i) {
      const std::uint32_t block = request.blocks[i];
      if (dram_.contains(block)) {
        if (i >= found.size()) dram_.use(block);
        dram_.link(block, parent);
      } else {
        const StoredForm form = i < found.size() ? forms[i] : config_.ladder.first();
        if (dram_.insert(block, parent, form)) report_.tiers[kDram].written_bytes += dram_.bytes(block);
        if (i >= found.size()) write_through(block, form);
      }
      parent = block;
    }
  }

  void write_through(std::uint32_t block, StoredForm form) {
    const double bytes = config_.block_bytes * config_.ladder.rung(form).bytes_share;
    for (std::size_t tier = 0; tier < lower_.size(); ++tier) {
      report_.tiers[tier + 1].written_bytes += lower_[tier].write(block, form, bytes);
    }
  }

  const Trace& trace_;
  const ReplayConfig& config_;
  DramModel dram_;
  std::vector<LowerModel> lower_;
  ReplayReport report_;
  double error_tokens_ = 0;
};

}  // namespace

Status ReplayConfig::validate() const {
  if (const auto made = make_eviction_policy(policy); !made) return made.error();
  if (Status status = demotion.validate(); !status) return status;
  if (!std::isfinite(block_bytes) || block_bytes <= 0) return {Code::kInvalid, "block_bytes must be above 0"};
  if (std::isnan(dram_bytes) || dram_bytes < 0) return {Code::kInvalid, "dram_bytes must not be negative"};
  for (const LowerTierModel& tier : lower) {
    if (std::isnan(tier.bytes) || tier.bytes < 0) {
      return {Code::kInvalid, "the bytes of tier " + tier.name + " must not be negative"};
    }
  }
  return Status::ok();
}

Result<ReplayReport> replay(const Trace& trace, const ReplayConfig& config) {
  if (const Status status = config.validate(); !status) return failure(status);
  return Replay(trace, config).run();
}

std::uint32_t tokens_of(const Trace& trace, const TraceRequest& request, std::size_t blocks) {
  return static_cast<std::uint32_t>(
      std::min<std::uint64_t>(blocks * std::uint64_t{trace.block_tokens}, request.input_tokens));
}

std::uint64_t belady_hit_tokens(const Trace& trace, std::size_t capacity_blocks) {
  constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();
  // Next use of each block, request by request, from the end.
  std::vector<std::vector<std::size_t>> next_uses(trace.requests.size());
  std::vector<std::size_t> next_use(trace.distinct_blocks, kNever);
  for (std::size_t i = trace.requests.size(); i-- > 0;) {
    for (const std::uint32_t block : trace.requests[i].blocks) {
      next_uses[i].push_back(std::exchange(next_use[block], i));
    }
  }
  using Place = std::tuple<std::size_t, std::size_t, std::uint32_t>;  // next use, position in the prompt, block
  std::set<Place> stored;
  std::vector<Place> place_of(trace.distinct_blocks);
  std::uint64_t hit_tokens = 0;
  std::set<std::uint32_t> own;
  for (std::size_t i = 0; i < trace.requests.size(); ++i) {
    const TraceRequest& request = trace.requests[i];
    const auto is_stored = [&](std::uint32_t block) { return stored.contains(place_of[block]); };
    const auto miss = std::find_if_not(request.blocks.begin(), request.blocks.end(), is_stored);
    hit_tokens += tokens_of(trace, request, static_cast<std::size_t>(miss - request.blocks.begin()));
    for (const std::uint32_t block : request.blocks) stored.erase(place_of[block]);
    // The request's own blocks make room for one another last: its first ones stay if not all fit.
    for (std::size_t position = 0; position < std::min(request.blocks.size(), capacity_blocks); ++position) {
      const std::uint32_t block = request.blocks[position];
      place_of[block] = {next_uses[i][position], position, block};
      stored.insert(place_of[block]);
    }
    while (stored.size() > capacity_blocks) stored.erase(std::prev(stored.end()));
  }
  return hit_tokens;
}

}  // namespace kvern::plan
