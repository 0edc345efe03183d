// Replays traces and prints the table of hits: "replay.<trace>.<capacity>.<policy> <hits / prompt tokens>".

#include <cstdio>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plan/replay.h"

namespace {

using namespace kvern;
using namespace kvern::plan;

constexpr int kCapacitiesK[] = {1, 2, 4, 8, 16, 32, 64};

Ladder uncompressed() {
  return *Ladder::make({.name = "uncompressed", .rungs = {{.codec_spec = "raw", .bytes_share = 1}}});
}

/// The shipped ladder down to this many rungs.
Ladder shipped(std::size_t rungs) {
  LadderProfile profile = *find_ladder_profile("compact");
  profile.rungs.resize(rungs);
  return *Ladder::make(std::move(profile));
}

/// "int8", "int4", "centroid2x", "centroid4x": the rungs of the shipped ladder.
constexpr const char* kRungNames[] = {"int8", "int4", "centroid2x", "centroid4x"};

void run(const std::string& path) {
  const auto trace = load_trace(path);
  if (!trace) throw std::runtime_error(trace.error().message());
  std::string name = std::filesystem::path(path).stem().string();
  if (name.ends_with("_trace")) name.resize(name.size() - std::string("_trace").size());
  const auto share = [&](std::uint64_t tokens) {
    return static_cast<double>(tokens) / static_cast<double>(trace->input_tokens);
  };
  double worst = 1;
  for (const int k : kCapacitiesK) {
    const std::string prefix = "replay." + name + "." + std::to_string(k) + "k.";
    const double capacity = 1024.0 * k;
    const auto hits = [&](const char* key, std::string_view policy, Ladder ladder) {
      const auto report = replay(
          *trace,
          {.policy = std::string(policy), .ladder = std::move(ladder), .block_bytes = 1, .dram_bytes = capacity});
      if (!report) throw std::runtime_error(report.error().message());
      std::printf("%s%s %.4f\n", prefix.c_str(), key, report->hit_rate());
      if (std::string(key).starts_with("ladder")) {
        for (std::size_t rung = 0; rung < report->rungs.size(); ++rung) {
          std::printf("%s%s.%s %.4f\n", prefix.c_str(), key, kRungNames[rung], share(report->rungs[rung].hit_tokens));
        }
        std::printf("%s%s.mean_error %.4f\n", prefix.c_str(), key, report->mean_error);
      }
      std::fflush(stdout);
      return report->hit_rate();
    };
    const double lru = hits("lru", "lru", uncompressed());
    const double policy = hits("policy", kDefaultEvictionPolicy, uncompressed());
    worst = std::min(worst, policy - lru);
    hits("s3fifo", "s3fifo", uncompressed());
    hits("tinylfu", "tinylfu", uncompressed());
    hits("ladder_int8", kDefaultEvictionPolicy, shipped(1));
    hits("ladder_int4", kDefaultEvictionPolicy, shipped(2));
    hits("ladder_full", kDefaultEvictionPolicy, shipped(4));
    std::printf("%sbelady %.4f\n", prefix.c_str(),
                share(belady_hit_tokens(*trace, 1024 * static_cast<std::size_t>(k))));
  }
  std::printf("replay.%s.worst_policy_minus_lru %.4f\n", name.c_str(), worst);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "Usage: replay_bench TRACE.jsonl ...\n");
    return 2;
  }
  try {
    for (int i = 1; i < argc; ++i) run(argv[i]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "replay_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
