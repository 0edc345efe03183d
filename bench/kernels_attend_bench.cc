// Speed of decode attention on one thread, beside memcpy of the same run:
//   kernels_attend_bench [--tokens N] [--rounds N]
// One layer of 32 query and 8 KV heads, dim 128, bf16, one query. Prints "kernels.attend_full.ms", ".gb_per_s" (of K
// and V as they lie in memory), ".over_memcpy" and ".over_read" (reading K and V once, as the checksum does), the same
// for a cache of 1/32 of the tokens ("attend_1_32") and for one of int8 ("attend_int8", in raw bytes), and
// "kernels.attend_1_32.speedup". Medians over rounds in which all take turns, after one that warms up.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/steps.h"
#include "kernels/attend.h"
#include "kernels/chain.h"
#include "kernels/checksum.h"
#include "kernels/element.h"

namespace {

using namespace kvern;
using namespace kvern::bench;

constexpr std::uint32_t kQueryHeads = 32;
constexpr std::uint32_t kHeads = 8;
constexpr std::uint32_t kDim = 128;
constexpr std::uint32_t kFraction = 32;
/// Small caches are attended to in turn, so that none is found in the processor's cache.
constexpr std::uint32_t kCopies = kFraction;

/// A call of attend() with all that it needs.
class Attention {
 public:
  Attention(const HeadRows& queries, std::vector<std::vector<AttendSegment>> segments)
      : segments_(std::move(segments)), heads_(segments_.begin(), segments_.end()) {
    problem_ = {queries, kDim, 0, nullptr, heads_};
    workspace_.resize(attend_workspace_floats(problem_));
    output_.resize(kQueryHeads * kDim);
    lse_.resize(kQueryHeads);
  }
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;
  void run() { check(attend(problem_, workspace_, output_, lse_, nullptr)); }

 private:
  std::vector<std::vector<AttendSegment>> segments_;
  std::vector<std::span<const AttendSegment>> heads_;
  AttendProblem problem_;
  std::vector<float> workspace_, output_, lse_;
};

/// K or V of one head in a form.
struct Encoded {
  Encoded(const PlaneForm& form, const PlaneShape& shape, const std::byte* rows) : bytes(form.max_bytes(shape) + 64) {
    const std::size_t offset = (64 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) % 64;
    const auto out = std::span(bytes).subspan(offset, form.max_bytes(shape));
    const std::size_t size = value_of(form.encode(shape, {rows, shape.bytes()}, out));
    reader = std::make_unique<PlaneReader>(form, shape, out.first(size));
  }
  std::vector<std::byte> bytes;
  std::unique_ptr<PlaneReader> reader;
};

}  // namespace

int main(int argc, char** argv) {
  std::uint32_t tokens = 32768;
  int rounds = 9;
  CLI::App app("Speed of decode attention on one thread, beside memcpy of the same run.");
  app.add_option("--tokens", tokens, "tokens of the full cache")->check(CLI::Range(1024, 1 << 20));
  app.add_option("--rounds", rounds, "rounds; the median is printed")->check(CLI::Range(1, 1000));
  CLI11_PARSE(app, argc, argv);

  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> pattern(1 << 20);
  for (auto& element : pattern) element = to_bfloat16(normal(generator));
  const std::size_t plane = std::size_t{kHeads} * tokens * kDim * 2;
  std::vector<std::byte> keys(plane), values(plane), copies(2 * plane);
  for (std::size_t at = 0; at < plane; at += 2 * pattern.size()) {
    std::memcpy(&keys[at], pattern.data(), std::min(plane - at, 2 * pattern.size()));
    std::memcpy(&values[at], pattern.data(), std::min(plane - at, 2 * pattern.size()));
  }
  const HeadRows k = HeadRows::contiguous(keys.data(), DType::kBFloat16, kHeads, tokens, kDim);
  const HeadRows v = HeadRows::contiguous(values.data(), DType::kBFloat16, kHeads, tokens, kDim);
  const HeadRows queries = HeadRows::contiguous(reinterpret_cast<const std::byte*>(pattern.data()) + 4096,
                                                DType::kBFloat16, kQueryHeads, 1, kDim);

  const auto part = [&](std::uint32_t begin, std::uint32_t count) {
    std::vector<std::vector<AttendSegment>> segments;
    for (std::uint32_t head = 0; head < kHeads; ++head) {
      AttendSegment segment{count, AttendRows::of(k, head), AttendRows::of(v, head)};
      segment.keys.data += begin * k.token_stride_bytes;
      segment.values.data += begin * v.token_stride_bytes;
      segments.push_back({segment});
    }
    return segments;
  };
  Attention full(queries, part(0, tokens));
  std::vector<std::unique_ptr<Attention>> small;
  for (std::uint32_t i = 0; i < kCopies; ++i) {
    small.push_back(std::make_unique<Attention>(queries, part(i * (tokens / kFraction), tokens / kFraction)));
  }
  const auto form = value_of(parse_chain("int8")).form;
  std::vector<Encoded> encoded;
  std::vector<std::vector<AttendSegment>> of_int8;
  for (std::uint32_t head = 0; head < kHeads; ++head) {
    encoded.emplace_back(*form, PlaneShape{DType::kBFloat16, Part::kKey, tokens, kDim}, k.row(head, 0));
    encoded.emplace_back(*form, PlaneShape{DType::kBFloat16, Part::kValue, tokens, kDim}, v.row(head, 0));
  }
  for (std::uint32_t head = 0; head < kHeads; ++head) {
    of_int8.push_back({{tokens, AttendRows::of(*encoded[2 * head].reader, DType::kBFloat16),
                        AttendRows::of(*encoded[2 * head + 1].reader, DType::kBFloat16)}});
  }
  Attention int8(queries, of_int8);

  const std::size_t raw = 2 * plane;
  std::vector<Step> steps;
  steps.push_back({"memcpy", raw, [&] {
                     std::memcpy(copies.data(), keys.data(), plane);
                     std::memcpy(copies.data() + plane, values.data(), plane);
                   }});
  steps.push_back({"read", raw, [&] {
                     for (const auto* rows : {&keys, &values}) {
                       if (fast_checksum64(rows->data(), plane) == 0) throw std::runtime_error("unlikely");
                     }
                   }});
  steps.push_back({"attend_full", raw, [&] { full.run(); }});
  steps.push_back({"attend_1_32", raw, [&] {
                     for (const auto& one : small) one->run();
                   }});
  steps.push_back({"attend_int8", raw, [&] { int8.run(); }});
  take_turns(steps, rounds, kThreadTime);
  for (const Step& step : std::span(steps).subspan(2)) {
    print_ms(step, step.name == "attend_1_32" ? kCopies : 1);
    print_rates(step, steps[0]);
    std::printf("kernels.%s.over_read %.3f\n", step.name.c_str(), over(step, steps[1]));
  }
  // Both steps stand for the whole cache; one small cache is a kCopies-th of its step.
  std::printf("kernels.attend_1_32.speedup %.2f\n", over(steps[3], steps[2]) * kCopies);
  return 0;
}
