// Speed of the kernels per core, in raw bytes, beside memcpy of the same run:
//   kernels_bench [--gib N] [--rounds N]
// Prints one line per step, "kernels.<step>.gb_per_s <value>" and "kernels.<step>.over_memcpy <value>": medians over
// rounds in which all steps take turns, so that noise of the machine meets all of them. Buffers are cycled through, so
// that no step finds its input in a cache.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/keys.h"
#include "bench/steps.h"
#include "kernels/checksum.h"
#include "kernels/container.h"
#include "kernels/copy.h"
#include "kernels/int8_arithmetic.h"
#include "kernels/scratch.h"
#include "kernels/transpose.h"

namespace {

using namespace kvern;
using namespace kvern::bench;

/// A chunk as a small model has it: 2 MiB of bf16 canonical bytes.
constexpr ShardShape kShape = {DType::kBFloat16, 0, 8, 0, 4, 256, 64, 64};
constexpr std::uint32_t kBlockTokens = 32;

/// Transposes a page in the cache and streams it out, as connector/ does.
void stream_transposed(std::byte* page, const std::byte* rows, std::size_t dim, std::size_t element) {
  alignas(64) std::byte tile[kBlockTokens * 64 * 4];
  transpose(tile, kBlockTokens * element, rows, dim * element, kBlockTokens, dim, element);
  stream_copy_unfenced(page, tile, kBlockTokens * dim * element);
}

/// Puts rows where a page of the engine would be: V as rows, K too or transposed as [dim][block].
class PageSink final : public RowSink {
 public:
  PageSink(std::byte* pages, bool transposed) : pages_(pages), transposed_(transposed) {}
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    const std::size_t row = kShape.row_bytes(part);
    std::byte* page = pages_ + kShape.plane_offset(layer, part, head) + token * row;
    if (part == Part::kKey && transposed_) {
      stream_transposed(page, rows, kShape.key_dim, 2);
    } else {
      stream_copy_unfenced(page, rows, count * row);
    }
  }
  std::uint32_t preferred_rows() const override { return kBlockTokens; }

 private:
  std::byte* pages_;
  bool transposed_;
};

ContainerInfo chunk_info() {
  ContainerInfo info;
  info.shape = kShape;
  info.block_tokens = kBlockTokens;
  info.group_layers = kShape.layers;
  info.model_heads = kShape.heads;
  for (std::uint32_t i = 0; i < kShape.tokens / kBlockTokens; ++i) {
    const std::vector<std::uint8_t> hash(32, static_cast<std::uint8_t>(i));
    info.block_hashes.emplace_back(std::span<const std::uint8_t>(hash));
  }
  info.key.last_block = info.block_hashes.back();
  return info;
}

}  // namespace

int main(int argc, char** argv) {
  double gib = 1;
  int rounds = 7;
  CLI::App app("Speed of the kernels per core, in raw bytes, beside memcpy of the same run.");
  app.add_option("--gib", gib, "raw bytes of the working set, GiB")->check(CLI::Range(0.01, 64.0));
  app.add_option("--rounds", rounds, "rounds; the median is printed")->check(CLI::Range(1, 1000));
  CLI11_PARSE(app, argc, argv);

  const std::size_t raw_bytes = kShape.raw_bytes();
  const auto chunks = static_cast<std::size_t>(gib * 1073741824.0 / static_cast<double>(raw_bytes));
  const ContainerInfo info = chunk_info();
  const auto raw = make_codec("raw").value();
  const auto int8 = make_codec("int8").value();
  const std::size_t stride = (container_max_bytes(*raw, info) + 4095) / 4096 * 4096;

  const Scratch input(chunks * stride);
  const Scratch output(chunks * stride);
  const Scratch raw_containers(chunks * stride);
  const Scratch int8_containers(chunks * stride);
  std::memset(output.data(), 1, chunks * stride);
  std::vector<std::vector<std::uint64_t>> checksums(chunks);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> pattern(raw_bytes / 2);
  for (auto& element : pattern) element = to_bfloat16(normal(generator));
  const auto chunk_of = [&](const Scratch& buffer, std::size_t chunk) {
    return std::span<std::byte>(buffer.data() + chunk * stride, stride);
  };
  const auto encode = [&](const Codec& codec, std::size_t chunk, const Scratch& to) {
    value_of(
        encode_container(codec, info, chunk_of(input, chunk).first(raw_bytes), checksums[chunk], chunk_of(to, chunk)));
  };
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
    std::byte* bytes = chunk_of(input, chunk).data();
    std::memcpy(bytes, pattern.data(), raw_bytes);
    for (std::uint32_t layer = 0; layer < kShape.layers; ++layer) {
      for (const Part part : {Part::kKey, Part::kValue}) {
        for (std::uint32_t head = 0; head < kShape.heads; ++head) {
          checksums[chunk].push_back(
              checksum64(bytes + kShape.plane_offset(layer, part, head), kShape.plane_bytes(part)));
        }
      }
    }
    encode(*raw, chunk, raw_containers);
    encode(*int8, chunk, int8_containers);
  }

  const auto decode = [&](const Scratch& containers, std::size_t chunk, bool transposed) {
    PageSink sink(chunk_of(output, chunk).data(), transposed);
    const auto reader = value_of(ContainerReader::parse(chunk_of(containers, chunk)));
    check(reader.decode(0, kShape.layers, 0, kShape.heads, {0, kShape.tokens}, sink));
    stream_fence();
  };
  const auto transpose_pages = [&](std::size_t chunk, std::size_t element) {
    const std::size_t page = kBlockTokens * 64 * element;
    for (std::size_t offset = 0; offset + page <= raw_bytes; offset += page) {
      stream_transposed(chunk_of(output, chunk).data() + offset, chunk_of(input, chunk).data() + offset, 64, element);
    }
    stream_fence();
  };
  std::vector<Step> steps;
  const auto add = [&](const char* name, std::function<void(std::size_t)> run) {
    steps.push_back({name, chunks * raw_bytes, over_chunks(chunks, std::move(run))});
  };
  add("memcpy", [&](std::size_t chunk) {
    std::memcpy(chunk_of(output, chunk).data(), chunk_of(input, chunk).data(), raw_bytes);
  });
  add("stream_copy", [&](std::size_t chunk) {
    stream_copy(chunk_of(output, chunk).data(), chunk_of(input, chunk).data(), raw_bytes);
  });
  add("stream_copy_checksum", [&](std::size_t chunk) {
    stream_copy_checksum(chunk_of(output, chunk).data(), chunk_of(input, chunk).data(), raw_bytes);
  });
  add("checksum", [&](std::size_t chunk) {
    if (fast_checksum64(chunk_of(input, chunk).data(), raw_bytes) == 0) throw std::runtime_error("checksum is 0");
  });
  add("encode_raw", [&](std::size_t chunk) { encode(*raw, chunk, output); });
  add("encode_int8", [&](std::size_t chunk) { encode(*int8, chunk, output); });
  add("decode_raw", [&](std::size_t chunk) { decode(raw_containers, chunk, false); });
  add("decode_int8", [&](std::size_t chunk) { decode(int8_containers, chunk, false); });
  add("decode_raw_transposed_k", [&](std::size_t chunk) { decode(raw_containers, chunk, true); });
  add("decode_int8_transposed_k", [&](std::size_t chunk) { decode(int8_containers, chunk, true); });
  add("transpose_2_bytes", [&](std::size_t chunk) { transpose_pages(chunk, 2); });
  add("transpose_4_bytes", [&](std::size_t chunk) { transpose_pages(chunk, 4); });

  take_turns(steps, rounds, kThreadTime);
  for (const Step& step : steps) print_rates(step, steps.front());
  return 0;
}
