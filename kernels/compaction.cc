#include "kernels/compaction.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <utility>

#include "kernels/attend.h"
#include "kernels/key_scores.h"
#include "kernels/layer_budgets.h"
#include "kernels/observation.h"
#include "kernels/preference_budgets.h"
#include "kernels/slot_pages.h"
#include "kernels/token_scores.h"
#include "kernels/window_scores.h"

namespace kvern {
namespace {

/// Of PyramidKV: that of WindowKV's pyramid, with which docs/quality.md measures it.
constexpr double kPyramidSlope = evict::kWindowPyramidSlope;

/// A parameter of a canonical step: it is there and in its range.
std::uint32_t number(const CodecStep& step, std::string_view name) {
  return step.number_within(name, 0, 0, std::numeric_limits<std::uint32_t>::max()).value();
}

tl::unexpected<Status> refused(const CodecStep& step, const std::string& why) {
  return failure(Code::kRefused, "compact cache by " + step.name + ": " + why);
}

/// WindowKV's cut of a prompt into whole windows. What does not fill a window stays with the observation window, so
/// that the number of tokens kept does not depend on which windows are.
struct WindowCut {
  evict::WindowRule rule;
  std::uint32_t columns = 0;  ///< tokens that compete, a multiple of the window
  std::uint32_t tail = 0;     ///< tokens after them, always kept
};

WindowCut window_cut(const CodecStep& step, std::uint32_t prompt_tokens) {
  WindowCut cut{{number(step, "omega"), number(step, "top")}, 0, 0};
  const std::uint32_t candidates = prompt_tokens - std::min(prompt_tokens, number(step, "alpha"));
  cut.columns = candidates / cut.rule.tokens * cut.rule.tokens;
  cut.tail = prompt_tokens - cut.columns;
  return cut;
}

/// Tokens that the method keeps whatever their scores.
std::uint32_t protected_tokens(const CodecStep& step, std::uint32_t prompt_tokens) {
  if (step.name == "windowkv") return window_cut(step, prompt_tokens).tail;
  if (step.name == "cake" || step.name == "snapkv") return number(step, "window");
  if (step.name == "streaming") return number(step, "sinks");
  return number(step, "sinks") + number(step, "recent");
}

/// How tokens are shared out between layers and heads.
std::string_view allocation_of(const CodecStep& step) {
  const std::string* allocation = step.find("allocation");
  return allocation == nullptr ? std::string_view("uniform") : std::string_view(*allocation);
}

/// One table of blocks serves all heads of a layer.
Status check_allocation(const CodecStep& step) {
  if (step.name == "h2o") {
    return refused(step, "it needs the queries of the whole prompt, and only the last ones are captured").value();
  }
  if (allocation_of(step) == "heads") {
    return refused(step, "allocation=heads gives heads different budgets; use uniform").value();
  }
  if (step.name == "snapkv" && allocation_of(step) == "cake") {
    return refused(step, "allocation=cake is for cake; use pyramid or uniform").value();
  }
  if (step.name == "windowkv" && number(step, "group") != 1) {
    return refused(step, "group must be 1: every layer picks its own windows").value();
  }
  return Status::ok();
}

/// The chain with the same budget for every layer.
Result<Chain> made_uniform(const Chain& chain) {
  std::string text = chain.spec;
  const auto begin = text.find("allocation=");
  if (begin == std::string::npos) return chain;
  text.replace(begin, text.find_first_of(",)", begin) - begin, "allocation=uniform");
  return parse_chain(text);
}

/// Whole windows, the best ones, and the last tokens of the next best where the budget is no multiple of a window.
evict::Selection best_windows(std::span<const float> scores, const WindowCut& cut, std::uint32_t budget,
                              std::uint32_t heads) {
  const std::uint32_t whole = budget / cut.rule.tokens, rest = budget % cut.rule.tokens;
  auto ranked = evict::ranked_best_of(scores, whole + (rest > 0 ? 1 : 0));
  const std::uint32_t next = ranked.empty() ? 0 : ranked.back();
  ranked.resize(std::min<std::size_t>(ranked.size(), whole));
  std::ranges::sort(ranked);
  evict::Selection kept = window_tokens(ranked, cut.rule, cut.columns, cut.tail, 1);
  for (std::uint32_t token = (next + 1) * cut.rule.tokens - rest; token < (next + 1) * cut.rule.tokens; ++token) {
    kept.tokens.insert(std::ranges::lower_bound(kept.tokens, token), token);
  }
  const std::vector<std::uint32_t> tokens = kept.tokens;
  kept.tokens.clear();
  kept.offsets.resize(1);
  for (std::uint32_t head = 0; head < heads; ++head) {
    kept.tokens.insert(kept.tokens.end(), tokens.begin(), tokens.end());
    kept.offsets.push_back(static_cast<std::uint32_t>(kept.tokens.size()));
  }
  return kept;
}

evict::Pooling pooling_of(const CodecStep& step) {
  const std::string& kind = *step.find("pool");
  return {kind == "none"  ? evict::Pooling::Kind::kNone
          : kind == "max" ? evict::Pooling::Kind::kMaximum
                          : evict::Pooling::Kind::kAverage,
          number(step, "kernel")};
}

Result<evict::Observation> observed(const PromptLayer& layer, std::uint32_t columns, bool dispersion,
                                    Executor* executor) {
  evict::ObservationOptions options;
  options.columns = columns;
  options.dispersion = dispersion;
  evict::ObservationWorkspace workspace;
  evict::Observation seen;
  if (const Status status = observe(layer.queries, layer.keys, options, workspace, executor, seen); !status) {
    return failure(status);
  }
  return seen;
}

Result<evict::Selection> select_by_queries(const CompactionPlan& plan, const CodecStep& step, const PromptLayer& layer,
                                           std::uint32_t slots, Executor* executor) {
  const bool windows = step.name == "windowkv";
  const WindowCut cut = windows ? window_cut(step, plan.prompt_tokens) : WindowCut{};
  const std::uint32_t columns = windows ? cut.columns : plan.prompt_tokens - plan.query_rows;
  const auto observation = observed(layer, columns, step.name == "cake", executor);
  if (!observation) return failure(observation.error());
  const evict::Observation& seen = *observation;
  const std::uint32_t tail = plan.prompt_tokens - columns;
  if (windows) {
    const auto scores = window_scores(seen, cut.rule, executor);
    if (!scores) return failure(scores.error());
    return best_windows(*scores, cut, slots - tail, layer.keys.heads);
  }
  const auto scores = step.name == "cake" ? cake_scores(seen, layer.keys.heads,
                                                        static_cast<float>(step.decimal("gamma", 0, 0, 1e6).value()),
                                                        pooling_of(step), executor)
                                          : snapkv_scores(seen, layer.keys.heads, pooling_of(step), executor);
  if (!scores) return failure(scores.error());
  return select_best(*scores, std::array{slots - tail}, tail, executor);
}

Result<evict::Selection> select_by_keys(const CompactionPlan& plan, const CodecStep& step, const HeadRows& keys,
                                        std::uint32_t slots, Executor* executor) {
  const auto scores =
      step.name == "knorm" ? evict::knorm_scores(keys, executor) : evict::keydiff_scores(keys, executor);
  if (!scores) return failure(scores.error());
  const std::uint32_t recent = number(step, "recent");
  const std::uint32_t candidates = plan.prompt_tokens - recent;
  evict::TokenScores shortened{keys.heads, candidates, {}};
  shortened.values.resize(std::size_t{keys.heads} * candidates);
  for (std::size_t head = 0; head < keys.heads; ++head) {
    const auto to = shortened.of(head);
    std::ranges::copy(scores->of(head).first(candidates), to.begin());
    std::ranges::fill(to.first(number(step, "sinks")), std::numeric_limits<float>::infinity());
  }
  return select_best(shortened, std::array{slots - recent}, recent, executor);
}

Result<evict::Selection> select(const CompactionPlan& plan, const PromptLayer& layer, std::uint32_t slots,
                                Executor* executor) {
  const CodecStep& step = *plan.chain.find(StepKind::kEvict);
  if (slots == plan.prompt_tokens) {
    return evict::select_sinks_and_recent(layer.keys.heads, plan.prompt_tokens, 0, slots);
  }
  if (plan.query_rows > 0) return select_by_queries(plan, step, layer, slots, executor);
  if (step.name == "streaming") {
    const std::uint32_t sinks = number(step, "sinks");
    return evict::select_sinks_and_recent(layer.keys.heads, plan.prompt_tokens, sinks, slots - sinks);
  }
  return select_by_keys(plan, step, layer.keys, slots, executor);
}

Status check_rows(const CompactionPlan& plan, const PromptLayer& layer) {
  if (layer.keys.tokens != plan.prompt_tokens || layer.values.tokens != plan.prompt_tokens ||
      layer.keys.heads != layer.values.heads) {
    return {Code::kInvalid, "keys and values must be those of the plan's prompt, of the same heads"};
  }
  if (plan.query_rows > 0 && layer.queries.tokens != plan.query_rows) {
    return {Code::kInvalid, "the plan needs the last " + std::to_string(plan.query_rows) + " queries, not " +
                                std::to_string(layer.queries.tokens)};
  }
  return Status::ok();
}

Result<std::vector<std::byte>> gathered(const HeadRows& rows, const evict::Selection& kept, Executor* executor) {
  std::vector<std::byte> out(gathered_bytes(rows, kept));
  if (const Status status = gather_rows(rows, kept, out, executor); !status) return failure(status);
  return out;
}

AttendRows kept_rows(const HeadRows& rows, std::uint32_t head, std::span<const std::uint32_t> tokens) {
  return {rows.dtype, rows.row(head, 0), rows.token_stride_bytes, nullptr, tokens.data(), nullptr, {}};
}

/// The query heads that share a KV head.
HeadRows sharing_queries(const PromptLayer& layer, std::uint32_t head) {
  HeadRows queries = layer.queries;
  queries.heads = layer.queries.heads / layer.keys.heads;
  queries.data = layer.queries.row(std::size_t{head} * queries.heads, 0);
  return queries;
}

/// Outputs [query head][row][value dim] of the queries that share a KV head, over the tokens given. Head by head: the
/// workspace grows with the queries times the tokens.
Result<std::vector<float>> outputs(const PromptLayer& layer, std::uint32_t head, std::span<const std::uint32_t> tokens,
                                   Executor* executor) {
  const std::vector<std::int32_t> positions(tokens.begin(), tokens.end());
  const AttendSegment segment{static_cast<std::uint32_t>(tokens.size()), kept_rows(layer.keys, head, tokens),
                              kept_rows(layer.values, head, tokens), nullptr, positions.data()};
  const std::array of_head{std::span(&segment, 1)};
  std::vector<std::int32_t> query_positions(layer.queries.tokens);
  for (std::uint32_t row = 0; row < layer.queries.tokens; ++row) {
    query_positions[row] = static_cast<std::int32_t>(layer.keys.tokens - layer.queries.tokens + row);
  }
  AttendProblem problem;
  problem.queries = sharing_queries(layer, head);
  problem.value_dim = layer.values.dim;
  problem.query_positions = query_positions.data();
  problem.heads = of_head;
  const std::size_t rows = std::size_t{problem.queries.heads} * problem.queries.tokens;
  std::vector<float> out(rows * layer.values.dim);
  if (const Status status = problem.validate(); !status) return failure(status);
  std::vector<float> workspace(attend_workspace_floats(problem));
  std::vector<float> lse(rows);
  if (const Status status = attend(problem, workspace, out, lse, executor); !status) return failure(status);
  return out;
}

}  // namespace

Result<CompactionPlan> CompactionPlan::make(std::string_view spec, std::uint32_t prompt_tokens, SlotLayout layout,
                                            std::uint32_t page_tokens) {
  auto chain = parse_chain(spec);
  if (!chain) return failure(chain.error());
  const CodecStep* step = chain->find(StepKind::kEvict);
  if (step == nullptr) {
    return failure(Code::kInvalid, "a compact cache needs a step that picks tokens, as in cake(budget=12%) | int8");
  }
  if (prompt_tokens == 0) return failure(Code::kInvalid, "a compact cache needs a prompt");
  if (const Status status = check_allocation(*step); !status) return failure(status);
  CompactionPlan plan;
  plan.prompt_tokens = prompt_tokens;
  plan.slots = budget_tokens(*step, prompt_tokens);
  if (plan.slots < prompt_tokens) {
    const std::uint32_t least = protected_tokens(*step, prompt_tokens);
    if (plan.slots <= least) {
      return failure(Code::kInvalid, "compact cache by " + step->name + ": the budget of " +
                                         std::to_string(plan.slots) + " tokens must be more than the " +
                                         std::to_string(least) + " that are always kept");
    }
    const bool asks = allocation_of(*step) != "uniform" && !chain->merges_rows();
    if (layout != SlotLayout::kRectangular && page_tokens > 0 && asks) {
      const std::uint32_t mean_pages = (plan.slots - 1) / page_tokens + 1, all_pages = prompt_tokens / page_tokens;
      if (mean_pages < all_pages) {
        plan.layout = layout;
        plan.page_tokens = page_tokens;
        plan.mean_slots = mean_pages * page_tokens;
        plan.slots =
            layout == SlotLayout::kShift ? std::min(kShiftPeak * mean_pages, all_pages) * page_tokens : plan.mean_slots;
      }
    }
    if (step->name == "windowkv") {
      plan.query_rows = number(*step, "alpha");
      const std::uint32_t window = number(*step, "omega");
      if (!plan.ragged()) plan.slots = least + (plan.slots - least) / window * window;
    } else if (step->name == "cake" || step->name == "snapkv") {
      plan.query_rows = number(*step, "window");
    }
  }
  if (plan.ragged()) {
    plan.chain = std::move(*chain);
  } else {
    plan.mean_slots = plan.slots;
    auto uniform = made_uniform(*chain);
    if (!uniform) return failure(uniform.error());
    plan.chain = std::move(*uniform);
  }
  return plan;
}

std::uint32_t CompactionPlan::recent_slots() const {
  const CodecStep& step = *chain.find(StepKind::kEvict);
  if (step.name == "streaming" || slots == prompt_tokens) return 0;  // the rest is no less recent, or nothing was cut
  if (step.name == "windowkv") return window_cut(step, prompt_tokens).tail;
  return step.name == "cake" || step.name == "snapkv" ? number(step, "window") : number(step, "recent");
}

bool CompactionPlan::reads_preferences() const {
  return ragged() && allocation_of(*chain.find(StepKind::kEvict)) == "cake";
}

std::vector<std::uint32_t> CompactionPlan::layer_pages(std::span<const double> preferences,
                                                       std::uint32_t layers) const {
  const CodecStep& step = *chain.find(StepKind::kEvict);
  const std::uint32_t kept = protected_tokens(step, prompt_tokens);
  PageBudget budget;
  budget.page_tokens = page_tokens;
  budget.mean_pages = mean_slots / page_tokens;
  budget.least = std::max(1U, (kept + page_tokens - 1) / page_tokens);
  budget.most = (layout == SlotLayout::kShift ? slots : prompt_tokens) / page_tokens;
  const std::uint32_t mean = mean_slots - kept, cap = budget.most * page_tokens - kept;
  const std::uint64_t total = std::uint64_t{mean} * layers;
  std::vector<double> tokens;
  if (reads_preferences()) {
    tokens = evict::preference_shares(preferences, {total, cap, number(step, "floor")});
  } else if (step.name == "windowkv") {
    const auto slope = static_cast<std::uint32_t>(step.decimal("lambda", 0, 0, 1e6).value());
    const evict::LayerGroups groups{layers, 1};
    if (allocation_of(step) == "printed") {
      tokens = evict::window_pyramid_printed(mean, groups, slope);
    } else {
      const auto implemented = evict::window_pyramid_implemented(mean, groups, slope);
      tokens.assign(implemented.begin(), implemented.end());
    }
  } else {
    const auto pyramid = evict::pyramid_budgets(layers, total, cap, kPyramidSlope);
    tokens.assign(pyramid.begin(), pyramid.end());
  }
  for (double& share : tokens) share += kept;
  return whole_pages(tokens, budget);
}

Result<double> layer_preference(const CompactionPlan& plan, const PromptLayer& layer, Executor* executor) {
  if (const Status status = check_rows(plan, layer); !status) return failure(status);
  const auto seen = observed(layer, plan.prompt_tokens - plan.query_rows, true, executor);
  if (!seen) return failure(seen.error());
  const CodecStep& step = *plan.chain.find(StepKind::kEvict);
  const evict::Preference preference{step.decimal("tau1", 1, 0, 1e6).value(), step.decimal("tau2", 1, 0, 1e6).value()};
  return preference.of(seen->dispersion, seen->shift);
}

Result<CompactLayer> compact_layer(const CompactionPlan& plan, const PromptLayer& layer, Executor* executor) {
  return compact_layer(plan, layer, plan.slots, executor);
}

Result<CompactLayer> compact_layer(const CompactionPlan& plan, const PromptLayer& layer, std::uint32_t slots,
                                   Executor* executor) {
  if (const Status status = check_rows(plan, layer); !status) return failure(status);
  if (slots != plan.slots && (!plan.ragged() || slots % plan.page_tokens != 0 || slots > plan.prompt_tokens ||
                              slots < protected_tokens(*plan.chain.find(StepKind::kEvict), plan.prompt_tokens))) {
    return failure(Code::kInvalid, "a layer of this cache cannot keep " + std::to_string(slots) + " tokens");
  }
  auto kept = select(plan, layer, slots, executor);
  if (!kept) return failure(kept.error());
  auto keys = gathered(layer.keys, *kept, executor);
  if (!keys) return failure(keys.error());
  auto values = gathered(layer.values, *kept, executor);
  if (!values) return failure(values.error());
  return CompactLayer{std::move(*kept), std::move(*keys), std::move(*values)};
}

Result<double> attention_error(const PromptLayer& layer, const evict::Selection& kept, Executor* executor) {
  const bool inside = std::ranges::all_of(kept.tokens, [&](std::uint32_t token) { return token < layer.keys.tokens; });
  if (layer.queries.tokens == 0 || layer.queries.tokens > layer.keys.tokens || layer.queries.dim != layer.keys.dim ||
      kept.heads() != layer.keys.heads || layer.values.heads != layer.keys.heads || layer.keys.heads == 0 ||
      layer.queries.heads % layer.keys.heads != 0 || layer.values.tokens != layer.keys.tokens || !inside) {
    return failure(Code::kInvalid, "queries, keys, values and the tokens kept must be of one layer and prompt");
  }
  std::vector<std::uint32_t> all(layer.keys.tokens);
  std::iota(all.begin(), all.end(), 0U);
  double difference = 0, norm = 0;
  for (std::uint32_t head = 0; head < layer.keys.heads; ++head) {
    const auto whole = outputs(layer, head, all, executor);
    if (!whole) return failure(whole.error());
    const auto compact = outputs(layer, head, kept.of(head), executor);
    if (!compact) return failure(compact.error());
    for (std::size_t i = 0; i < whole->size(); ++i) {
      const double exact = (*whole)[i], off = (*compact)[i] - exact;
      difference += off * off;
      norm += exact * exact;
    }
  }
  return norm == 0 ? 0 : std::sqrt(difference / norm);
}

std::uint64_t workspace_bytes(const CompactionPlan& plan, const ShardShape& layer, std::uint32_t query_heads) {
  const std::uint32_t sharing = query_heads / std::max(1U, layer.heads);
  AttendProblem problem;
  problem.queries = {nullptr, layer.dtype, sharing, plan.query_rows, layer.key_dim, 0, 0};
  problem.value_dim = layer.value_dim;
  const AttendSegment whole{plan.prompt_tokens, {}, {}, nullptr, nullptr};
  const std::array of_head{std::span(&whole, 1)};
  problem.heads = of_head;
  // Beside the attention's own: numbers of all tokens, and their positions.
  const std::uint64_t error =
      (attend_workspace_floats(problem) + 2 * std::uint64_t{plan.prompt_tokens}) * sizeof(float);
  return std::max(error, evict::observation_workspace_bytes(sharing, plan.query_rows, plan.prompt_tokens));
}

Status place_keys(const HeadRows& keys, std::int64_t shift, const rope::Parameters& rotation, std::byte* out,
                  Executor* executor) {
  const auto turns = rope::Turns::at(rotation.inverse_frequencies(), std::array{shift});
  return rope::rotate(keys, turns, rotation.style, rope::Direction::kForward, keys.dtype, out, executor);
}

}  // namespace kvern
