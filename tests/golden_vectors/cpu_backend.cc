#include <algorithm>

#include "kernels/cpu/int8.h"
#include "kernels/cpu/quantise.h"
#include "tests/golden_vectors/backend.h"
#include "tests/kernels/samples.h"

namespace kvern::golden {

namespace {

using namespace evict;

/// Both kinds of forms, called alike.
bool encode_section(const int8::Form& form, const std::byte* plane, std::byte* section) {
  return int8::encode_plane(form, plane, reinterpret_cast<std::uint16_t*>(section),
                            reinterpret_cast<std::int8_t*>(section + form.codes_offset()));
}
bool encode_section(const quantise::Form& form, const std::byte* plane, std::byte* section) {
  return quantise::encode_plane(form, plane, section);
}
bool decode_section(const int8::Form& form, const std::byte* section, std::byte* rows) {
  return int8::decode_rows(form, reinterpret_cast<const std::uint16_t*>(section),
                           reinterpret_cast<const std::int8_t*>(section + form.codes_offset()), 0, form.tokens, rows);
}
bool decode_section(const quantise::Form& form, const std::byte* section, std::byte* rows) {
  return quantise::decode_rows(form, section, 0, form.tokens, rows);
}

template <typename Form>
std::vector<std::byte> encoded(const Form& form, std::span<const std::byte> plane) {
  AlignedBytes section(form.section_bytes());
  if (!encode_section(form, plane.data(), section.span().data())) throw std::runtime_error("an element is not finite");
  return {section.span().begin(), section.span().end()};
}

template <typename Form>
std::vector<std::byte> decoded(const Form& form, std::span<const std::byte> section) {
  std::vector<std::byte> rows(std::size_t{form.tokens} * form.dim * dtype_bytes(form.dtype));
  if (!decode_section(form, AlignedBytes(section).span().data(), rows.data())) {
    throw std::runtime_error("a scale or code is none that encoding makes");
  }
  return rows;
}

class CpuBackend final : public Backend {
 public:
  Observation observe(const HeadRows& queries, const HeadRows& keys, const ObservationOptions& options) const override {
    ObservationWorkspace workspace;
    Observation observation;
    check(evict::observe(queries, keys, options, workspace, nullptr, observation));
    return observation;
  }
  TokenScores cake_scores(const Observation& observation, std::uint32_t kv_heads, float gamma,
                          const Pooling& pooling) const override {
    return check(evict::cake_scores(observation, kv_heads, gamma, pooling, nullptr));
  }
  TokenScores snapkv_scores(const Observation& observation, std::uint32_t kv_heads,
                            const Pooling& pooling) const override {
    return check(evict::snapkv_scores(observation, kv_heads, pooling, nullptr));
  }
  TokenScores decode_scores(const HeadRows& query, const HeadRows& keys, const DecodeRule& rule) const override {
    ObservationWorkspace workspace;
    return check(evict::decode_scores(query, keys, rule, workspace, nullptr));
  }
  Selection decode_keep(const HeadRows& query, const HeadRows& keys, const DecodeRule& rule) const override {
    ObservationWorkspace workspace;
    return check(evict::decode_keep(query, keys, rule, workspace, nullptr));
  }
  std::vector<float> window_scores(const Observation& observation, const WindowRule& rule) const override {
    return check(evict::window_scores(observation, rule, nullptr));
  }
  std::vector<float> window_scores(std::span<const float> sums, std::uint32_t heads,
                                   const WindowRule& rule) const override {
    return check(evict::window_scores(sums, heads, rule, nullptr));
  }
  Selection select_best(const TokenScores& scores, std::uint32_t count, std::uint32_t tail) const override {
    return check(evict::select_best(scores, {&count, 1}, tail, nullptr));
  }

  void merge_layers(const HeadRows& x, const HeadRows& y, float weight, const merge::MergedRows& out) const override {
    check(merge::merge_layers(x, y, weight, out, nullptr));
  }
  void restore_rows(const HeadRows& directions, std::span<const float> lengths, std::byte* out) const override {
    check(merge::restore_rows(directions, lengths, out, nullptr));
  }
  std::vector<HeadEntries> compress(const HeadRows& keys, const HeadRows& values,
                                    const cluster::Options& options) const override {
    cluster::Clusters clusters;
    check(cluster::compress(keys, values, options, clusters, nullptr));
    std::vector<HeadEntries> heads;
    for (std::uint32_t head = 0; head < clusters.heads(); ++head) {
      const cluster::HeadClusters of = clusters.head(head);
      heads.push_back({of.entries,
                       {of.keys.begin(), of.keys.end()},
                       {of.values.begin(), of.values.end()},
                       {of.members.begin(), of.members.end()},
                       {of.assignment.begin(), of.assignment.end()}});
    }
    return heads;
  }

  rope::Turns turns_at(std::span<const double> inverse_frequencies,
                       std::span<const std::int64_t> positions) const override {
    return rope::Turns::at(inverse_frequencies, positions);
  }
  std::vector<float> rotate(const HeadRows& rows, const rope::Turns& turns, rope::Direction direction) const override {
    std::vector<float> out(std::size_t{rows.heads} * rows.tokens * rows.dim);
    check(rope::rotate(rows, turns, rope::Style::kNeox, direction, DType::kFloat32,
                       reinterpret_cast<std::byte*>(out.data())));
    return out;
  }

  std::vector<std::byte> encode(const quantise::Form& form, std::span<const std::byte> plane) const override {
    return encoded(form, plane);
  }
  std::vector<std::byte> encode(const int8::Form& form, std::span<const std::byte> plane) const override {
    return encoded(form, plane);
  }
  std::vector<std::byte> decode(const quantise::Form& form, std::span<const std::byte> section) const override {
    return decoded(form, section);
  }
  std::vector<std::byte> decode(const int8::Form& form, std::span<const std::byte> section) const override {
    return decoded(form, section);
  }

  Attended attend(const AttendProblem& problem) const override {
    check(problem.validate());
    std::vector<float> workspace(attend_workspace_floats(problem));
    const std::size_t rows = std::size_t{problem.queries.heads} * problem.queries.tokens;
    Attended result{std::vector<float>(rows * problem.value_dim), std::vector<float>(rows)};
    check(kvern::attend(problem, workspace, result.output, result.lse, nullptr));
    return result;
  }
};

}  // namespace

const Backend& cpu_backend() {
  static const CpuBackend backend;
  return backend;
}

}  // namespace kvern::golden
