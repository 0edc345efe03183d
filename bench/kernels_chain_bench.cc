// Speed of whole codec chains per core, in raw bytes, beside memcpy of the same run:
//   kernels_chain_bench [--mib N] [--rounds N] [--chain SPEC]...
// A step encodes chunks into containers, checksums included, or decodes them; "rotate" turns bf16 keys by a constant
// shift. Prints "kernels.<step>.gb_per_s" and ".over_memcpy" for each and "kernels.<chain>.bytes", the share of the raw
// bytes: medians over rounds in which all take turns, in processor time of the thread. The numbers are normal, so that
// zstd finds what exponents give and no more.

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
#include "kernels/container.h"
#include "kernels/element.h"
#include "kernels/rope.h"
#include "kernels/scratch.h"

namespace {

using namespace kvern;
using namespace kvern::bench;

/// A chunk as a small model has it: 2 MiB of bf16 canonical bytes.
constexpr ShardShape kShape = {DType::kBFloat16, 0, 4, 0, 4, 256, 128, 128};
constexpr std::uint32_t kBlockTokens = 32;
constexpr std::string_view kRotation = "style=neox,theta=500000,dim=128";

/// Chunks follow one another in a prompt.
ContainerInfo describe(std::size_t chunk) {
  ContainerInfo info;
  info.shape = kShape;
  info.block_tokens = kBlockTokens;
  info.group_layers = kShape.layers;
  info.model_heads = kShape.heads;
  info.position = chunk * kShape.tokens;
  const std::vector<std::uint8_t> hash(32, 1);
  info.block_hashes.assign(kShape.tokens / kBlockTokens, BlockHash(std::span<const std::uint8_t>(hash)));
  info.key.last_block = info.block_hashes.back();
  return info;
}

class PageSink final : public RowSink {
 public:
  explicit PageSink(std::byte* pages) : pages_(pages) {}
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    const std::size_t row = kShape.row_bytes(part);
    std::memcpy(pages_ + kShape.plane_offset(layer, part, head) + token * row, rows, count * row);
  }
  std::uint32_t preferred_rows() const override { return kBlockTokens; }

 private:
  std::byte* pages_;
};

/// "unrotate | int8" as part of a step's name.
std::string plain(std::string spec) {
  std::erase(spec, ' ');
  std::ranges::replace_if(
      spec, [](char c) { return !std::isalnum(static_cast<unsigned char>(c)); }, '_');
  return spec;
}

}  // namespace

int main(int argc, char** argv) {
  std::size_t mib = 128;
  int rounds = 5;
  std::vector<std::string> chains = {"raw | zstd", "unrotate | int8", "int8 | zstd"};
  CLI::App app("Speed of codec chains per core, in raw bytes, beside memcpy of the same run.");
  app.add_option("--mib", mib, "raw bytes of the working set, MiB")->check(CLI::Range(2, 65536));
  app.add_option("--rounds", rounds, "rounds; the median is printed")->check(CLI::Range(1, 1000));
  app.add_option("--chain", chains, "chains to measure");
  CLI11_PARSE(app, argc, argv);

  const std::size_t raw_bytes = kShape.raw_bytes();
  const std::size_t chunks = std::max<std::size_t>(1, (mib << 20) / raw_bytes);
  const Scratch input(chunks * raw_bytes);
  const Scratch output(chunks * raw_bytes);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < raw_bytes / 2; ++i) {
    const std::uint16_t element = to_bfloat16(normal(generator));
    std::memcpy(input.data() + 2 * i, &element, sizeof element);
  }
  for (std::size_t chunk = 1; chunk < chunks; ++chunk) {
    std::memcpy(input.data() + chunk * raw_bytes, input.data(), raw_bytes);
  }
  std::memset(output.data(), 1, chunks * raw_bytes);
  const auto chunk_of = [&](const Scratch& buffer, std::size_t chunk) {
    return buffer.first((chunk + 1) * raw_bytes).subspan(chunk * raw_bytes);
  };

  std::vector<Step> steps;
  const auto add = [&](std::string name, std::function<void(std::size_t)> run) {
    steps.push_back({std::move(name), chunks * raw_bytes, over_chunks(chunks, std::move(run))});
  };
  add("memcpy", [&](std::size_t chunk) {
    std::memcpy(chunk_of(output, chunk).data(), chunk_of(input, chunk).data(), raw_bytes);
  });
  const auto rotation =
      value_of(rope::Parameters::from(value_of(CodecStep::parse("unrotate(" + std::string(kRotation) + ")"))));
  const std::int64_t shift[] = {-1000};
  const rope::Turns turns = rope::Turns::at(rotation.inverse_frequencies(), shift);
  add("rotate", [&](std::size_t chunk) {
    const auto tokens = static_cast<std::uint32_t>(raw_bytes / kShape.row_bytes(Part::kKey));
    const auto rows = HeadRows::contiguous(chunk_of(input, chunk).data(), kShape.dtype, 1, tokens, kShape.key_dim);
    check(rope::rotate(rows, turns, rotation.style, rope::Direction::kForward, kShape.dtype,
                       chunk_of(output, chunk).data()));
  });
  std::vector<std::unique_ptr<Scratch>> memory;
  for (const std::string& chain : chains) {
    const auto codec = value_of(make_codec(chain, kRotation));
    const std::size_t room = (container_max_bytes(*codec, describe(0)) + 63) / 64 * 64;
    const Scratch& containers = *memory.emplace_back(std::make_unique<Scratch>(chunks * room));
    const auto container_of = [&containers, room](std::size_t chunk) {
      return containers.first((chunk + 1) * room).subspan(chunk * room);
    };
    const auto encode = [&, codec, container_of](std::size_t chunk) {
      return value_of(encode_container(*codec, describe(chunk), chunk_of(input, chunk), {}, container_of(chunk)));
    };
    std::size_t bytes = 0;
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) bytes = encode(chunk);
    std::printf("kernels.%s.bytes %.3f\n", plain(chain).c_str(),
                static_cast<double>(bytes) / static_cast<double>(raw_bytes));
    add("encode_" + plain(chain), encode);
    add("decode_" + plain(chain), [&, container_of](std::size_t chunk) {
      const auto reader = value_of(ContainerReader::parse(container_of(chunk)));
      PageSink sink(chunk_of(output, chunk).data());
      check(reader.decode(0, kShape.layers, 0, kShape.heads, {0, kShape.tokens}, sink));
    });
  }

  take_turns(steps, rounds, kThreadTime);
  for (const Step& step : steps) {
    if (step.name != "memcpy") print_rates(step, steps.front());  // kernels_bench prints that
  }
  return 0;
}
