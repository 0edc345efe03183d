// CAKE, SnapKV, WindowKV, H2O and StreamingLLM: scores, budgets, selections.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/cascade.h"
#include "kernels/decode_eviction.h"
#include "kernels/heavy_hitters.h"
#include "kernels/layer_budgets.h"
#include "kernels/observation.h"
#include "kernels/preference_budgets.h"
#include "kernels/selection.h"
#include "kernels/token_scores.h"
#include "kernels/window_scores.h"
#include "tests/golden_vectors/methods.h"

namespace kvern::golden {

namespace {

using namespace evict;
using Pool = Pooling::Kind;

/// Values whose printed form has nine decimals.
constexpr double kPrinted = 2e-9;

Observation observed(const HeadRows& queries, const HeadRows& keys, std::optional<float> scale = std::nullopt) {
  ObservationOptions options;
  options.scale = scale;
  ObservationWorkspace workspace;
  Observation observation;
  check(observe(queries, keys, options, workspace, nullptr, observation));
  return observation;
}

/// The `count` best of every head, one row per head.
std::vector<std::uint32_t> best_rows(const TokenScores& scores, std::size_t count) {
  std::vector<std::uint32_t> rows;
  for (std::uint32_t head = 0; head < scores.heads; ++head) {
    const auto best = best_of(scores.of(head), count);
    rows.insert(rows.end(), best.begin(), best.end());
  }
  return rows;
}

Tensor as_rows(const std::vector<std::uint32_t>& values, std::size_t rows) {
  return Tensor::of<std::uint32_t>(values, {rows, rows == 0 ? 0 : values.size() / rows});
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

std::vector<double> preferences(const nlohmann::json& json) {
  std::vector<double> values;
  for (const auto& value : json) values.push_back(value.is_number() ? value.get<double>() : std::nan(""));
  return values;
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

void cake_score(CaseRun& run) {
  const Observation observation = observed(run.input("Q").head_rows(), run.input("K").head_rows());
  const auto heads = run.number("Hk");
  const auto gamma = run.param("gamma").get<float>();
  give_preferences(run, observation);
  run.output("lse", observation.lse);
  run.output("head_mean", observation.mean);
  run.output("head_var", observation.variance);
  const TokenScores average = check(cake_scores(observation, heads, gamma, {Pool::kAverage, 5}, nullptr));
  const TokenScores none = check(cake_scores(observation, heads, gamma, {Pool::kNone, 1}, nullptr));
  run.output("score_avg5", average.values);
  run.output("score_none", none.values);
  run.output("score_max7", check(cake_scores(observation, heads, gamma, {Pool::kMaximum, 7}, nullptr)).values);
  for (const auto& budget : run.param("budgets")) {
    const auto count = budget.get<std::uint32_t>();
    run.output("keep_" + std::to_string(count), best_rows(average, count));
    run.output("keep_none_" + std::to_string(count), best_rows(none, count));
  }
}

/// Probabilities become logits of one-hot keys, so that the kernel sees what it would have seen.
void cake_from_probabilities(CaseRun& run) {
  const Tensor& a = run.input("A");
  const std::size_t tokens = a.columns();
  std::vector<float> logits;
  // Far enough below the others to weigh nothing.
  for (const float p : a.floats()) logits.push_back(p > 0 ? std::log(p) : -1000.0F);
  std::vector<float> one_hot(tokens * tokens);
  for (std::size_t i = 0; i < tokens; ++i) one_hot[i * tokens + i] = 1;
  const Tensor queries = Tensor::of<float>(logits, a.shape);
  const Tensor keys = Tensor::of<float>(one_hot, {1, tokens, tokens});
  const Observation observation = observed(queries.head_rows(), keys.head_rows(), 1.0F);
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
    const TokenScores scores = check(cake_scores(observation, 1, gamma, pooling, nullptr));
    run.output(std::string("score_") + name, scores.values);
    run.output(std::string("keep2_") + name, best_rows(scores, 2));
  }
}

void cake_budget(CaseRun& run) {
  for (const auto& row : run.table()) {
    const std::vector<double> all = preferences(row.at("P"));
    const TokenBudget budget{row.at("B_total").get<std::uint64_t>(), row.at("R").get<std::uint32_t>(),
                             static_cast<std::uint32_t>(row.at("floor").get<double>())};
    for (const auto& stage : row.at("stages")) {
      const std::string where = row.dump().substr(0, 80) + " m = " + stage.at("m").dump();
      const auto seen = std::span(all).first(stage.at("m").get<std::size_t>());
      const std::vector<double> shares = preference_shares(seen, budget);
      const auto expected = stage.at("real").get<std::vector<double>>();
      run.expect(shares.size() == expected.size(), "number of shares: " + where);
      for (std::size_t i = 0; i < shares.size(); ++i) {
        run.expect(std::abs(shares[i] - expected[i]) <= kPrinted * std::max(1.0, expected[i]), "real: " + where);
      }
      run.expect(fair_budgets(seen, budget, row.at("L").get<std::uint32_t>()) == stage.at("fair"), "fair: " + where);
      if (!stage.at("reference").is_null()) {
        run.expect(reference_budgets(seen, budget) == stage.at("reference"), "reference: " + where);
      }
    }
  }
}

/// Runs the cascade of a case over the layers' preferences and scores, and gives the stages and what is kept.
void give_cascade(CaseRun& run, BudgetRounding rounding, std::span<const double> layer_preferences,
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
    run.expect(
        candidates_of(kept, options.window) ==
            candidates_of(check(select_best(scores[layer], {&count, 1}, options.window, nullptr)), options.window),
        "cascade and one eviction differ in layer " + std::to_string(layer));
  }
}

void cake_cascade_from_scores(CaseRun& run) {
  const Tensor& given = run.input("scores");
  std::vector<TokenScores> scores;
  const auto all = given.floats();
  for (std::size_t layer = 0; layer < given.shape.at(0); ++layer) {
    const auto* first = all.data() + layer * given.columns();
    scores.push_back({1, static_cast<std::uint32_t>(given.columns()), {first, first + given.columns()}});
  }
  give_cascade(run, BudgetRounding::kFair, preferences(run.param("P")), scores, "stage_fair", "keep_");
}

void cake_cascade(CaseRun& run) {
  std::vector<double> h, v, p;
  std::vector<TokenScores> scores;
  const Preference preference{run.param("tau")[0].get<double>(), run.param("tau")[1].get<double>()};
  for (std::uint32_t layer = 0; layer < run.number("L"); ++layer) {
    const std::string suffix = "_" + std::to_string(layer);
    const Observation observation = observed(run.input("Q" + suffix).head_rows(), run.input("K" + suffix).head_rows());
    h.push_back(observation.dispersion);
    v.push_back(observation.shift);
    p.push_back(preference.of(observation.dispersion, observation.shift));
    scores.push_back(check(
        cake_scores(observation, run.number("Hk"), run.param("gamma").get<float>(), {Pool::kAverage, 5}, nullptr)));
  }
  run.output("H", h);
  run.output("V", v);
  run.output("P", p);
  give_cascade(run, BudgetRounding::kFair, p, scores, "stage_fair", "keep_fair_");
  give_cascade(run, BudgetRounding::kReference, p, scores, "stage_reference", "keep_reference_");
}

void cake_decode(CaseRun& run) {
  const HeadRows query = run.input("Q").head_rows();
  const HeadRows keys = run.input("K").head_rows();
  const DecodeRule rule{run.number("b"), run.number("w"), {Pool::kAverage, 5}};
  ObservationWorkspace workspace;
  run.output("score", check(decode_scores(query, keys, rule, workspace, nullptr)).values);
  run.output("keep_slots", check(decode_keep(query, keys, rule, workspace, nullptr)).tokens);
  const DecodeRule roomy{keys.tokens - rule.window, rule.window, rule.pooling};
  const Selection all = check(decode_keep(query, keys, roomy, workspace, nullptr));
  run.expect(all.tokens.size() == std::size_t{keys.heads} * keys.tokens, "nothing happens while all fits");
}

void cake_policy(CaseRun& run) {
  for (const auto& row : run.table()) {
    const auto number = [&](const char* key) { return row.at(key).get<std::uint32_t>(); };
    const std::uint32_t tokens = number("S"), cache = number("C"), window = number("w");
    run.expect(has_candidates(tokens, window) == row.at("score"), "score: " + row.dump());
    run.expect(evicts(PrefillRule::kReference, tokens, cache, window) == row.at("evict_reference"), row.dump());
    run.expect(evicts(PrefillRule::kStrict, tokens, cache, window) == row.at("evict_strict"), row.dump());
  }
}

/// Prompts that are not longer than the window: nothing is scored, all is kept.
void policy(CaseRun& run) {
  constexpr std::size_t kDim = 16;
  for (const auto& row : run.table()) {
    const auto tokens = row.at("S").get<std::uint32_t>();
    const auto window = row.at("window").get<std::uint32_t>();
    run.expect(has_candidates(tokens, window) == row.at("scored"), row.dump());
    const std::vector<float> zeros(tokens * kDim);
    const Tensor rows = Tensor::of<float>(zeros, {1, tokens, kDim});
    const Observation observation = observed(rows.head_rows(), rows.head_rows());
    run.expect(observation.columns == 0, "columns to score: " + row.dump());
    Selection kept;
    if (row.at("method") == "windowkv") {
      const WindowRule rule;
      const auto windows = select_windows(check(window_scores(observation, rule, nullptr)), rule, 0, 0);
      kept = window_tokens(windows, rule, 0, tokens, 1);
    } else {
      const TokenScores scores = row.at("method") == "cake"
                                     ? check(cake_scores(observation, 1, kCakeGamma, {}, nullptr))
                                     : check(snapkv_scores(observation, 1, {}, nullptr));
      const std::uint32_t none = 0;
      kept = check(select_best(scores, {&none, 1}, tokens, nullptr));
    }
    run.expect(kept.tokens.size() == tokens, "all is kept: " + row.dump());
  }
}

void snapkv_score(CaseRun& run) {
  const Observation observation = observed(run.input("Q").head_rows(), run.input("K").head_rows());
  const TokenScores average = check(snapkv_scores(observation, run.number("Hk"), {Pool::kAverage, 5}, nullptr));
  run.output("score_avg5", average.values);
  run.output("score_max7", check(snapkv_scores(observation, run.number("Hk"), {Pool::kMaximum, 7}, nullptr)).values);
  run.output("keep", best_rows(average, run.number("budget")));
}

std::vector<std::uint8_t> mask_of(const Selection& selection, std::size_t tokens) {
  std::vector<std::uint8_t> mask(selection.heads() * tokens);
  for (std::size_t head = 0; head < selection.heads(); ++head) {
    for (const std::uint32_t token : selection.of(head)) mask[head * tokens + token] = 1;
  }
  return mask;
}

void h2o_streaming(CaseRun& run) {
  const HeadRows queries = run.input("Q").head_rows();
  const HeadRows keys = run.input("K").head_rows();
  ObservationWorkspace workspace;
  const auto scores = [&](ColumnSum kind) {
    return check(heavy_hitter_scores(queries, keys, kind, workspace, nullptr));
  };
  const auto kept = [&](const TokenScores& of) {
    return check(select_heavy_and_recent(of, run.number("heavy"), run.number("recent"), nullptr));
  };
  const TokenScores sum = scores(ColumnSum::kSum);
  const TokenScores mean = scores(ColumnSum::kMean);
  run.output("score_sum", sum.values);
  run.output("score_mean", mean.values);
  run.output("keep_sum", as_rows(kept(sum).tokens, keys.heads));
  run.output("keep_mean", as_rows(kept(mean).tokens, keys.heads));
  run.output("mask_sum", mask_of(kept(sum), keys.tokens));
  run.output("streaming_mask",
             mask_of(select_sinks_and_recent(1, keys.tokens, run.number("sinks"), run.number("streaming_recent")),
                     keys.tokens));
}

void h2o_decode(CaseRun& run) {
  const HeadRows queries = run.input("Q").head_rows();
  const HeadRows keys = run.input("K").head_rows();
  const std::uint32_t prompt = run.number("S"), heavy = run.number("heavy"), recent = run.number("recent");
  ObservationWorkspace workspace;
  TokenScores sums = check(heavy_hitter_scores(rows_from(queries, 0, prompt), rows_from(keys, 0, prompt),
                                               ColumnSum::kSum, workspace, nullptr));
  // Positions that each head holds.
  std::vector<std::vector<std::uint32_t>> held(keys.heads, std::vector<std::uint32_t>(prompt));
  for (auto& positions : held) std::iota(positions.begin(), positions.end(), 0U);
  std::vector<std::uint32_t> kept;
  const auto evict_some = [&] {
    const Selection selection = check(select_heavy_and_recent(sums, heavy, recent, nullptr));
    TokenScores left{sums.heads, heavy + recent, {}};
    for (std::uint32_t head = 0; head < keys.heads; ++head) {
      std::vector<std::uint32_t> positions;
      for (const std::uint32_t slot : selection.of(head)) {
        positions.push_back(held[head][slot]);
        left.values.push_back(sums.of(head)[slot]);
      }
      kept.insert(kept.end(), positions.begin(), positions.end());
      held[head] = positions;
    }
    sums = left;
  };
  evict_some();
  for (std::uint32_t step = 0; step < run.number("steps"); ++step) {
    const std::uint32_t position = prompt + step;
    Selection rows;
    TokenScores grown{sums.heads, sums.tokens + 1, {}};
    for (std::uint32_t head = 0; head < keys.heads; ++head) {
      held[head].push_back(position);
      rows.tokens.insert(rows.tokens.end(), held[head].begin(), held[head].end());
      rows.offsets.push_back(static_cast<std::uint32_t>(rows.tokens.size()));
      grown.values.insert(grown.values.end(), sums.of(head).begin(), sums.of(head).end());
      grown.values.push_back(0);
    }
    std::vector<std::byte> compact(gathered_bytes(keys, rows));
    check(gather_rows(keys, rows, compact, nullptr));
    const HeadRows now = HeadRows::contiguous(compact.data(), keys.dtype, keys.heads, grown.tokens, keys.dim);
    check(add_heavy_hitter_row(rows_from(queries, position, 1), now, workspace, nullptr, grown));
    sums = grown;
    evict_some();
  }
  run.output("kept", as_rows(kept, kept.size() / (heavy + recent)));
}

void windowkv_from_sums(CaseRun& run) {
  const std::vector<float> sums = run.input("t").floats();
  const std::uint32_t omega = run.number("omega");
  run.output("score_mean", check(window_scores(sums, run.number("Hq"), {omega, omega}, nullptr)));
  run.output("score_top2", check(window_scores(sums, run.number("Hq"), {omega, 2}, nullptr)));
}

/// Windows that are dropped, as the cases count them.
std::uint32_t dropped(std::uint32_t columns, std::uint32_t budget, std::uint32_t omega) {
  return columns <= budget ? 0 : (columns - budget + omega - 1) / omega;
}

void windowkv_select(CaseRun& run) {
  const Observation observation = observed(run.input("Q").head_rows(), run.input("K").head_rows());
  const std::uint32_t columns = run.number("R");
  run.expect(observation.columns == columns, "R");
  for (const auto& variant : run.param("variants")) {
    const auto key = variant.at("key").get<std::string>();
    const WindowRule rule{variant.at("omega").get<std::uint32_t>(), variant.at("p").get<std::uint32_t>()};
    const auto budget = variant.at("budget").get<std::uint32_t>();
    const std::vector<float> scores = check(window_scores(observation, rule, nullptr));
    const auto windows = select_windows(scores, rule, columns, budget);
    run.expect(dropped(columns, budget, rule.tokens) == variant.at("drop"), "drop " + key);
    run.output("win_score_" + key, scores);
    run.output("win_keep_" + key, windows);
    run.output("pos_keep_" + key, window_tokens(windows, rule, columns, run.number("alpha"), 1).tokens);
  }
}

void windowkv_select_table(CaseRun& run) {
  const Observation observation = observed(run.input("Q").head_rows(), run.input("K").head_rows());
  const std::uint32_t columns = run.number("R");
  for (const auto& row : run.table()) {
    const auto number = [&](const char* key) { return row.at(key).get<std::uint32_t>(); };
    const WindowRule rule{number("omega"), number("p")};
    const std::vector<float> scores = check(window_scores(observation, rule, nullptr));
    run.output("win_score_o" + std::to_string(rule.tokens) + "_p" + std::to_string(rule.best), scores);
    const auto windows = select_windows(scores, rule, columns, number("budget"));
    run.expect(windows == row.at("windows").get<std::vector<std::uint32_t>>(), "windows: " + row.dump());
    const Selection kept = window_tokens(windows, rule, columns, 0, 1);
    run.expect(kept.tokens.size() == row.at("kept_review_tokens"), "kept tokens: " + row.dump());
    run.expect((kept.tokens.size() == columns) == row.at("keep_all"), "keep all: " + row.dump());
    run.expect(dropped(columns, number("budget"), rule.tokens) == row.at("drop"), "drop: " + row.dump());
  }
}

void windowkv_budget(CaseRun& run) {
  for (const auto& row : run.table()) {
    const auto number = [&](const char* key) { return row.at(key).get<std::uint32_t>(); };
    const LayerGroups groups{number("L"), number("group")};
    run.expect(window_pyramid_implemented(number("C"), groups, number("slope")) == row.at("implemented"), row.dump());
    const auto printed = window_pyramid_printed(number("C"), groups, number("slope"));
    const auto expected = row.at("printed").get<std::vector<double>>();
    run.expect(printed.size() == expected.size(), "number of groups: " + row.dump());
    for (std::size_t i = 0; i < printed.size(); ++i) {
      run.expect(std::abs(printed[i] - expected[i]) <= 1e-5, "printed: " + row.dump());
    }
  }
}

void topk_rule(CaseRun& run) {
  const Tensor& given = run.input("scores");
  const TokenScores scores{static_cast<std::uint32_t>(given.shape.at(0)), static_cast<std::uint32_t>(given.columns()),
                           given.floats()};
  for (const auto& k : run.param("ks")) {
    const auto count = k.get<std::uint32_t>();
    run.output("keep_" + std::to_string(count), best_rows(scores, count));
    const Selection selection = check(select_best(scores, {&count, 1}, 0, nullptr));
    run.expect(selection.tokens == best_rows(scores, count), "select_best and best_of differ");
  }
}

std::vector<std::vector<std::uint32_t>> index_of(const Selection& selection) {
  std::vector<std::vector<std::uint32_t>> index;
  for (std::size_t head = 0; head < selection.heads(); ++head) {
    index.emplace_back(selection.of(head).begin(), selection.of(head).end());
  }
  return index;
}

void real_cake(CaseRun& run) {
  const std::uint32_t tokens = run.number("S"), window = run.number("w"), queries = run.number("queries");
  const Preference preference{run.param("tau")[0].get<double>(), run.param("tau")[1].get<double>()};
  const auto layers = run.param("layers").get<std::vector<std::uint32_t>>();
  std::vector<double> p;
  std::vector<TokenScores> scores;
  for (const std::uint32_t layer : layers) {
    const std::string suffix = "_" + std::to_string(layer);
    const Observation observation = observed(rows_from(run.input("Q" + suffix).head_rows(), 0, window),
                                             rows_from(run.input("K" + suffix).head_rows(), 0, tokens));
    run.output("H" + suffix, std::vector<double>{observation.dispersion});
    run.output("V" + suffix, std::vector<double>{observation.shift});
    p.push_back(preference.of(observation.dispersion, observation.shift));
    scores.push_back(check(cake_scores(observation, observation.query_heads / 3, run.param("gamma").get<float>(),
                                       {Pool::kAverage, 5}, nullptr)));
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
    const Selection kept = check(select_best(scores[l], {&count, 1}, window, nullptr));
    run.output("keep" + suffix, as_rows(kept.tokens, scores[l].heads));
    const HeadRows keys = rows_from(run.input("K" + suffix).head_rows(), 0, tokens);
    const HeadRows values = rows_from(run.input("V" + suffix).head_rows(), 0, tokens);
    const HeadRows following = rows_from(run.input("Q" + suffix).head_rows(), window, queries);
    run.output("out_full" + suffix, attention(following, values.dim, whole(keys, values)).output);
    const auto index = index_of(kept);
    run.output("out_cake" + suffix, attention(following, values.dim, gathered(keys, values, index)).output);
  }
}

void real_windowkv(CaseRun& run) {
  // The stored queries begin 32 positions before the end of the prompt.
  constexpr std::uint32_t kStoredBefore = 32;
  const std::uint32_t tokens = run.number("S"), alpha = run.number("alpha"), columns = run.number("R");
  const std::string leader = "_" + run.param("leader").dump();
  const Observation observation = observed(rows_from(run.input("Q" + leader).head_rows(), kStoredBefore - alpha, alpha),
                                           rows_from(run.input("K" + leader).head_rows(), 0, tokens));
  for (const auto& [key, best] : {std::pair{"mean", run.number("p_mean")}, {"top", run.number("p_top")}}) {
    const WindowRule rule{run.number("omega"), best};
    const std::vector<float> scores = check(window_scores(observation, rule, nullptr));
    run.output(std::string("win_score_") + key, scores);
    const auto windows = select_windows(scores, rule, columns, run.number("budget"));
    run.output(std::string("win_keep_") + key, as_rows(windows, 1));
    for (const char* which : {"leader", "follower"}) {
      const std::string suffix = "_" + run.param(which).dump();
      const HeadRows keys = rows_from(run.input("K" + suffix).head_rows(), 0, tokens);
      const HeadRows values = rows_from(run.input("V" + suffix).head_rows(), 0, tokens);
      const auto index = index_of(window_tokens(windows, rule, columns, alpha, keys.heads));
      run.output(std::string("out_") + key + suffix,
                 attention(rows_from(run.input("Q" + suffix).head_rows(), kStoredBefore, run.number("queries")),
                           values.dim, gathered(keys, values, index))
                     .output);
    }
  }
}

}  // namespace

void add_evict_methods(Methods& methods) {
  methods["cake_score"] = cake_score;
  methods["cake_from_probabilities"] = cake_from_probabilities;
  methods["cake_budget"] = cake_budget;
  methods["cake_cascade"] = cake_cascade;
  methods["cake_cascade_from_scores"] = cake_cascade_from_scores;
  methods["cake_decode"] = cake_decode;
  methods["cake_policy"] = cake_policy;
  methods["policy"] = policy;
  methods["snapkv_score"] = snapkv_score;
  methods["h2o_streaming"] = h2o_streaming;
  methods["h2o_decode"] = h2o_decode;
  methods["windowkv_from_sums"] = windowkv_from_sums;
  methods["windowkv_select"] = windowkv_select;
  methods["windowkv_select_table"] = windowkv_select_table;
  methods["windowkv_budget"] = windowkv_budget;
  methods["topk_rule"] = topk_rule;
  methods["real_cake"] = real_cake;
  methods["real_windowkv"] = real_windowkv;
}

}  // namespace kvern::golden
