// MiniCache: directions, lengths, angles, what is retained, and attention with the segments folded in.

#include <algorithm>
#include <cmath>

#include "kernels/merge.h"
#include "tests/golden_vectors/methods.h"

namespace kvern::golden {

namespace {

/// K or V of two layers, merged.
struct Merged {
  Merged(const Backend& on, const HeadRows& x_rows, const HeadRows& y_rows, float weight)
      : x(x_rows), y(y_rows), on_(on) {
    const std::size_t rows = std::size_t{x.heads} * x.tokens;
    directions.resize(rows * x.dim);
    for (auto* values : {&x_lengths, &y_lengths, &angles}) values->resize(rows);
    on.merge_layers(x, y, weight,
                    {reinterpret_cast<std::byte*>(directions.data()), DType::kFloat32, x_lengths.data(),
                     y_lengths.data(), angles.data()});
    std::vector<float> measured(rows);
    check(merge::measure_angles(x, y, measured, nullptr));
    if (measured != angles) throw std::runtime_error("measure_angles() and merge_layers() differ");
  }

  HeadRows e() const {
    return HeadRows::contiguous(reinterpret_cast<const std::byte*>(directions.data()), DType::kFloat32, x.heads,
                                x.tokens, x.dim);
  }
  const HeadRows& layer(bool deeper) const { return deeper ? y : x; }
  const std::vector<float>& lengths(bool deeper) const { return deeper ? y_lengths : x_lengths; }

  std::vector<std::uint8_t> forced() const {
    std::vector<std::uint8_t> mask;
    for (const float angle : angles) mask.push_back(merge::is_forced(angle) ? 1 : 0);
    return mask;
  }
  std::vector<std::uint8_t> retained(merge::Retention rule, double retain) const {
    merge::Options options;
    options.rule = rule;
    options.retain = retain;
    std::vector<std::uint8_t> mask(angles.size());
    for (std::size_t first = 0; first < angles.size(); first += x.tokens) {
      for (const auto token : merge::retained_tokens(std::span(angles).subspan(first, x.tokens), options)) {
        mask[first + token] = 1;
      }
    }
    return mask;
  }
  /// Rows of one layer as they are restored, [head][token][dim], those of the mask exact.
  std::vector<float> restored(bool deeper, const std::vector<std::uint8_t>& exact) const {
    std::vector<float> rows(directions.size());
    on_.restore_rows(e(), lengths(deeper), reinterpret_cast<std::byte*>(rows.data()));
    for (std::size_t row = 0; row < exact.size(); ++row) {
      for (std::size_t column = 0; column < x.dim && exact[row] != 0; ++column) {
        rows[row * x.dim + column] = original(deeper, row, column);
      }
    }
    return rows;
  }
  float original(bool deeper, std::size_t row, std::size_t column) const {
    const HeadRows& rows = layer(deeper);
    const std::byte* at = rows.row(row / rows.tokens, row % rows.tokens);
    if (rows.dtype == DType::kFloat32) {
      float value = 0;
      std::memcpy(&value, at + 4 * column, sizeof value);
      return value;
    }
    std::uint16_t bits = 0;
    std::memcpy(&bits, at + 2 * column, sizeof bits);
    return from_bfloat16(bits);
  }

  HeadRows x, y;
  std::vector<float> directions, x_lengths, y_lengths, angles;

 private:
  const Backend& on_;
};

/// How the entries of one class are told to attend(): which rows, and their lengths.
struct Class {
  std::vector<std::uint32_t> tokens;
  std::vector<float> key_lengths, value_lengths;
};

AttendRows rows_of(const Merged& merged, bool deeper, bool exact, std::uint32_t head, const Class& of,
                   const std::vector<float>& lengths) {
  AttendRows rows = AttendRows::of(exact ? merged.layer(deeper) : merged.e(), head);
  rows.index = of.tokens.data();
  if (!exact) rows.lengths = lengths.data();
  return rows;
}

/// Attention over one layer of a merged pair, with nothing restored: tokens whose K is exact or shared, and V likewise,
/// make four segments per head.
std::vector<float> attend_merged(const Backend& on, const HeadRows& queries, const Merged& keys,
                                 const std::vector<std::uint8_t>& exact_k, const Merged& values,
                                 const std::vector<std::uint8_t>& exact_v, bool deeper) {
  std::vector<std::vector<AttendSegment>> segments(keys.x.heads);
  std::vector<std::unique_ptr<Class>> classes;
  for (std::uint32_t head = 0; head < keys.x.heads; ++head) {
    for (const bool k : {false, true}) {
      for (const bool v : {false, true}) {
        Class& of = *classes.emplace_back(std::make_unique<Class>());
        for (std::uint32_t token = 0; token < keys.x.tokens; ++token) {
          const std::size_t row = std::size_t{head} * keys.x.tokens + token;
          if ((exact_k[row] != 0) != k || (exact_v[row] != 0) != v) continue;
          of.tokens.push_back(token);
          of.key_lengths.push_back(keys.lengths(deeper)[row]);
          of.value_lengths.push_back(values.lengths(deeper)[row]);
        }
        if (of.tokens.empty()) continue;
        segments[head].push_back({static_cast<std::uint32_t>(of.tokens.size()),
                                  rows_of(keys, deeper, k, head, of, of.key_lengths),
                                  rows_of(values, deeper, v, head, of, of.value_lengths)});
      }
    }
  }
  return attention(on, queries, values.x.dim, segments).output;
}

void give_merged(CaseRun& run, const Merged& merged, const std::string& suffix, double gamma) {
  run.output("Om" + suffix, merged.angles);
  run.output("nx" + suffix, merged.x_lengths);
  run.output("ny" + suffix, merged.y_lengths);
  run.output("e" + suffix, merged.directions);
  run.output("forced" + suffix, merged.forced());
  const auto top = merged.retained(merge::Retention::kTopK, gamma);
  run.output("topk" + suffix, top);
  run.output("range" + suffix, merged.retained(merge::Retention::kRange, gamma));
  run.output("rx" + suffix, merged.restored(false, top));
  run.output("ry" + suffix, merged.restored(true, top));
}

/// y = 0.75 base + 0.5 mix, each product and the sum rounded once, then to bf16 where the case says so.
Tensor mixed(const Tensor& base, const Tensor& mix, bool bfloat16) {
  std::vector<float> values(base.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float a = 0.75F * base.number(i);
    const float b = 0.5F * mix.number(i);
    values[i] = a + b;
    if (bfloat16) values[i] = from_bfloat16(to_bfloat16(values[i]));
  }
  return Tensor::of<float>(values, base.shape);
}

void minicache_merge(CaseRun& run, const Backend& on) {
  const bool generated = run.has_input("base_k");
  const bool bfloat16 = run.param("input_dtype") == "BF16";
  const auto layer = [&](const char* part, bool deeper) -> Tensor {
    const std::string lower = part[0] == 'K' ? "_k" : "_v";
    if (!generated) return run.input(std::string(part) + (deeper ? "y" : "x"));
    const Tensor& base = run.input("base" + lower);
    return deeper ? mixed(base, run.input("mix" + lower), bfloat16) : base;
  };
  const Tensor kx = layer("K", false), ky = layer("K", true), vx = layer("V", false), vy = layer("V", true);
  const auto t = run.param("t").get<float>();
  const auto gamma = run.param("gamma").get<double>();
  const Merged keys(on, kx.head_rows(), ky.head_rows(), t);
  const Merged values(on, vx.head_rows(), vy.head_rows(), t);
  run.expect(merge::top_count(keys.x.tokens, gamma) == run.number("retained"), "the number of retained tokens");
  give_merged(run, keys, "_k", gamma);
  give_merged(run, values, "_v", gamma);
  if (!run.has_input("q")) return;
  const HeadRows queries = run.input("q").head_rows();
  const auto exact_k = keys.retained(merge::Retention::kTopK, gamma);
  const auto exact_v = values.retained(merge::Retention::kTopK, gamma);
  run.output("ox", attend_merged(on, queries, keys, exact_k, values, exact_v, false));
  run.output("oy", attend_merged(on, queries, keys, exact_k, values, exact_v, true));
  run.output("fx", attention(on, queries, values.x.dim, whole(keys.x, values.x)).output);
  run.output("fy", attention(on, queries, values.x.dim, whole(keys.y, values.y)).output);
}

void minicache_vectors(CaseRun& run, const Backend& on) {
  const Merged merged(on, run.input("x").head_rows(), run.input("y").head_rows(), run.param("t").get<float>());
  run.output("Om", merged.angles);
  run.output("e", merged.directions);
  run.output("nx", merged.x_lengths);
  run.output("ny", merged.y_lengths);
  run.output("forced", merged.forced());
  run.output("rx", merged.restored(false, merged.forced()));
  run.output("ry", merged.restored(true, merged.forced()));
}

double relative_error(const std::vector<float>& got, const Merged& merged, bool deeper) {
  double off = 0;
  double all = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double exact = double{merged.original(deeper, i / merged.x.dim, i % merged.x.dim)};
    off += (double{got[i]} - exact) * (double{got[i]} - exact);
    all += exact * exact;
  }
  return std::sqrt(off / all);
}

void real_minicache(CaseRun& run, const Backend& on) {
  // The stored queries begin 32 positions before the end of the prompt.
  constexpr std::uint32_t kStoredBefore = 32;
  const std::string x = "_" + run.param("pair")[0].dump(), y = "_" + run.param("pair")[1].dump();
  const std::uint32_t tokens = run.number("S");
  const auto gamma = run.param("gamma").get<double>();
  const auto merged = [&](const std::string& part) {
    return Merged(on, rows_from(run.input(part + x).head_rows(), 0, tokens),
                  rows_from(run.input(part + y).head_rows(), 0, tokens), run.param("t").get<float>());
  };
  const Merged keys = merged("K"), values = merged("V");
  const auto exact_k = keys.retained(merge::Retention::kTopK, gamma);
  const auto exact_v = values.retained(merge::Retention::kTopK, gamma);
  for (const auto& [of, exact, suffix] : {std::tuple{&keys, &exact_k, "_k"}, {&values, &exact_v, "_v"}}) {
    give_merged(run, *of, suffix, gamma);
    for (const bool deeper : {false, true}) {
      run.output(std::string(deeper ? "relerr_y" : "relerr_x") + suffix,
                 std::vector<double>{relative_error(of->restored(deeper, *exact), *of, deeper)});
    }
  }
  const HeadRows queries = rows_from(run.input("Q" + y).head_rows(), kStoredBefore, run.number("queries"));
  run.output("out_y", attend_merged(on, queries, keys, exact_k, values, exact_v, true));
  const std::vector<std::uint8_t> all(exact_k.size(), 1);
  run.output("out_y_v_only", attend_merged(on, queries, keys, all, values, exact_v, true));
}

}  // namespace

void add_merge_methods(Methods& methods, const Backend& on) {
  methods["minicache_merge"] = run_on(minicache_merge, on);
  methods["minicache_vectors"] = run_on(minicache_vectors, on);
  methods["real_minicache"] = run_on(real_minicache, on);
}

}  // namespace kvern::golden
