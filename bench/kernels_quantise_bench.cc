// Speed of the quantisers per core, in raw bytes, beside memcpy of the same run:
//   kernels_quantise_bench [--gib N] [--rounds N]
// Prints one line per step, "kernels.<step>.gb_per_s <value>" and "kernels.<step>.over_memcpy <value>": medians over
// rounds in which all steps take turns, so that noise of the machine meets all of them. Buffers are cycled through, so
// that no step finds its input in a cache. Decoding goes by way of a tile in the cache into pages, as loads do.

#include <sys/mman.h>
#include <time.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/codec.h"
#include "kernels/copy.h"
#include "kernels/element.h"

namespace {

using namespace kvern;

/// A chunk as a small model has it: 2 MiB of bf16 canonical bytes.
constexpr ShardShape kShape = {DType::kBFloat16, 0, 4, 0, 4, 256, 128, 128};
constexpr std::uint32_t kBlockTokens = 32;

class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the working set; use a smaller --gib");
    data_ = static_cast<std::byte*>(memory);
    std::memset(data_, 1, bytes);
  }
  ~Buffer() { munmap(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  std::size_t bytes_;
};

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

struct Step {
  std::string name;
  std::function<void(std::size_t chunk)> run;
  std::vector<double> seconds;
};

/// Time that this thread ran: what others do on the machine's cores does not count.
double cpu_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

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
  Buffer input(chunks * raw_bytes);
  Buffer output(chunks * raw_bytes);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> pattern(raw_bytes / 2);
  for (auto& element : pattern) element = to_bfloat16(normal(generator));
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
    std::memcpy(input.data() + chunk * raw_bytes, pattern.data(), raw_bytes);
  }

  std::vector<Step> steps;
  steps.push_back({"memcpy",
                   [&](std::size_t chunk) {
                     std::memcpy(output.data() + chunk * raw_bytes, input.data() + chunk * raw_bytes, raw_bytes);
                   },
                   {}});
  struct Coded {
    std::shared_ptr<const Codec> codec;
    std::vector<SectionPlan> plan;
    std::size_t bytes = 0;
  };
  std::vector<std::unique_ptr<Buffer>> containers;
  for (const char* name : {"fp8", "int8", "int8r", "int4", "int3", "int2"}) {
    Coded coded{make_codec(name).value(), {}, 0};
    coded.plan = coded.codec->plan(kShape);
    for (const SectionPlan& section : coded.plan) coded.bytes += (section.max_bytes + 63) / 64 * 64;
    std::byte* sections = containers.emplace_back(std::make_unique<Buffer>(chunks * coded.bytes))->data();
    const auto encode = [&, coded, sections](std::size_t chunk) {
      std::byte* out = sections + chunk * coded.bytes;
      const std::byte* planes = input.data() + chunk * raw_bytes;
      for (const SectionPlan& section : coded.plan) {
        const Part part = section.extent.has_key ? Part::kKey : Part::kValue;
        const std::byte* plane = planes + kShape.plane_offset(section.extent.layer, part, section.extent.head);
        const auto size =
            coded.codec->encode(kShape, section.extent, {plane, kShape.plane_bytes(part)}, {out, section.max_bytes});
        if (!size) throw std::runtime_error(size.error().to_string());
        out += (section.max_bytes + 63) / 64 * 64;
      }
    };
    const auto decode = [&, coded, sections](std::size_t chunk) {
      PageSink sink(output.data() + chunk * raw_bytes);
      const std::byte* in = sections + chunk * coded.bytes;
      for (const SectionPlan& section : coded.plan) {
        const Status status = coded.codec->decode(kShape, section.extent, {in, section.max_bytes}, {0, kShape.tokens},
                                                  0, kShape.heads, sink);
        if (!status) throw std::runtime_error(status.to_string());
        in += (section.max_bytes + 63) / 64 * 64;
      }
      stream_fence();
    };
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) encode(chunk);
    steps.push_back({std::string("encode_") + name, encode, {}});
    steps.push_back({std::string("decode_") + name, decode, {}});
  }

  for (int round = 0; round < rounds; ++round) {
    for (Step& step : steps) {
      const double start = cpu_seconds();
      for (std::size_t chunk = 0; chunk < chunks; ++chunk) step.run(chunk);
      step.seconds.push_back(cpu_seconds() - start);
    }
  }
  for (const Step& step : steps) {
    // int8 is there to compare with; kernels_bench prints it.
    const bool reference = step.name == "encode_int8" || step.name == "decode_int8" || step.name == "memcpy";
    std::vector<double> ratios;
    for (std::size_t i = 0; i < step.seconds.size(); ++i) {
      ratios.push_back(steps.front().seconds[i] / step.seconds[i]);
    }
    const double bytes = static_cast<double>(chunks * raw_bytes);
    const char* prefix = reference ? "# kernels" : "kernels";
    std::printf("%s.%s.gb_per_s %.2f\n", prefix, step.name.c_str(), bytes / median(step.seconds) / 1e9);
    std::printf("%s.%s.over_memcpy %.3f\n", prefix, step.name.c_str(), median(ratios));
  }
  return 0;
}
