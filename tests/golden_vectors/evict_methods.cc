// CAKE, SnapKV and WindowKV: scores, cascades, selections.

#include <algorithm>
#include <cmath>

#include "kernels/cascade.h"
#include "kernels/preference_budgets.h"
#include "tests/golden_vectors/methods.h"

namespace kvern::golden {

namespace {

using namespace evict;
using Pool = Pooling::Kind;

/// The `count` best of every head, one row per head.
std::vector<std::uint32_t> best_rows(const Backend& on, const TokenScores& scores, std::uint32_t count) {
  return on.select_best(scores, count, 0).tokens;
}

/// The candidates of a selection, without the window's tokens at the end of every head.
std::vector<std::uint32_t> candidates_of(const Selection& selection, std::uint32_t window) {
  std::vector<std::uint32_t> rows;
  for (std::size_t head = 0; head < selection.heads(); ++head) {
    const auto kept = selection.of(head);
    rows.insert(rows.end(), kept.begin(), kept.end() - window);
  }
  return rows;
}

void give_preferences(CaseRun& run, const Observation& observation) {
  run.output("H", std::vector<double>{observation.dispersion});
  run.output("V", std::vector<double>{observation.shift});
  std::vector<double> all;
  for (const auto& tau : run.param("tau")) {
    all.push_back(Preference{tau[0].get<double>(), tau[1].get<double>()}.of(observation.dispersion, observation.shift));
  }
  run.output("P", all);
}

void cake_score(CaseRun& run, const Backend& on) {
  const Observation observation = on.observe(run.input("Q").head_rows(), run.input("K").head_rows(), {});
  const auto heads = run.number("Hk");
  const auto gamma = run.param("gamma").get<float>();
  give_preferences(run, observation);
  run.output("lse", observation.lse);
  run.output("head_mean", observation.mean);
  run.output("head_var", observation.variance);
  const TokenScores average = on.cake_scores(observation, heads, gamma, {Pool::kAverage, 5});
  const TokenScores none = on.cake_scores(observation, heads, gamma, {Pool::kNone, 1});
  run.output("score_avg5", average.values);
  run.output("score_none", none.values);
  run.output("score_max7", on.cake_scores(observation, heads, gamma, {Pool::kMaximum, 7}).values);
  for (const auto& budget : run.param("budgets")) {
    const auto count = budget.get<std::uint32_t>();
    run.output("keep_" + std::to_string(count), best_rows(on, average, count));
    run.output("keep_none_" + std::to_string(count), best_rows(on, none, count));
  }
}

/// Probabilities become logits of one-hot keys, so that the kernel sees what it would have seen.
void cake_from_probabilities(CaseRun& run, const Backend& on) {
  const Tensor& a = run.input("A");
  const std::size_t tokens = a.columns();
  std::vector<float> logits;
  // Far enough below the others to weigh nothing.
  for (const float p : a.floats()) logits.push_back(p > 0 ? std::log(p) : -1000.0F);
  std::vector<float> one_hot(tokens * tokens);
  for (std::size_t i = 0; i < tokens; ++i) one_hot[i * tokens + i] = 1;
  const Tensor queries = Tensor::of<float>(logits, a.shape);
  const Tensor keys = Tensor::of<float>(one_hot, {1, tokens, tokens});
  const Observation observation = on.observe(queries.head_rows(), keys.head_rows(), {std::nullopt, 1.0F});
  give_preferences(run, observation);
  const auto gamma = run.param("gamma").get<float>();
  std::vector<float> indicator(observation.mean.size());
  for (std::size_t i = 0; i < indicator.size(); ++i) {
    indicator[i] = observation.mean[i] + gamma * observation.variance[i];
  }
  run.output("indicator", indicator);
  const std::pair<const char*, Pooling> pools[] = {{"none1", {Pool::kNone, 1}},
                                                   {"avg5", {Pool::kAverage, 5}},
                                                   {"avg3", {Pool::kAverage, 3}},
                                                   {"max5", {Pool::kMaximum, 5}}};
  for (const auto& [name, pooling] : pools) {
    const TokenScores scores = on.cake_scores(observation, 1, gamma, pooling);
    run.output(std::string("score_") + name, scores.values);
    run.output(std::string("keep2_") + name, best_rows(on, scores, 2));
  }
}

/// Runs the cascade of a case over the layers' preferences and scores, and gives the stages and what is kept.
void give_cascade(CaseRun& run, const Backend& on, BudgetRounding rounding, std::span<const double> layer_preferences,
                  std::span<const TokenScores> scores, const std::string& stages_name, const std::string& keep_prefix) {
  const auto layers = static_cast<std::uint32_t>(scores.size());
  CascadeOptions options;
  options.layers = layers;
  options.window = run.has_param("w") ? run.number("w") : 1;
  options.cache_tokens = options.window + run.number("B_total") / layers;
  options.floor = rounding == BudgetRounding::kFair ? run.number("floor") : 0;
  options.rounding = rounding;
  check(options.validate());
  run.expect(options.total() == run.number("B_total"), "B_total");
  Cascade cascade(options, run.number("R"));
  std::vector<std::int32_t> stages;
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    check(cascade.add_layer(layer_preferences[layer], scores[layer]));
    for (std::uint32_t l = 0; l < layers; ++l) {
      stages.push_back(l <= layer ? static_cast<std::int32_t>(cascade.budgets()[l]) : -1);
    }
  }
  run.output(stages_name, stages);
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    const Selection kept = cascade.kept(layer);
    run.output(keep_prefix + std::to_string(layer), candidates_of(kept, options.window));
    if (rounding != BudgetRounding::kFair) continue;
    const std::uint32_t count = cascade.budgets()[layer];
    run.expect(candidates_of(kept, options.window) ==
                   candidates_of(on.select_best(scores[layer], count, options.window), options.window),
               "cascade and one eviction differ in layer " + std::to_string(layer));
  }
}

void cake_cascade_from_scores(CaseRun& run, const Backend& on) {
  const Tensor& given = run.input("scores");
  std::vector<TokenScores> scores;
  const auto all = given.floats();
  for (std::size_t layer = 0; layer < given.shape.at(0); ++layer) {
    const auto* first = all.data() + layer * given.columns();
    scores.push_back({1, static_cast<std::uint32_t>(given.columns()), {first, first + given.columns()}});
  }
  give_cascade(run, on, BudgetRounding::kFair, preferences(run.param("P")), scores, "stage_fair", "keep_");
}

void cake_cascade(CaseRun& run, const Backend& on) {
  std::vector<double> h, v, p;
  std::vector<TokenScores> scores;
  const Preference preference{run.param("tau")[0].get<double>(), run.param("tau")[1].get<double>()};
  for (std::uint32_t layer = 0; layer < run.number("L"); ++layer) {
    const std::string suffix = "_" + std::to_string(layer);
    const Observation observation =
        on.observe(run.input("Q" + suffix).head_rows(), run.input("K" + suffix).head_rows(), {});
    h.push_back(observation.dispersion);
    v.push_back(observation.shift);
    p.push_back(preference.of(observation.dispersion, observation.shift));
    scores.push_back(
        on.cake_scores(observation, run.number("Hk"), run.param("gamma").get<float>(), {Pool::kAverage, 5}));
  }
  run.output("H", h);
  run.output("V", v);
  run.output("P", p);
  give_cascade(run, on, BudgetRounding::kFair, p, scores, "stage_fair", "keep_fair_");
  give_cascade(run, on, BudgetRounding::kReference, p, scores, "stage_reference", "keep_reference_");
}

void cake_decode(CaseRun& run, const Backend& on) {
  const HeadRows query = run.input("Q").head_rows();
  const HeadRows keys = run.input("K").head_rows();
  const DecodeRule rule{run.number("b"), run.number("w"), {Pool::kAverage, 5}};
  run.output("score", on.decode_scores(query, keys, rule).values);
  run.output("keep_slots", on.decode_keep(query, keys, rule).tokens);
  const DecodeRule roomy{keys.tokens - rule.window, rule.window, rule.pooling};
  const Selection all = on.decode_keep(query, keys, roomy);
  run.expect(all.tokens.size() == std::size_t{keys.heads} * keys.tokens, "nothing happens while all fits");
}

/// Prompts that are not longer than the window: nothing is scored, all is kept.
void policy(CaseRun& run, const Backend& on) {
  constexpr std::size_t kDim = 16;
  for (const auto& row : run.table()) {
    const auto tokens = row.at("S").get<std::uint32_t>();
    const auto window = row.at("window").get<std::uint32_t>();
    run.expect(has_candidates(tokens, window) == row.at("scored"), row.dump());
    const std::vector<float> zeros(tokens * kDim);
    const Tensor rows = Tensor::of<float>(zeros, {1, tokens, kDim});
    const Observation observation = on.observe(rows.head_rows(), rows.head_rows(), {});
    run.expect(observation.columns == 0, "columns to score: " + row.dump());
    Selection kept;
    if (row.at("method") == "windowkv") {
      const WindowRule rule;
      const auto windows = select_windows(on.window_scores(observation, rule), rule, 0, 0);
      kept = window_tokens(windows, rule, 0, tokens, 1);
    } else {
      const TokenScores scores = row.at("method") == "cake" ? on.cake_scores(observation, 1, kCakeGamma, {})
                                                            : on.snapkv_scores(observation, 1, {});
      kept = on.select_best(scores, 0, tokens);
    }
    run.expect(kept.tokens.size() == tokens, "all is kept: " + row.dump());
  }
}

void snapkv_score(CaseRun& run, const Backend& on) {
  const Observation observation = on.observe(run.input("Q").head_rows(), run.input("K").head_rows(), {});
  const TokenScores average = on.snapkv_scores(observation, run.number("Hk"), {Pool::kAverage, 5});
  run.output("score_avg5", average.values);
  run.output("score_max7", on.snapkv_scores(observation, run.number("Hk"), {Pool::kMaximum, 7}).values);
  run.output("keep", best_rows(on, average, run.number("budget")));
}

void windowkv_from_sums(CaseRun& run, const Backend& on) {
  const std::vector<float> sums = run.input("t").floats();
  const std::uint32_t omega = run.number("omega");
  run.output("score_mean", on.window_scores(sums, run.number("Hq"), {omega, omega}));
  run.output("score_top2", on.window_scores(sums, run.number("Hq"), {omega, 2}));
}

/// Windows that are dropped, as the cases count them.
std::uint32_t dropped(std::uint32_t columns, std::uint32_t budget, std::uint32_t omega) {
  return columns <= budget ? 0 : (columns - budget + omega - 1) / omega;
}

void windowkv_select(CaseRun& run, const Backend& on) {
  const Observation observation = on.observe(run.input("Q").head_rows(), run.input("K").head_rows(), {});
  const std::uint32_t columns = run.number("R");
  run.expect(observation.columns == columns, "R");
  for (const auto& variant : run.param("variants")) {
    const auto key = variant.at("key").get<std::string>();
    const WindowRule rule{variant.at("omega").get<std::uint32_t>(), variant.at("p").get<std::uint32_t>()};
    const auto budget = variant.at("budget").get<std::uint32_t>();
    const std::vector<float> scores = on.window_scores(observation, rule);
    const auto windows = select_windows(scores, rule, columns, budget);
    run.expect(dropped(columns, budget, rule.tokens) == variant.at("drop"), "drop " + key);
    run.output("win_score_" + key, scores);
    run.output("win_keep_" + key, windows);
    run.output("pos_keep_" + key, window_tokens(windows, rule, columns, run.number("alpha"), 1).tokens);
  }
}

void windowkv_select_table(CaseRun& run, const Backend& on) {
  const Observation observation = on.observe(run.input("Q").head_rows(), run.input("K").head_rows(), {});
  const std::uint32_t columns = run.number("R");
  for (const auto& row : run.table()) {
    const auto number = [&](const char* key) { return row.at(key).get<std::uint32_t>(); };
    const WindowRule rule{number("omega"), number("p")};
    const std::vector<float> scores = on.window_scores(observation, rule);
    run.output("win_score_o" + std::to_string(rule.tokens) + "_p" + std::to_string(rule.best), scores);
    const auto windows = select_windows(scores, rule, columns, number("budget"));
    run.expect(windows == row.at("windows").get<std::vector<std::uint32_t>>(), "windows: " + row.dump());
    const Selection kept = window_tokens(windows, rule, columns, 0, 1);
    run.expect(kept.tokens.size() == row.at("kept_review_tokens"), "kept tokens: " + row.dump());
    run.expect((kept.tokens.size() == columns) == row.at("keep_all"), "keep all: " + row.dump());
    run.expect(dropped(columns, number("budget"), rule.tokens) == row.at("drop"), "drop: " + row.dump());
  }
}

void topk_rule(CaseRun& run, const Backend& on) {
  const Tensor& given = run.input("scores");
  const TokenScores scores{static_cast<std::uint32_t>(given.shape.at(0)), static_cast<std::uint32_t>(given.columns()),
                           given.floats()};
  for (const auto& k : run.param("ks")) {
    const auto count = k.get<std::uint32_t>();
    run.output("keep_" + std::to_string(count), best_rows(on, scores, count));
    const Selection selection = on.select_best(scores, count, 0);
    run.expect(selection.tokens == best_rows(on, scores, count), "select_best and best_of differ");
  }
}

std::vector<std::vector<std::uint32_t>> index_of(const Selection& selection) {
  std::vector<std::vector<std::uint32_t>> index;
  for (std::size_t head = 0; head < selection.heads(); ++head) {
    index.emplace_back(selection.of(head).begin(), selection.of(head).end());
  }
  return index;
}

void real_cake(CaseRun& run, const Backend& on) {
  const std::uint32_t tokens = run.number("S"), window = run.number("w"), queries = run.number("queries");
  const Preference preference{run.param("tau")[0].get<double>(), run.param("tau")[1].get<double>()};
  const auto layers = run.param("layers").get<std::vector<std::uint32_t>>();
  std::vector<double> p;
  std::vector<TokenScores> scores;
  for (const std::uint32_t layer : layers) {
    const std::string suffix = "_" + std::to_string(layer);
    const Observation observation = on.observe(rows_from(run.input("Q" + suffix).head_rows(), 0, window),
                                               rows_from(run.input("K" + suffix).head_rows(), 0, tokens), {});
    run.output("H" + suffix, std::vector<double>{observation.dispersion});
    run.output("V" + suffix, std::vector<double>{observation.shift});
    p.push_back(preference.of(observation.dispersion, observation.shift));
    scores.push_back(
        on.cake_scores(observation, observation.query_heads / 3, run.param("gamma").get<float>(), {Pool::kAverage, 5}));
    run.output("score_avg5" + suffix, scores.back().values);
  }
  run.output("P", p);
  // The sets of the file belong to the budgets of the file.
  const Tensor& stages = run.expected("stage_fair");
  const TokenBudget budget{run.number("B_total"), run.number("R"), run.number("floor")};
  std::vector<std::int32_t> given;
  for (std::uint32_t seen = 1; seen <= layers.size(); ++seen) {
    const auto budgets = fair_budgets(std::span(p).first(seen), budget, static_cast<std::uint32_t>(layers.size()));
    for (std::size_t l = 0; l < layers.size(); ++l) {
      given.push_back(l < seen ? static_cast<std::int32_t>(budgets[l]) : -1);
    }
  }
  run.output("stage_fair", given);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string suffix = "_" + std::to_string(layers[l]);
    const auto count = static_cast<std::uint32_t>(stages.integer((layers.size() - 1) * layers.size() + l));
    const Selection kept = on.select_best(scores[l], count, window);
    run.output("keep" + suffix, as_rows(kept.tokens, scores[l].heads));
    const HeadRows keys = rows_from(run.input("K" + suffix).head_rows(), 0, tokens);
    const HeadRows values = rows_from(run.input("V" + suffix).head_rows(), 0, tokens);
    const HeadRows following = rows_from(run.input("Q" + suffix).head_rows(), window, queries);
    run.output("out_full" + suffix, attention(on, following, values.dim, whole(keys, values)).output);
    const auto index = index_of(kept);
    run.output("out_cake" + suffix, attention(on, following, values.dim, gathered(keys, values, index)).output);
  }
}

void real_windowkv(CaseRun& run, const Backend& on) {
  // The stored queries begin 32 positions before the end of the prompt.
  constexpr std::uint32_t kStoredBefore = 32;
  const std::uint32_t tokens = run.number("S"), alpha = run.number("alpha"), columns = run.number("R");
  const std::string leader = "_" + run.param("leader").dump();
  const Observation observation =
      on.observe(rows_from(run.input("Q" + leader).head_rows(), kStoredBefore - alpha, alpha),
                 rows_from(run.input("K" + leader).head_rows(), 0, tokens), {});
  for (const auto& [key, best] : {std::pair{"mean", run.number("p_mean")}, {"top", run.number("p_top")}}) {
    const WindowRule rule{run.number("omega"), best};
    const std::vector<float> scores = on.window_scores(observation, rule);
    run.output(std::string("win_score_") + key, scores);
    const auto windows = select_windows(scores, rule, columns, run.number("budget"));
    run.output(std::string("win_keep_") + key, as_rows(windows, 1));
    for (const char* which : {"leader", "follower"}) {
      const std::string suffix = "_" + run.param(which).dump();
      const HeadRows keys = rows_from(run.input("K" + suffix).head_rows(), 0, tokens);
      const HeadRows values = rows_from(run.input("V" + suffix).head_rows(), 0, tokens);
      const auto index = index_of(window_tokens(windows, rule, columns, alpha, keys.heads));
      run.output(std::string("out_") + key + suffix,
                 attention(on, rows_from(run.input("Q" + suffix).head_rows(), kStoredBefore, run.number("queries")),
                           values.dim, gathered(keys, values, index))
                     .output);
    }
  }
}

}  // namespace

void add_evict_methods(Methods& methods, const Backend& on) {
  methods["cake_score"] = run_on(cake_score, on);
  methods["cake_from_probabilities"] = run_on(cake_from_probabilities, on);
  methods["cake_cascade"] = run_on(cake_cascade, on);
  methods["cake_cascade_from_scores"] = run_on(cake_cascade_from_scores, on);
  methods["cake_decode"] = run_on(cake_decode, on);
  methods["policy"] = run_on(policy, on);
  methods["snapkv_score"] = run_on(snapkv_score, on);
  methods["windowkv_from_sums"] = run_on(windowkv_from_sums, on);
  methods["windowkv_select"] = run_on(windowkv_select, on);
  methods["windowkv_select_table"] = run_on(windowkv_select_table, on);
  methods["topk_rule"] = run_on(topk_rule, on);
  methods["real_cake"] = run_on(real_cake, on);
  methods["real_windowkv"] = run_on(real_windowkv, on);
}

}  // namespace kvern::golden
