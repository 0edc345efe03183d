// CentroidKV: assignments, counts, centroids, and attention with ln N.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/cluster.h"
#include "tests/golden_vectors/methods.h"

namespace kvern::golden {

namespace {

cluster::Options options_of(CaseRun& run, const std::string& passes) {
  cluster::Options options;
  options.chunk = run.number("chunk");
  options.sinks = run.number("sinks");
  options.recent = run.number("recent");
  options.merges = run.param(passes).get<std::vector<std::uint32_t>>();
  return options;
}

/// Attention over the entries, with or without ln N.
Attended attend_clusters(const Backend& on, const HeadRows& queries, const std::vector<HeadEntries>& heads,
                         std::uint32_t key_dim, std::uint32_t value_dim, bool with_bias) {
  std::vector<std::vector<AttendSegment>> segments;
  std::vector<std::vector<float>> biases;
  for (const HeadEntries& of : heads) {
    auto& bias = biases.emplace_back();
    for (const cluster::Members& members : of.members) bias.push_back(std::log(static_cast<float>(members.count)));
    const auto rows = [&](const std::vector<float>& values, std::uint32_t dim) {
      return AttendRows::of(
          HeadRows::contiguous(reinterpret_cast<const std::byte*>(values.data()), DType::kFloat32, 1, of.entries, dim),
          0);
    };
    AttendSegment segment{of.entries, rows(of.keys, key_dim), rows(of.values, value_dim)};
    if (with_bias) segment.bias = bias.data();
    segments.push_back({segment});
  }
  return attention(on, queries, value_dim, segments);
}

/// Numbers of all heads, one row per head, padded with -1.
template <typename Get>
std::vector<std::int32_t> rows_of(const std::vector<HeadEntries>& heads, std::size_t columns, Get get) {
  std::vector<std::int32_t> rows;
  for (const HeadEntries& of : heads) {
    std::size_t given = 0;
    for (const auto& element : get(of)) {
      rows.push_back(static_cast<std::int32_t>(element));
      ++given;
    }
    rows.insert(rows.end(), columns - std::min(columns, given), -1);
  }
  return rows;
}

template <typename Field>
auto of_members(Field field) {
  return [field](const HeadEntries& of) {
    std::vector<std::uint32_t> values;
    for (const cluster::Members& members : of.members) values.push_back(members.*field);
    return values;
  };
}

/// Sums that merging must not change: of N, of N k and of N v.
void expect_conserved(CaseRun& run, const std::vector<HeadEntries>& heads, const HeadRows& keys,
                      const Tensor& originals) {
  for (std::size_t head = 0; head < heads.size(); ++head) {
    const HeadEntries& of = heads[head];
    std::uint64_t tokens = 0;
    for (const cluster::Members& members : of.members) tokens += members.count;
    run.expect(tokens == keys.tokens, "the counts sum to the tokens");
    for (std::uint32_t column = 0; column < keys.dim; ++column) {
      double merged = 0, before = 0, scale = 0;
      for (std::uint32_t entry = 0; entry < of.entries; ++entry) {
        merged +=
            static_cast<double>(of.members[entry].count) * double{of.keys[std::size_t{entry} * keys.dim + column]};
      }
      for (std::uint32_t token = 0; token < keys.tokens; ++token) {
        const double value = originals.value((head * originals.shape.at(1) + token) * keys.dim + column);
        before += value;
        scale += std::abs(value);
      }
      run.expect(std::abs(merged - before) <= 1e-5 * scale + 1e-6, "the sum of N k stays");
    }
  }
}

void centroid_compress(CaseRun& run, const Backend& on) {
  const HeadRows keys = run.input("K").head_rows();
  const HeadRows values = run.input("V").head_rows();
  const HeadRows queries = run.input("q").head_rows();
  const std::vector<HeadEntries> heads = on.compress(keys, values, options_of(run, "r_full"));
  const std::size_t entries = run.number("entries");
  run.output("assign", rows_of(heads, keys.tokens, [](const auto& of) { return of.assignment; }));
  run.output("N", rows_of(heads, entries, of_members(&cluster::Members::count)));
  run.output("pos", rows_of(heads, entries, of_members(&cluster::Members::position)));
  run.output("pmin", rows_of(heads, entries, of_members(&cluster::Members::first)));
  run.output("pmax", rows_of(heads, entries, of_members(&cluster::Members::last)));
  std::vector<float> key_rows, value_rows;
  for (const HeadEntries& of : heads) {
    key_rows.insert(key_rows.end(), of.keys.begin(), of.keys.end());
    value_rows.insert(value_rows.end(), of.values.begin(), of.values.end());
  }
  run.output("Kc", key_rows);
  run.output("Vc", value_rows);
  expect_conserved(run, heads, keys, run.input("K"));
  const Attended with = attend_clusters(on, queries, heads, keys.dim, values.dim, true);
  run.output("o", with.output);
  run.output("lse", with.lse);
  run.output("o_nobias", attend_clusters(on, queries, heads, keys.dim, values.dim, false).output);
  const Attended full = attention(on, queries, values.dim, whole(keys, values));
  run.output("o_full", full.output);
  run.output("lse_full", full.lse);
  for (std::size_t i = 0; i < full.lse.size(); ++i) {
    run.expect(with.lse[i] <= full.lse[i] + 1e-4F, "merging never adds attention (Jensen)");
  }
}

void real_centroid(CaseRun& run, const Backend& on) {
  // The stored queries begin 32 positions before the end of the prompt.
  constexpr std::uint32_t kStoredBefore = 32;
  const std::string layer = "_" + run.param("layer").dump();
  const std::uint32_t tokens = run.number("S");
  const HeadRows keys = rows_from(run.input("K" + layer).head_rows(), 0, tokens);
  const HeadRows values = rows_from(run.input("V" + layer).head_rows(), 0, tokens);
  const HeadRows queries = rows_from(run.input("Q" + layer).head_rows(), kStoredBefore, run.number("queries"));
  const Attended full = attention(on, queries, values.dim, whole(keys, values));
  for (const std::string suffix : {"_2x", "_4x"}) {
    const std::vector<HeadEntries> heads = on.compress(keys, values, options_of(run, "r" + suffix));
    run.output("assign" + suffix, rows_of(heads, tokens, [](const auto& of) { return of.assignment; }));
    run.output("N" + suffix,
               rows_of(heads, run.expected("N" + suffix).columns(), of_members(&cluster::Members::count)));
    expect_conserved(run, heads, keys, run.input("K" + layer));
    const Attended got = attend_clusters(on, queries, heads, keys.dim, values.dim, true);
    run.output("out" + suffix, got.output);
    double off = 0, all = 0;
    for (std::size_t i = 0; i < got.output.size(); ++i) {
      const double difference = double{got.output[i]} - double{full.output[i]};
      off += difference * difference;
      all += double{full.output[i]} * double{full.output[i]};
    }
    run.output("relerr" + suffix, std::vector<double>{std::sqrt(off / all)});
  }
}

}  // namespace

void add_cluster_methods(Methods& methods, const Backend& on) {
  methods["centroid_compress"] = run_on(centroid_compress, on);
  methods["real_centroid"] = run_on(real_centroid, on);
}

}  // namespace kvern::golden
