#include "plan/planner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <tuple>
#include <utility>

namespace kvern::plan {
namespace {

constexpr double kAsGoodAs = 1.02;

Status above_zero(double value, const char* name) {
  if (std::isfinite(value) && value > 0) return Status::ok();
  return {Code::kInvalid, std::string(name) + " must be above 0"};
}

Result<LadderProfile> find_codec(const std::string& name) {
  if (auto profile = find_ladder_profile(name)) return profile;
  std::string known;
  for (const LadderProfile& profile : ladder_profiles()) {
    for (const Rung& rung : profile.rungs) {
      if (rung.codec_spec == name) {
        Rung alone = rung;
        alone.is_part_of_previous = false;
        return LadderProfile{.name = name, .rungs = {std::move(alone)}};
      }
      if (known.find("\"" + rung.codec_spec + "\"") == std::string::npos) known += ", \"" + rung.codec_spec + "\"";
    }
  }
  return failure(Code::kInvalid, "nothing is known of the bytes and the error of codec \"" + name +
                                     "\": use one of exact, balanced, compact" + known);
}

double first_token_seconds(const TraceRequest& request, const RequestOutcome& outcome, const PlanRow& row,
                           const Speeds& speeds) {
  double seconds = static_cast<double>(request.input_tokens - outcome.hit_tokens) / speeds.prefill_tokens_per_second;
  seconds += outcome.read_bytes[0] / speeds.dram_bytes_per_second;
  std::size_t tier = 1;
  const auto add = [&](bool exists, double bytes_per_second, double latency_seconds) {
    if (!exists) return;
    const double bytes = outcome.read_bytes[tier++];
    if (bytes > 0) seconds += latency_seconds + bytes / bytes_per_second;
  };
  add(row.nvme_bytes.has_value(), speeds.nvme_bytes_per_second, speeds.nvme_seconds);
  add(row.remote_bytes.has_value(), speeds.remote_bytes_per_second, speeds.remote_seconds);
  return seconds;
}

void time_first_tokens(const Trace& trace, const Speeds& speeds, PlanRow& row) {
  std::vector<double> seconds;
  seconds.reserve(trace.requests.size());
  double sum = 0;
  for (std::size_t i = 0; i < trace.requests.size(); ++i) {
    seconds.push_back(first_token_seconds(trace.requests[i], row.report.requests[i], row, speeds));
    sum += seconds.back();
  }
  const auto p95 = seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() * 95 / 100);
  std::nth_element(seconds.begin(), p95, seconds.end());
  row.first_token_seconds = sum / static_cast<double>(seconds.size());
  row.first_token_seconds_p95 = *p95;
}

Status run(const Trace& trace, const PlanOptions& options, const LadderProfile& profile, PlanRow& row) {
  auto ladder = Ladder::make(profile, options.max_relative_error);
  if (!ladder) return ladder.error();
  ReplayConfig config{.policy = options.policy,
                      .ladder = std::move(*ladder),
                      .demotion = options.demotion,
                      .block_bytes = options.bytes_per_token * trace.block_tokens,
                      .dram_bytes = static_cast<double>(row.dram_bytes)};
  if (row.nvme_bytes) {
    config.lower.push_back(
        {.name = "nvme", .kind = LowerTierModel::Kind::kLog, .bytes = static_cast<double>(*row.nvme_bytes)});
  }
  if (row.remote_bytes) {
    LowerTierModel remote{.name = "remote", .kind = LowerTierModel::Kind::kLru};
    if (*row.remote_bytes > 0) remote.bytes = static_cast<double>(*row.remote_bytes);
    config.lower.push_back(remote);
  }
  auto report = replay(trace, config);
  if (!report) return report.error();
  row.report = std::move(*report);
  time_first_tokens(trace, options.speeds, row);
  return Status::ok();
}

std::size_t choose(const std::vector<PlanRow>& rows) {
  const auto best = std::ranges::min_element(rows, {}, &PlanRow::first_token_seconds);
  const double enough = best->first_token_seconds * kAsGoodAs;
  const auto cost = [](const PlanRow& row) {
    return std::tuple(row.dram_bytes, row.nvme_bytes.value_or(0), row.report.mean_error, row.first_token_seconds);
  };
  std::size_t chosen = static_cast<std::size_t>(best - rows.begin());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].first_token_seconds <= enough && cost(rows[i]) < cost(rows[chosen])) chosen = i;
  }
  return chosen;
}

std::vector<std::optional<std::uint64_t>> or_none(const std::vector<std::uint64_t>& sizes) {
  if (sizes.empty()) return {std::nullopt};
  return {sizes.begin(), sizes.end()};
}

}  // namespace

Status Speeds::validate() const {
  for (const auto& [value, name] : {std::pair(prefill_tokens_per_second, "prefill_tokens_per_second"),
                                    std::pair(dram_bytes_per_second, "dram_bytes_per_second"),
                                    std::pair(nvme_bytes_per_second, "nvme_bytes_per_second"),
                                    std::pair(remote_bytes_per_second, "remote_bytes_per_second")}) {
    if (Status status = above_zero(value, name); !status) return status;
  }
  if (!(nvme_seconds >= 0) || !(remote_seconds >= 0)) return {Code::kInvalid, "a latency must not be negative"};
  return Status::ok();
}

std::string format_bytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  std::size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < std::size(kUnits); ++unit) bytes /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, bytes == std::floor(bytes) ? "%.0f %s" : "%.1f %s", bytes, kUnits[unit]);
  return text;
}

std::string PlanRow::label() const {
  std::string text = codec + ", DRAM " + format_bytes(static_cast<double>(dram_bytes));
  if (nvme_bytes) text += ", NVMe " + format_bytes(static_cast<double>(*nvme_bytes));
  if (remote_bytes) {
    text += ", remote " + (*remote_bytes == 0 ? "without limit" : format_bytes(static_cast<double>(*remote_bytes)));
  }
  return text;
}

Result<Plan> make_plan(const Trace& trace, const PlanOptions& options) {
  if (Status status = above_zero(options.bytes_per_token, "bytes_per_token"); !status) return failure(status);
  if (const Status status = options.speeds.validate(); !status) return failure(status);
  if (options.dram_bytes.empty()) return failure(Code::kInvalid, "there is no size of the DRAM tier to try");
  if (options.codecs.empty()) return failure(Code::kInvalid, "there is no codec to try");
  Plan plan;
  plan.first_token_seconds_without = static_cast<double>(trace.input_tokens) /
                                     static_cast<double>(trace.requests.size()) /
                                     options.speeds.prefill_tokens_per_second;
  for (const std::string& codec : options.codecs) {
    const auto profile = find_codec(codec);
    if (!profile) return failure(profile.error());
    for (const std::uint64_t dram : options.dram_bytes) {
      for (const auto& nvme : or_none(options.nvme_bytes)) {
        for (const auto& remote : or_none(options.remote_bytes)) {
          PlanRow row{.dram_bytes = dram, .nvme_bytes = nvme, .remote_bytes = remote, .codec = codec, .report = {}};
          if (const Status status = run(trace, options, *profile, row); !status) return failure(status);
          plan.rows.push_back(std::move(row));
        }
      }
    }
  }
  plan.chosen = choose(plan.rows);
  return plan;
}

}  // namespace kvern::plan
