// Speed of merging layers and of clustering tokens, beside memcpy of the same run:
//   kernels_merge_cluster_bench [--tokens N] [--threads N] [--rounds N]
// 8 KV heads, dim 128, bf16. merge_minicache merges one part of two layers, restore_minicache writes both back;
// match_centroid finds the partners of the keys of one layer in windows of 64, cluster_centroid finds them and averages
// K and V. Prints "kernels.<step>.ms", ".gb_per_s" (of the rows that the step stands for: both layers; the keys; K and
// V) and ".over_memcpy". Medians over rounds in which all take turns: processor time of one thread, or, with more, time
// by the clock.

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
#include "base/parallel.h"
#include "bench/steps.h"
#include "kernels/cluster.h"
#include "kernels/cpu/cluster.h"
#include "kernels/element.h"
#include "kernels/merge.h"

namespace {

using namespace kvern;
using namespace kvern::bench;

constexpr std::uint32_t kHeads = 8;
constexpr std::uint32_t kDim = 128;
constexpr std::uint32_t kChunk = 64;

}  // namespace

int main(int argc, char** argv) {
  std::uint32_t tokens = 4096;
  std::size_t threads = 1;
  int rounds = 15;
  CLI::App app("Speed of merging layers and of clustering tokens, beside memcpy of the same run.");
  app.add_option("--tokens", tokens, "tokens")->check(CLI::Range(64, 131072));
  app.add_option("--threads", threads, "threads")->check(CLI::Range(1, 256));
  app.add_option("--rounds", rounds, "rounds; the median is printed")->check(CLI::Range(1, 1000));
  CLI11_PARSE(app, argc, argv);

  std::unique_ptr<ThreadPool> pool;
  if (threads > 1) pool = std::make_unique<ThreadPool>("bench", threads - 1, 1024);
  Executor* executor = pool.get();
  const std::size_t rows = std::size_t{kHeads} * tokens;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> x(rows * kDim);
  std::vector<std::uint16_t> y(rows * kDim);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float value = normal(generator);
    x[i] = to_bfloat16(value);
    y[i] = to_bfloat16(value + normal(generator) / 2);
  }
  const auto view = [&](const std::vector<std::uint16_t>& elements) {
    return HeadRows::contiguous(reinterpret_cast<const std::byte*>(elements.data()), DType::kBFloat16, kHeads, tokens,
                                kDim);
  };
  std::vector<std::uint16_t> directions(x.size());
  std::vector<std::uint16_t> out(2 * x.size());
  std::vector<float> x_lengths(rows);
  std::vector<float> y_lengths(rows);
  std::vector<float> angles(rows);
  const auto bytes = [](std::vector<std::uint16_t>& elements) { return reinterpret_cast<std::byte*>(elements.data()); };
  const merge::MergedRows merged{bytes(directions), DType::kBFloat16, x_lengths.data(), y_lengths.data(),
                                 angles.data()};
  check(merge::merge_layers(view(x), view(y), 0.6F, merged, executor));
  cluster::Options options;
  cluster::Clusters clusters;

  const std::size_t layer = x.size() * sizeof x[0];
  std::vector<Step> steps;
  steps.push_back({"memcpy", 2 * layer, [&] {
                     std::memcpy(bytes(out), x.data(), layer);
                     std::memcpy(bytes(out) + layer, y.data(), layer);
                   }});
  steps.push_back(
      {"merge_minicache", 2 * layer, [&] { check(merge::merge_layers(view(x), view(y), 0.6F, merged, executor)); }});
  steps.push_back({"restore_minicache", 2 * layer, [&] {
                     check(merge::restore_rows(view(directions), x_lengths, bytes(out), executor));
                     check(merge::restore_rows(view(directions), y_lengths, bytes(out) + layer, executor));
                   }});
  steps.push_back(
      {"match_centroid", layer, [&] {
         parallel_for(executor, kHeads, [&](std::size_t head) {
           const auto scratch = std::make_unique_for_overwrite<cluster::MatchScratch>();
           const HeadRows keys = view(x);
           for (std::uint32_t token = 0; token + kChunk <= tokens; token += kChunk) {
             cluster::match_chunk({keys.dtype, keys.row(head, token), keys.token_stride_bytes, kDim}, kChunk, *scratch);
           }
         });
       }});
  steps.push_back({"cluster_centroid", 2 * layer,
                   [&] { check(cluster::compress(view(x), view(y), options, clusters, executor)); }});

  take_turns(steps, rounds, threads > 1 ? kWallTime : kThreadTime);
  for (const Step& step : std::span(steps).subspan(1)) {  // kernels_bench prints memcpy
    print_ms(step);
    print_rates(step, steps.front());
  }
  return 0;
}
