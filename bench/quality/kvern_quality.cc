// What a method costs in attention output, on real keys, values and queries:
//   kvern_quality FILE METHOD ...
// FILE is one that capture.py wrote. A METHOD is a codec chain ("int8", "centroid | int4"), applied to stored chunks of
// 256 tokens; or an eviction, "NAME(SHARE)", "NAME(SHARE) | CHAIN" with the survivors in a chain, where SHARE is the
// share of the raw bytes that the whole is to have, positions of the survivors included ("snapkv(25%) | int4").
//
// Prints one JSON object per method: "bytes", the share of the raw bytes (containers with all their metadata), and
// "error", the mean over the layers of |o' - o| / |o|, where o is the attention output of the positions after the
// prompt over the prompt and their own exact keys and values, and o' the same over what the method left of the prompt;
// "first" and "worst" are the errors of the first and the worst layer. A method that cannot be made gives "refused".

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "base/executor.h"
#include "base/parallel.h"
#include "kernels/attend.h"
#include "kernels/cascade.h"
#include "kernels/container.h"
#include "kernels/head_budgets.h"
#include "kernels/heavy_hitters.h"
#include "kernels/key_scores.h"
#include "kernels/layer_budgets.h"
#include "kernels/observation.h"
#include "kernels/rope.h"
#include "kernels/selection.h"
#include "kernels/token_scores.h"
#include "kernels/window_scores.h"
#include "tests/golden_vectors/safetensors.h"

namespace {

using namespace kvern;
using namespace kvern::evict;
using golden::Tensor;
using golden::Tensors;

constexpr std::uint32_t kChunk = 256;
constexpr std::uint32_t kBlock = 16;
/// Observation window of SnapKV, CAKE and the rest; WindowKV's own is half of it.
constexpr std::uint32_t kWindow = 32;
constexpr std::uint32_t kSinks = 4;
/// A compact cache knows the position of every entry.
constexpr double kPositionBytes = 4;

void check(const Status& status) {
  if (!status) throw std::runtime_error(status.to_string());
}
template <typename T>
T check(Result<T> result) {
  check(status_of(result));
  return *std::move(result);
}

/// Everything that capture.py wrote, and what full attention makes of it.
struct Text {
  explicit Text(const std::string& path) : tensors(check(golden::read_safetensors(path))) {
    layers = static_cast<std::uint32_t>(tensors.at("shape").integer(0));
    tokens = static_cast<std::uint32_t>(tensors.at("shape").integer(1));
    const auto& at = tensors.at("positions");
    for (std::size_t i = 0; i < at.size(); ++i) query_positions.push_back(static_cast<std::int32_t>(at.integer(i)));
    const HeadRows first = rows('K', 0);
    heads = first.heads;
    dim = first.dim;
    for (std::uint32_t token = 0; token < first.tokens; ++token) {
      positions.push_back(static_cast<std::int32_t>(token));
    }
  }

  HeadRows rows(char part, std::uint32_t layer) const {
    return tensors.at(std::string(1, part) + "_" + std::to_string(layer)).head_rows();
  }
  /// Rows of the prompt.
  HeadRows prompt(char part, std::uint32_t layer) const {
    HeadRows all = rows(part, layer);
    all.tokens = tokens;
    return all;
  }
  /// The last `count` queries of the prompt.
  HeadRows last_queries(std::uint32_t layer, std::uint32_t count) const {
    HeadRows all = rows('Q', layer);
    all.data += (tokens - count) * all.token_stride_bytes;
    all.tokens = count;
    return all;
  }
  HeadRows following_queries(std::uint32_t layer) const {
    HeadRows all = rows('Q', layer);
    all.data += tokens * all.token_stride_bytes;
    all.tokens -= tokens;
    return all;
  }
  /// How the model turns its keys, for chains with an unrotate step.
  std::string rotation() const {
    rope::Parameters parameters;
    parameters.theta = tensors.at("rope_theta").value(0);
    parameters.rotary_dim = dim;
    return parameters.to_string();
  }
  double raw_bytes() const { return 2.0 * layers * heads * tokens * dim * 2; }

  Tensors tensors;
  std::uint32_t layers = 0, tokens = 0, heads = 0, dim = 0;
  std::vector<std::int32_t> positions, query_positions;
};

/// What is left of the prompt in one layer: bf16 rows, per head.
struct Compact {
  std::vector<std::vector<std::byte>> keys, values;
  std::vector<std::uint32_t> entries;
};

struct Outcome {
  double bytes = 0;
  std::vector<Compact> layers;
};

std::vector<float> attend_layer(const Text& text, std::uint32_t layer, const Compact* compact, Executor* executor) {
  std::vector<std::vector<AttendSegment>> segments(text.heads);
  const HeadRows keys = text.rows('K', layer);
  const HeadRows values = text.rows('V', layer);
  for (std::uint32_t head = 0; head < text.heads; ++head) {
    AttendSegment all{keys.tokens, AttendRows::of(keys, head), AttendRows::of(values, head), nullptr,
                      text.positions.data()};
    if (compact != nullptr) {
      const auto rows = [&](const std::vector<std::byte>& bytes) {
        return AttendRows{DType::kBFloat16, bytes.data(), text.dim * 2};
      };
      segments[head].push_back({compact->entries[head], rows(compact->keys[head]), rows(compact->values[head])});
      all.keys.data += text.tokens * all.keys.stride_bytes;
      all.values.data += text.tokens * all.values.stride_bytes;
      all.positions += text.tokens;
      all.entries -= text.tokens;
    }
    segments[head].push_back(all);
  }
  const std::vector<std::span<const AttendSegment>> heads(segments.begin(), segments.end());
  const AttendProblem problem{text.following_queries(layer), text.dim, 0, text.query_positions.data(), heads};
  const std::size_t rows = std::size_t{problem.queries.heads} * problem.queries.tokens;
  std::vector<float> workspace(attend_workspace_floats(problem)), output(rows * text.dim), lse(rows);
  check(attend(problem, workspace, output, lse, executor));
  return output;
}

// ---- stored chunks

/// Rows of a stored chunk, where the prompt's rows were.
class Restore final : public RowSink {
 public:
  Restore(Outcome& outcome, std::uint32_t dim, std::uint32_t first) : outcome_(outcome), dim_(dim), first_(first) {}
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    Compact& to = outcome_.layers[layer];
    auto& bytes = part == Part::kKey ? to.keys[head] : to.values[head];
    std::memcpy(&bytes[std::size_t{first_ + token} * dim_ * 2], rows, std::size_t{count} * dim_ * 2);
  }

 private:
  Outcome& outcome_;
  std::uint32_t dim_;
  std::uint32_t first_;
};

ContainerInfo container_info(const ShardShape& shape, std::uint64_t position) {
  ContainerInfo info;
  info.shape = shape;
  info.position = position;
  info.block_tokens = shape.tokens % kBlock == 0 ? kBlock : 1;
  info.group_layers = shape.layers;
  info.model_heads = shape.heads;
  for (std::uint32_t i = 0; i < shape.tokens / info.block_tokens; ++i) {
    const std::vector<std::uint8_t> hash(32, static_cast<std::uint8_t>(i));
    info.block_hashes.emplace_back(std::span<const std::uint8_t>(hash));
  }
  info.key.last_block = info.block_hashes.back();
  return info;
}

/// Memory aligned as the store's extents are.
class Extent {
 public:
  explicit Extent(std::size_t bytes) : storage_(bytes + 64), size_(bytes) {}
  std::span<std::byte> span() {
    const std::size_t offset = (64 - reinterpret_cast<std::uintptr_t>(storage_.data()) % 64) % 64;
    return std::span(storage_).subspan(offset, size_);
  }

 private:
  std::vector<std::byte> storage_;
  std::size_t size_;
};

/// Stores a shard and reads it back; returns the container's bytes.
std::size_t store_and_restore(const Codec& codec, const ShardShape& shape, std::uint64_t position,
                              std::span<const std::byte> canonical, RowSink& sink) {
  check(codec.accepts(shape));
  const ContainerInfo info = container_info(shape, position);
  Extent input(canonical.size());
  std::ranges::copy(canonical, input.span().begin());
  Extent container(container_max_bytes(codec, info));
  const std::size_t size = check(encode_container(codec, info, input.span(), {}, container.span()));
  const ContainerReader reader = check(ContainerReader::parse(container.span().first(size)));
  check(reader.decode(0, shape.layers, 0, shape.heads, {0, shape.tokens}, sink));
  return size;
}

Outcome stored(const Text& text, const std::string& chain, Executor* executor) {
  const auto codec = check(make_codec(chain, text.rotation()));
  Outcome outcome;
  outcome.layers.resize(text.layers);
  for (Compact& layer : outcome.layers) {
    layer.entries.assign(text.heads, text.tokens);
    const std::vector<std::byte> plane(std::size_t{text.tokens} * text.dim * 2);
    layer.keys.assign(text.heads, plane);
    layer.values.assign(text.heads, plane);
  }
  const std::uint32_t chunks = text.tokens / kChunk;
  std::vector<std::size_t> bytes(chunks);
  std::vector<std::string> errors(chunks);
  parallel_for(executor, chunks, [&](std::size_t chunk) {
    const auto first = static_cast<std::uint32_t>(chunk) * kChunk;
    const ShardShape shape{DType::kBFloat16, 0, text.layers, 0, text.heads, kChunk, text.dim, text.dim};
    std::vector<std::byte> canonical(shape.raw_bytes());
    for (std::uint32_t layer = 0; layer < text.layers; ++layer) {
      for (const Part part : {Part::kKey, Part::kValue}) {
        const HeadRows rows = text.prompt(part == Part::kKey ? 'K' : 'V', layer);
        for (std::uint32_t head = 0; head < text.heads; ++head) {
          std::memcpy(&canonical[shape.plane_offset(layer, part, head)], rows.row(head, first),
                      shape.plane_bytes(part));
        }
      }
    }
    Restore sink(outcome, text.dim, first);
    try {
      bytes[chunk] = store_and_restore(*codec, shape, first, canonical, sink);
    } catch (const std::exception& error) {
      errors[chunk] = error.what();
    }
  });
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error(error);
  }
  outcome.bytes = static_cast<double>(std::accumulate(bytes.begin(), bytes.end(), std::size_t{0}));
  return outcome;
}

// ---- evictions

/// Tokens per layer on average, the window included, and what judges them.
struct Evict {
  const Text& text;
  std::uint32_t tokens;
  Executor* executor;

  std::uint32_t candidates() const { return text.tokens - kWindow; }
  /// Of one layer, before the window.
  std::uint32_t budget() const { return tokens - kWindow; }

  Observation observed(std::uint32_t layer, std::uint32_t rows, bool dispersion) const {
    ObservationOptions options;
    options.dispersion = dispersion;
    ObservationWorkspace workspace;
    Observation observation;
    check(observe(text.last_queries(layer, rows), text.prompt('K', layer), options, workspace, executor, observation));
    return observation;
  }
  TokenScores snapkv(std::uint32_t layer) const {
    return check(snapkv_scores(observed(layer, kWindow, false), text.heads, {}, executor));
  }
  TokenScores cake(std::uint32_t layer) const {
    return check(cake_scores(observed(layer, kWindow, true), text.heads, kCakeGamma, {}, executor));
  }
  std::vector<Selection> by_scores(const std::function<TokenScores(std::uint32_t)>& scores,
                                   const std::vector<std::uint32_t>& budgets) const {
    std::vector<Selection> kept;
    for (std::uint32_t layer = 0; layer < text.layers; ++layer) {
      kept.push_back(check(select_best(scores(layer), {&budgets[layer], 1}, kWindow, executor)));
    }
    return kept;
  }
  std::vector<Selection> by_scores(const std::function<TokenScores(std::uint32_t)>& scores) const {
    return by_scores(scores, std::vector<std::uint32_t>(text.layers, budget()));
  }
};

TokenScores random_scores(const Evict& of, std::uint32_t layer) {
  TokenScores scores{of.text.heads, of.candidates(), {}};
  std::uint64_t state = layer;
  for (std::size_t i = 0; i < std::size_t{scores.heads} * scores.tokens; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    scores.values.push_back(static_cast<float>(state >> 40));
  }
  return scores;
}

std::vector<Selection> cake(const Evict& of, const Preference& preference) {
  CascadeOptions options;
  options.layers = of.text.layers;
  options.cache_tokens = of.tokens;
  options.window = kWindow;
  options.floor = std::min(16U, of.budget());
  check(options.validate());
  Cascade cascade(options, of.candidates());
  for (std::uint32_t layer = 0; layer < of.text.layers; ++layer) {
    const Observation observation = of.observed(layer, kWindow, true);
    check(cascade.add_layer(preference.of(observation.dispersion, observation.shift),
                            check(cake_scores(observation, of.text.heads, kCakeGamma, {}, of.executor))));
  }
  std::vector<Selection> kept;
  for (std::uint32_t layer = 0; layer < of.text.layers; ++layer) kept.push_back(cascade.kept(layer));
  return kept;
}

/// Near to the square root of the dispersion: CAKE's preference without the shift, which starves the first layers.
constexpr Preference kDispersionAlone = {2, 100};

/// CAKE's layers, and their tokens spread over the heads by need.
std::vector<Selection> cake_adaptive(const Evict& of, const Preference& preference) {
  std::vector<double> preferences;
  std::vector<TokenScores> scores;
  for (std::uint32_t layer = 0; layer < of.text.layers; ++layer) {
    const Observation observation = of.observed(layer, kWindow, true);
    preferences.push_back(preference.of(observation.dispersion, observation.shift));
    scores.push_back(check(cake_scores(observation, of.text.heads, kCakeGamma, {}, of.executor)));
  }
  const TokenBudget total{std::uint64_t{of.budget()} * of.text.layers, of.candidates(), std::min(16U, of.budget())};
  const auto budgets = fair_budgets(preferences, total, of.text.layers);
  std::vector<Selection> kept;
  for (std::uint32_t layer = 0; layer < of.text.layers; ++layer) {
    HeadBudget budget;
    budget.tokens_per_head = budgets[layer];
    const auto counts = check(adaptive_head_budgets(scores[layer], budget));
    kept.push_back(check(select_best(scores[layer], counts, kWindow, of.executor)));
  }
  return kept;
}

std::vector<Selection> windowkv(const Evict& of, std::uint32_t layers_per_group) {
  constexpr std::uint32_t kAlpha = 16;
  const WindowRule rule;
  const std::uint32_t columns = of.text.tokens - kAlpha;
  std::vector<std::uint32_t> windows;
  std::vector<Selection> kept;
  for (std::uint32_t layer = 0; layer < of.text.layers; ++layer) {
    if (layer % layers_per_group == 0) {
      const auto scores = check(window_scores(of.observed(layer, kAlpha, false), rule, of.executor));
      windows = select_windows(scores, rule, columns, of.tokens - kAlpha);
    }
    kept.push_back(window_tokens(windows, rule, columns, kAlpha, of.text.heads));
  }
  return kept;
}

std::vector<Selection> adaptive(const Evict& of, TokenScores (Evict::*score)(std::uint32_t) const) {
  std::vector<Selection> kept;
  for (std::uint32_t layer = 0; layer < of.text.layers; ++layer) {
    const TokenScores scores = (of.*score)(layer);
    HeadBudget budget;
    budget.tokens_per_head = of.budget();
    const auto counts = check(adaptive_head_budgets(scores, budget));
    kept.push_back(check(select_best(scores, counts, kWindow, of.executor)));
  }
  return kept;
}

using ScoreKeys = Result<TokenScores> (*)(const HeadRows&, Executor*);

/// By scores of keys alone, the first tokens and the newest `recent` apart, which stay, as in the codec step.
std::vector<Selection> by_keys(const Evict& of, ScoreKeys score, std::uint32_t recent) {
  const std::uint32_t budget = of.tokens - recent;
  std::vector<Selection> kept;
  for (std::uint32_t layer = 0; layer < of.text.layers; ++layer) {
    HeadRows keys = of.text.prompt('K', layer);
    keys.tokens -= recent;
    TokenScores scores = check(score(keys, of.executor));
    for (std::uint32_t head = 0; head < scores.heads; ++head) {
      std::fill_n(scores.of(head).begin(), kSinks, std::numeric_limits<float>::max());
    }
    kept.push_back(check(select_best(scores, {&budget, 1}, recent, of.executor)));
  }
  return kept;
}

std::vector<Selection> h2o(const Evict& of) {
  std::vector<Selection> kept;
  ObservationWorkspace workspace;
  for (std::uint32_t layer = 0; layer < of.text.layers; ++layer) {
    HeadRows queries = of.text.rows('Q', layer);
    queries.tokens = of.text.tokens;
    const TokenScores sums =
        check(heavy_hitter_scores(queries, of.text.prompt('K', layer), ColumnSum::kSum, workspace, of.executor));
    kept.push_back(check(select_heavy_and_recent(sums, of.budget(), kWindow, of.executor)));
  }
  return kept;
}

using Choose = std::function<std::vector<Selection>(const Evict&)>;

const std::map<std::string, Choose>& evictions() {
  static const std::map<std::string, Choose> all = {
      {"random",
       [](const Evict& of) { return of.by_scores([&](std::uint32_t layer) { return random_scores(of, layer); }); }},
      {"streaming",
       [](const Evict& of) {
         return std::vector<Selection>(
             of.text.layers, select_sinks_and_recent(of.text.heads, of.text.tokens, kSinks, of.tokens - kSinks));
       }},
      {"knorm", [](const Evict& of) { return by_keys(of, knorm_scores, kWindow); }},
      {"knorm_recent", [](const Evict& of) { return by_keys(of, knorm_scores, of.tokens * 3 / 4); }},
      {"keydiff", [](const Evict& of) { return by_keys(of, keydiff_scores, kWindow); }},
      {"keydiff_recent", [](const Evict& of) { return by_keys(of, keydiff_scores, of.tokens * 3 / 4); }},
      {"h2o", h2o},
      {"snapkv", [](const Evict& of) { return of.by_scores([&](std::uint32_t layer) { return of.snapkv(layer); }); }},
      {"snapkv_adaptive", [](const Evict& of) { return adaptive(of, &Evict::snapkv); }},
      {"cake_uniform_adaptive", [](const Evict& of) { return adaptive(of, &Evict::cake); }},
      {"snapkv_pyramid",
       [](const Evict& of) {
         constexpr double kSlope = 14;
         return of.by_scores(
             [&](std::uint32_t layer) { return of.snapkv(layer); },
             pyramid_budgets(of.text.layers, std::uint64_t{of.budget()} * of.text.layers, of.candidates(), kSlope));
       }},
      {"cake_uniform",
       [](const Evict& of) { return of.by_scores([&](std::uint32_t layer) { return of.cake(layer); }); }},
      {"cake",
       [](const Evict& of) {
         return cake(of, {1, 1});
       }},
      {"cake_tau_1.6_0.4",
       [](const Evict& of) {
         return cake(of, {1.6, 0.4});
       }},
      {"cake_dispersion", [](const Evict& of) { return cake(of, kDispersionAlone); }},
      {"cake_dispersion_adaptive", [](const Evict& of) { return cake_adaptive(of, kDispersionAlone); }},
      {"windowkv", [](const Evict& of) { return windowkv(of, 1); }},
      {"windowkv_groups_of_6", [](const Evict& of) { return windowkv(of, 6); }},
  };
  return all;
}

/// The survivors of a layer, stored with a chain where there is one.
class Survivors final : public RowSink {
 public:
  Survivors(Compact& to, std::uint32_t head, std::uint32_t dim) : to_(to), head_(head), dim_(dim) {}
  void write(std::uint32_t, Part part, std::uint32_t, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    auto& bytes = part == Part::kKey ? to_.keys[head_] : to_.values[head_];
    std::memcpy(&bytes[std::size_t{token} * dim_ * 2], rows, std::size_t{count} * dim_ * 2);
  }

 private:
  Compact& to_;
  std::uint32_t head_;
  std::uint32_t dim_;
};

/// Bytes of the sections that a codec makes of one head's survivors: what a compact cache of all heads adds per head.
std::size_t section_bytes(const Codec& codec, const ShardShape& shape, std::span<const std::byte> canonical,
                          RowSink& sink) {
  check(codec.accepts(shape));
  Extent input(canonical.size());
  std::ranges::copy(canonical, input.span().begin());
  std::size_t bytes = 0;
  for (const SectionPlan& plan : codec.plan(shape)) {
    Extent section(plan.max_bytes);
    const bool both = plan.extent.has_key && plan.extent.has_value;
    const std::size_t begin = plan.extent.has_key ? 0 : shape.plane_bytes(Part::kKey);
    const std::size_t size =
        both ? canonical.size() : shape.plane_bytes(plan.extent.has_key ? Part::kKey : Part::kValue);
    Extent planes(size);
    std::ranges::copy(canonical.subspan(begin, size), planes.span().begin());
    const std::size_t used = check(codec.encode(shape, plan.extent, planes.span(), section.span()));
    check(codec.decode(shape, plan.extent, section.span().first(used), {0, shape.tokens}, 0, 1, sink));
    bytes += used;
  }
  return bytes;
}

Outcome evicted(const Text& text, const Choose& choose, double share, const std::string& chain, Executor* executor) {
  // With a chain, bytes per token are not known before: encode a sample of the prompt first.
  const double raw_row = 2.0 * text.dim * 2;
  double row = raw_row;
  std::shared_ptr<const Codec> codec;
  if (!chain.empty()) {
    codec = check(make_codec(chain));
    const ShardShape shape{DType::kBFloat16, 0, 1, 0, 1, kChunk, text.dim, text.dim};
    std::vector<std::byte> sample(shape.raw_bytes());
    std::memcpy(sample.data(), text.rows('K', 0).row(0, 0), shape.plane_bytes(Part::kKey));
    std::memcpy(&sample[shape.plane_bytes(Part::kKey)], text.rows('V', 0).row(0, 0), shape.plane_bytes(Part::kValue));
    Compact scratch{{sample}, {sample}, {kChunk}};
    Survivors sink(scratch, 0, text.dim);
    row = static_cast<double>(section_bytes(*codec, shape, sample, sink)) / kChunk;
  }
  const auto tokens = static_cast<std::uint32_t>(std::min(1.0, share * raw_row / (row + kPositionBytes)) * text.tokens);
  if (tokens <= kWindow) throw std::runtime_error("the share leaves less than the window");
  const std::vector<Selection> kept = choose({text, tokens, executor});
  Outcome outcome;
  outcome.layers.resize(text.layers);
  std::vector<double> bytes(text.layers);
  for (std::uint32_t layer = 0; layer < text.layers; ++layer) {
    Compact& to = outcome.layers[layer];
    const HeadRows keys = text.prompt('K', layer);
    const HeadRows values = text.prompt('V', layer);
    to.keys.resize(text.heads);
    to.values.resize(text.heads);
    for (std::uint32_t head = 0; head < text.heads; ++head) {
      const auto tokens_of = kept[layer].of(head);
      to.entries.push_back(static_cast<std::uint32_t>(tokens_of.size()));
      for (const std::uint32_t token : tokens_of) {
        const std::byte* key = keys.row(head, token);
        const std::byte* value = values.row(head, token);
        to.keys[head].insert(to.keys[head].end(), key, key + text.dim * 2);
        to.values[head].insert(to.values[head].end(), value, value + text.dim * 2);
      }
      bytes[layer] += static_cast<double>(tokens_of.size()) * kPositionBytes;
      if (codec == nullptr) {
        bytes[layer] += static_cast<double>(to.keys[head].size() + to.values[head].size());
        continue;
      }
      const ShardShape shape{DType::kBFloat16, 0, 1, 0, 1, to.entries.back(), text.dim, text.dim};
      std::vector<std::byte> canonical = to.keys[head];
      canonical.insert(canonical.end(), to.values[head].begin(), to.values[head].end());
      Survivors sink(to, head, text.dim);
      bytes[layer] += static_cast<double>(section_bytes(*codec, shape, canonical, sink));
    }
  }
  outcome.bytes = std::accumulate(bytes.begin(), bytes.end(), 0.0);
  return outcome;
}

// ---- the judge

/// "name(share%)" and what follows "|".
struct Method {
  explicit Method(const std::string& text) {
    const std::size_t open = text.find('(');
    const std::size_t close = text.find(')');
    const std::string name = text.substr(0, open);
    const auto found = evictions().find(name);
    chain = text;
    if (found == evictions().end() || open == std::string::npos || close == std::string::npos) return;
    choose = found->second;
    const std::string inside = text.substr(open + 1, close - open - 1);
    share = std::stod(inside) / (inside.ends_with('%') ? 100 : 1);
    const std::size_t bar = text.find('|', close);
    chain = bar == std::string::npos ? "" : text.substr(text.find_first_not_of(' ', bar + 1));
  }
  Choose choose;
  double share = 0;
  std::string chain;
};

nlohmann::json judge(const Text& text, const std::vector<std::vector<float>>& exact, const std::string& spec,
                     Executor* executor) {
  nlohmann::json result = {{"method", spec}};
  try {
    const Method method(spec);
    const Outcome outcome = method.choose ? evicted(text, method.choose, method.share, method.chain, executor)
                                          : stored(text, method.chain, executor);
    std::vector<double> errors;
    for (std::uint32_t layer = 0; layer < text.layers; ++layer) {
      const std::vector<float> output = attend_layer(text, layer, &outcome.layers[layer], executor);
      double off = 0;
      double all = 0;
      for (std::size_t i = 0; i < output.size(); ++i) {
        const double difference = double{output[i]} - double{exact[layer][i]};
        off += difference * difference;
        all += double{exact[layer][i]} * double{exact[layer][i]};
      }
      errors.push_back(std::sqrt(off / all));
    }
    result["bytes"] = outcome.bytes / text.raw_bytes();
    result["error"] = std::accumulate(errors.begin(), errors.end(), 0.0) / static_cast<double>(errors.size());
    result["first"] = errors.front();
    result["worst"] = *std::ranges::max_element(errors);
  } catch (const std::exception& error) {
    result["refused"] = error.what();
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: kvern_quality FILE METHOD ...   (FILE as bench/quality/capture.py writes it)\n");
    return 2;
  }
  try {
    const Text text(argv[1]);
    ThreadPool pool("quality", std::max(1U, std::thread::hardware_concurrency()), 1024);
    std::vector<std::vector<float>> exact;
    for (std::uint32_t layer = 0; layer < text.layers; ++layer) {
      exact.push_back(attend_layer(text, layer, nullptr, &pool));
    }
    for (int i = 2; i < argc; ++i) {
      std::printf("%s\n", judge(text, exact, argv[i], &pool).dump().c_str());
      std::fflush(stdout);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvern_quality: %s\n", error.what());
    return 1;
  }
}
