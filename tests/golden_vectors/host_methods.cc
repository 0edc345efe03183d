// What no kernel of a device computes: budgets and their policies, H2O and StreamingLLM, what MiniCache retains, and
// the published quantisation that the stored forms are held against.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/cascade.h"
#include "kernels/heavy_hitters.h"
#include "kernels/layer_budgets.h"
#include "kernels/preference_budgets.h"
#include "tests/golden_vectors/kivi_planes.h"
#include "tests/golden_vectors/methods.h"

namespace kvern::golden {

namespace {

using namespace evict;

/// Values whose printed form has nine decimals.
constexpr double kPrinted = 2e-9;

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

void cake_policy(CaseRun& run) {
  for (const auto& row : run.table()) {
    const auto number = [&](const char* key) { return row.at(key).get<std::uint32_t>(); };
    const std::uint32_t tokens = number("S"), cache = number("C"), window = number("w");
    run.expect(has_candidates(tokens, window) == row.at("score"), "score: " + row.dump());
    run.expect(evicts(PrefillRule::kReference, tokens, cache, window) == row.at("evict_reference"), row.dump());
    run.expect(evicts(PrefillRule::kStrict, tokens, cache, window) == row.at("evict_strict"), row.dump());
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

void minicache_retention(CaseRun& run) {
  const auto angles = run.input("Om").floats();
  for (const auto& of : run.param("cases")) {
    merge::Options options;
    options.rule = of.at("mode") == "range" ? merge::Retention::kRange : merge::Retention::kTopK;
    options.retain = of.at("gamma").get<double>();
    std::vector<std::uint8_t> mask(angles.size());
    for (const auto token : merge::retained_tokens(angles, options)) mask[token] = 1;
    const auto hundredths = std::to_string(std::lround(options.retain * 100));
    run.output(of.at("mode").get<std::string>() + "_" + std::string(3 - hundredths.size(), '0') + hundredths, mask);
  }
  for (const auto& row : run.table()) {
    run.expect(merge::top_count(row.at("S").get<std::size_t>(), row.at("gamma").get<double>()) == row.at("retained"),
               row.dump());
  }
}

void quant_asym(CaseRun& run) {
  const Quantised of(run.input("x"), run.number("bits"), run.number("group"), false);
  run.output("codes", of.codes);
  run.output("scale", of.scales);
  run.output("min", of.lows);
  run.output("dequant", of.dequantised);
  double sum = 0;
  for (const float value : of.dequantised) sum += double{value} * double{value};
  run.output("norm", std::vector<double>{std::sqrt(sum)});
}

}  // namespace

void add_host_methods(Methods& methods) {
  methods["inputs_only"] = [](CaseRun&) {};  // holds what other cases refer to
  methods["cake_budget"] = cake_budget;
  methods["cake_policy"] = cake_policy;
  methods["windowkv_budget"] = windowkv_budget;
  methods["h2o_streaming"] = h2o_streaming;
  methods["h2o_decode"] = h2o_decode;
  methods["minicache_retention"] = minicache_retention;
  methods["quant_asym"] = quant_asym;
}

}  // namespace kvern::golden
