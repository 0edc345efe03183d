// Speed of the quantisers per core, in raw bytes, beside memcpy of the same run:
//   kernels_quantise_bench [--gib N] [--rounds N]
// Prints one line per step, "kernels.<step>.gb_per_s <value>" and "kernels.<step>.over_memcpy <value>": medians over
// rounds in which all steps take turns, so that noise of the machine meets all of them. Buffers are cycled through, so
// that no step finds its input in a cache. Decoding goes by way of a tile in the cache into pages, as loads do.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/steps.h"
#include "kernels/codec.h"
#include "kernels/copy.h"
#include "kernels/element.h"
#include "kernels/scratch.h"

namespace {

using namespace kvern;
using namespace kvern::bench;

/// A chunk as a small model has it: 2 MiB of bf16 canonical bytes.
constexpr ShardShape kShape = {DType::kBFloat16, 0, 4, 0, 4, 256, 128, 128};
constexpr std::uint32_t kBlockTokens = 32;

class PageSink final : public RowSink {
 public:
  explicit PageSink(std::byte* pages) : pages_(pages) {}
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    const std::size_t row = kShape.row_bytes(part);
    stream_copy_unfenced(pages_ + kShape.plane_offset(layer, part, head) + token * row, rows, count * row);
  }
  std::uint32_t preferred_rows() const override { return kBlockTokens; }

 private:
  std::byte* pages_;
};

}  // namespace

int main(int argc, char** argv) {
  double gib = 0.5;
  int rounds = 7;
  CLI::App app("Speed of the quantisers per core, in raw bytes, beside memcpy of the same run.");
  app.add_option("--gib", gib, "raw bytes of the working set, GiB")->check(CLI::Range(0.01, 64.0));
  app.add_option("--rounds", rounds, "rounds; the median is printed")->check(CLI::Range(1, 1000));
  CLI11_PARSE(app, argc, argv);

  const std::size_t raw_bytes = kShape.raw_bytes();
  const auto chunks =
      std::max<std::size_t>(1, static_cast<std::size_t>(gib * 1073741824.0 / static_cast<double>(raw_bytes)));
  const Scratch input(chunks * raw_bytes);
  const Scratch output(chunks * raw_bytes);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> pattern(raw_bytes / 2);
  for (auto& element : pattern) element = to_bfloat16(normal(generator));
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
    std::memcpy(input.data() + chunk * raw_bytes, pattern.data(), raw_bytes);
  }

  std::memset(output.data(), 1, chunks * raw_bytes);
  std::vector<Step> steps;
  const auto add = [&](std::string name, std::function<void(std::size_t)> run) {
    steps.push_back({std::move(name), chunks * raw_bytes, over_chunks(chunks, std::move(run))});
  };
  add("memcpy", [&](std::size_t chunk) {
    std::memcpy(output.data() + chunk * raw_bytes, input.data() + chunk * raw_bytes, raw_bytes);
  });
  struct Coded {
    std::shared_ptr<const Codec> codec;
    std::vector<SectionPlan> plan;
    std::size_t bytes = 0;
  };
  std::vector<std::unique_ptr<Scratch>> containers;
  for (const char* name : {"fp8", "int8", "int8r", "int4", "int3", "int2"}) {
    Coded coded{make_codec(name).value(), {}, 0};
    coded.plan = coded.codec->plan(kShape);
    for (const SectionPlan& section : coded.plan) coded.bytes += (section.max_bytes + 63) / 64 * 64;
    std::byte* sections = containers.emplace_back(std::make_unique<Scratch>(chunks * coded.bytes))->data();
    const auto encode = [&, coded, sections](std::size_t chunk) {
      std::byte* out = sections + chunk * coded.bytes;
      const std::byte* planes = input.data() + chunk * raw_bytes;
      for (const SectionPlan& section : coded.plan) {
        const Part part = section.extent.has_key ? Part::kKey : Part::kValue;
        const std::byte* plane = planes + kShape.plane_offset(section.extent.layer, part, section.extent.head);
        value_of(
            coded.codec->encode(kShape, section.extent, {plane, kShape.plane_bytes(part)}, {out, section.max_bytes}));
        out += (section.max_bytes + 63) / 64 * 64;
      }
    };
    const auto decode = [&, coded, sections](std::size_t chunk) {
      PageSink sink(output.data() + chunk * raw_bytes);
      const std::byte* in = sections + chunk * coded.bytes;
      for (const SectionPlan& section : coded.plan) {
        check(coded.codec->decode(kShape, section.extent, {in, section.max_bytes}, {0, kShape.tokens}, 0, kShape.heads,
                                  sink));
        in += (section.max_bytes + 63) / 64 * 64;
      }
      stream_fence();
    };
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) encode(chunk);
    add(std::string("encode_") + name, encode);
    add(std::string("decode_") + name, decode);
  }

  take_turns(steps, rounds, kThreadTime);
  for (const Step& step : steps) {
    // int8 is there to compare with; kernels_bench prints it.
    const bool reference = step.name == "encode_int8" || step.name == "decode_int8" || step.name == "memcpy";
    print_rates(step, steps.front(), reference ? "# kernels" : "kernels");
  }
  return 0;
}
