// Speed of scoring tokens and of evicting them, beside memcpy of the same run:
//   kernels_evict_bench [--threads N] [--rounds N]
// One layer of 32 query and 8 KV heads, dim 128, bf16, an observation window of 64 rows, at 4,096 and 32,768 tokens;
// select_gather keeps half of 4,096 tokens by given scores and compacts K and V. Prints "kernels.<step>.ms",
// ".gb_per_s" (of K; of K and V for select_gather; as they lie in memory) and ".over_memcpy". Medians over rounds in
// which all take turns: processor time of one thread, or, with more, time by the clock.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/executor.h"
#include "bench/steps.h"
#include "kernels/element.h"
#include "kernels/key_scores.h"
#include "kernels/observation.h"
#include "kernels/selection.h"
#include "kernels/token_scores.h"
#include "kernels/window_scores.h"

namespace {

using namespace kvern;
using namespace kvern::bench;
using namespace kvern::evict;

constexpr std::uint32_t kQueryHeads = 32;
constexpr std::uint32_t kHeads = 8;
constexpr std::uint32_t kDim = 128;
constexpr std::uint32_t kWindow = 64;

/// Rows of normal bf16 numbers.
struct Rows {
  Rows(std::uint32_t heads, std::uint32_t tokens, std::uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    elements.resize(std::size_t{heads} * tokens * kDim);
    for (auto& element : elements) element = to_bfloat16(normal(generator));
    view = HeadRows::contiguous(reinterpret_cast<const std::byte*>(elements.data()), DType::kBFloat16, heads, tokens,
                                kDim);
  }
  std::size_t bytes() const { return elements.size() * sizeof elements[0]; }

  std::vector<std::uint16_t> elements;
  HeadRows view;
};

}  // namespace

int main(int argc, char** argv) {
  std::size_t threads = 1;
  int rounds = 15;
  CLI::App app("Speed of scoring tokens and of evicting them, beside memcpy of the same run.");
  app.add_option("--threads", threads, "threads")->check(CLI::Range(1, 256));
  app.add_option("--rounds", rounds, "rounds; the median is printed")->check(CLI::Range(1, 1000));
  CLI11_PARSE(app, argc, argv);

  std::unique_ptr<ThreadPool> pool;
  if (threads > 1) pool = std::make_unique<ThreadPool>("bench", threads - 1, 1024);
  Executor* executor = pool.get();
  ObservationWorkspace workspace;
  Observation observation;
  std::vector<std::unique_ptr<Rows>> memory;
  const auto rows = [&](std::uint32_t heads, std::uint32_t tokens) -> const Rows& {
    memory.push_back(std::make_unique<Rows>(heads, tokens, static_cast<std::uint32_t>(memory.size())));
    return *memory.back();
  };
  const Rows& queries = rows(kQueryHeads, kWindow);
  std::vector<std::byte> copy;
  std::vector<std::byte> compact_keys;
  std::vector<std::byte> compact_values;
  std::vector<Step> steps;
  for (const std::uint32_t tokens : {4096U, 32768U}) {
    const std::string size = std::to_string(tokens / 1024) + "k";
    const Rows& keys = rows(kHeads, tokens);
    const auto add = [&](const std::string& name, std::function<void()> run) {
      steps.push_back({name + "_" + size, keys.bytes(), std::move(run)});
    };
    const auto observe_keys = [&](bool dispersion) {
      check(observe(queries.view, keys.view, {.columns = {}, .scale = {}, .dispersion = dispersion}, workspace,
                    executor, observation));
    };
    add("memcpy", [&] {
      copy.resize(std::max(copy.size(), keys.bytes()));
      std::memcpy(copy.data(), keys.view.data, keys.bytes());
    });
    add("score_snapkv", [&, observe_keys] {
      observe_keys(false);
      value_of(snapkv_scores(observation, kHeads, Pooling(), executor));
    });
    add("score_cake", [&, observe_keys] {
      observe_keys(true);
      value_of(cake_scores(observation, kHeads, kCakeGamma, Pooling(), executor));
    });
    add("score_windowkv", [&, observe_keys] {
      observe_keys(false);
      value_of(window_scores(observation, WindowRule(), executor));
    });
    add("score_keydiff", [&] { value_of(keydiff_scores(keys.view, executor)); });
    add("score_knorm", [&] { value_of(knorm_scores(keys.view, executor)); });
    if (tokens > 4096) continue;
    const Rows& values = rows(kHeads, tokens);
    const auto scores = std::make_shared<TokenScores>(value_of(knorm_scores(values.view, nullptr)));
    steps.push_back({"select_gather", keys.bytes() + values.bytes(), [&, scores] {
                       const std::uint32_t kept = scores->tokens / 2;
                       const Selection selection = value_of(select_best(*scores, std::span(&kept, 1), 0, executor));
                       compact_keys.resize(gathered_bytes(keys.view, selection));
                       compact_values.resize(gathered_bytes(values.view, selection));
                       check(gather_rows(keys.view, selection, compact_keys, executor));
                       check(gather_rows(values.view, selection, compact_values, executor));
                     }});
  }
  take_turns(steps, rounds, threads > 1 ? kWallTime : kThreadTime);
  const Step* copied = nullptr;
  for (const Step& step : steps) {
    if (step.name.starts_with("memcpy")) copied = &step;
    print_ms(step);
    print_rates(step, *copied);
  }
  return 0;
}
