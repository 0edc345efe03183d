// Kernels on the GPU beside a copy within its memory: codec forms in planes of 256 tokens, and what compresses or
// scores one layer in the shape of Llama-3.1-8B (32 query heads, 8 KV heads of 128 bfloat16). A rate counts every byte
// that has to be read or written once; its share is that of the copy, which is counted alike. Medians of times between
// events; inputs are random and rotate through far more memory than the L2 cache holds.

#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cuda/cluster.h"
#include "kernels/cuda/int8.h"
#include "kernels/cuda/key_scores.h"
#include "kernels/cuda/merge.h"
#include "kernels/cuda/observation.h"
#include "kernels/cuda/page_moves.h"
#include "kernels/cuda/quantise.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/selection.h"

namespace kvern::bench {
namespace {

constexpr std::uint32_t kQueryHeads = 32;
constexpr std::uint32_t kHeads = 8;
constexpr std::uint32_t kDim = 128;
constexpr std::uint32_t kWindow = 32;
constexpr std::size_t kElementBytes = 2;
constexpr std::uint32_t kChunkTokens = 256;
/// 256 MiB, several times the L2 cache.
constexpr std::uint32_t kPlanes = 4096;
constexpr std::size_t kPlaneBytes = std::size_t{kChunkTokens} * kDim * kElementBytes;
/// Where inputs are taken from in turn.
constexpr std::size_t kPoolBytes = std::size_t{1} << 30;
constexpr std::uint32_t kLongTokens = 131072;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
void check(const Status& status) {
  if (!status) throw std::runtime_error(status.to_string());
}

/// Device memory that ends with this.
template <typename T>
class Memory {
 public:
  explicit Memory(std::size_t count) {
    check(cudaMalloc(&data_, count * sizeof(T)));
    check(cudaMemset(data_, 0, count * sizeof(T)));
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> get(std::size_t count) const {
    std::vector<T> values(count);
    check(cudaMemcpy(values.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void* data_ = nullptr;
};

/// bfloat16 numbers of about normal distribution. A part is drawn, the rest repeats it at shifted places.
class Pool {
 public:
  Pool() : memory_(kPoolBytes) {
    constexpr std::size_t kDrawn = (std::size_t{16} << 20) + 4096;
    std::vector<std::uint16_t> numbers(kDrawn);
    std::mt19937_64 random(7);
    for (std::uint16_t& number : numbers) {
      // Eight bytes around their mean.
      int sum = -1020;
      const std::uint64_t drawn = random();
      for (unsigned shift = 0; shift < 64; shift += 8) sum += static_cast<int>(drawn >> shift & 0xFFU);
      const float value = static_cast<float>(sum) / 209.0F;
      std::uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof bits);
      number = static_cast<std::uint16_t>(bits >> 16);
    }
    const std::size_t bytes = kDrawn * kElementBytes;
    for (std::size_t at = 0; at < kPoolBytes; at += bytes) {
      check(cudaMemcpy(memory_.data() + at, numbers.data(), std::min(bytes, kPoolBytes - at), cudaMemcpyHostToDevice));
    }
  }
  /// Of the round-th of the parts of so many bytes.
  const std::byte* part(std::size_t bytes, std::size_t round) const {
    return memory_.data() + round % (kPoolBytes / bytes) * bytes;
  }
  HeadRows rows(std::uint32_t heads, std::uint32_t tokens, std::size_t round) const {
    const std::size_t bytes = std::size_t{heads} * tokens * kDim * kElementBytes;
    return HeadRows::contiguous(part(bytes, round), DType::kBFloat16, heads, tokens, kDim);
  }

 private:
  Memory<std::byte> memory_;
};

class Bench {
 public:
  explicit Bench(int rounds) : rounds_(rounds) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
  }
  ~Bench() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  void measure_copy();
  void measure_codecs();
  void measure_scores(std::uint32_t tokens);
  void measure_selection();
  void measure_layers();
  void measure_pages(std::uint32_t heads);
  nlohmann::json results = nlohmann::json::array();

 private:
  /// Times of run(round), which queues work on the stream; a row of the table and of the results.
  double measure(const std::string& name, double bytes, const std::function<void(std::size_t)>& run) {
    constexpr int kWarmUps = 3;
    std::vector<double> times;
    for (int round = 0; round < rounds_ + kWarmUps; ++round) {
      check(cudaEventRecord(begin_, stream_));
      run(static_cast<std::size_t>(round));
      check(cudaEventRecord(end_, stream_));
      check(cudaEventSynchronize(end_));
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, begin_, end_));
      if (round >= kWarmUps) times.push_back(milliseconds);
    }
    std::ranges::sort(times);
    const double milliseconds = times[times.size() / 2];
    const double rate = bytes / milliseconds * 1e-6;
    if (copy_rate_ == 0) copy_rate_ = rate;
    const double share = rate / copy_rate_;
    std::printf("%-34s %9.4f %9.1f %9.0f %7.1f %%\n", name.c_str(), milliseconds, bytes * 0x1p-20, rate, share * 100);
    std::fflush(stdout);
    results.push_back({{"name", name},
                       {"milliseconds", milliseconds},
                       {"fastest_milliseconds", times.front()},
                       {"slowest_milliseconds", times.back()},
                       {"bytes", bytes},
                       {"gb_per_s", rate},
                       {"share_of_copy", share}});
    return rate;
  }
  template <typename Form>
  void measure_codec(const std::string& name, const Form& form);

  const int rounds_;
  const Pool pool_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  double copy_rate_ = 0;
};

void Bench::measure_copy() {
  constexpr std::size_t kCopied = kPoolBytes / 2;
  const Memory<std::byte> to(kCopied);
  measure("copy", 2.0 * kCopied, [&](std::size_t round) {
    check(cudaMemcpyAsync(to.data(), pool_.part(kCopied, round), kCopied, cudaMemcpyDeviceToDevice, stream_));
  });
}

template <typename Form>
void Bench::measure_codec(const std::string& name, const Form& form) {
  constexpr std::size_t kInput = kPlanes * kPlaneBytes;
  const std::size_t stride = (form.section_bytes() + Form::kAlignment - 1) / Form::kAlignment * Form::kAlignment;
  const Memory<std::byte> sections(kPlanes * stride);
  const Memory<std::byte> rows(kInput);
  const Memory<std::uint32_t> flag(1);
  const double bytes = static_cast<double>(kInput) + static_cast<double>(kPlanes * form.section_bytes());
  const std::string part = form.per_channel ? " K" : " V";
  measure(name + part + " encode", bytes, [&](std::size_t round) {
    check(cuda_encode_planes(form, pool_.part(kInput, round), kPlaneBytes, kPlanes, sections.data(), stride,
                             flag.data(), stream_));
  });
  measure(name + part + " decode", bytes, [&](std::size_t) {
    check(cuda_decode_rows(form, sections.data(), stride, kPlanes, 0, kChunkTokens, rows.data(), kPlaneBytes,
                           flag.data(), stream_));
  });
  if (flag.get(1).front() != 0) throw std::runtime_error(name + part + " found its data damaged");
}

void Bench::measure_codecs() {
  using quantise::Kind;
  using quantise::Scheme;
  constexpr std::uint32_t kGroup = 64;
  for (const bool key : {true, false}) {
    measure_codec(
        "int8", int8::Form{DType::kBFloat16, key, kChunkTokens, kDim, key ? kGroup : int8::Form::channel_group(kDim)});
  }
  const std::pair<const char*, Kind> kinds[] = {{"fp8", Kind::kFp8},
                                                {"int4", Kind::kInt4},
                                                {"int3", Kind::kInt3},
                                                {"int2", Kind::kInt2},
                                                {"int8r", Kind::kInt8Residual}};
  for (const auto& [name, kind] : kinds) {
    for (const bool key : {true, false}) {
      measure_codec(name, quantise::Form{DType::kBFloat16, key, kChunkTokens, kDim,
                                         key ? kGroup : quantise::Form::channel_group(kDim, kGroup), kind,
                                         kind == Kind::kFp8 ? Scheme::kSymmetric : Scheme::kAsymmetric});
    }
  }
}

void Bench::measure_scores(std::uint32_t tokens) {
  const std::string at = " " + std::to_string(tokens / 1024) + "k";
  const std::uint32_t columns = tokens - kWindow;
  const std::size_t statistics = std::size_t{kQueryHeads} * columns;
  const HeadRows queries = pool_.rows(kQueryHeads, kWindow, 1);
  const double key_bytes = static_cast<double>(kHeads) * tokens * kDim * kElementBytes;
  const double statistic_bytes = static_cast<double>(statistics) * sizeof(float);
  const double score_bytes = static_cast<double>(kHeads) * tokens * sizeof(float);
  const Memory<float> lse(std::size_t{kQueryHeads} * kWindow);
  const Memory<float> mean(statistics);
  const Memory<float> variance(statistics);
  const Memory<double> dispersion(2);
  const Memory<std::uint64_t> not_finite(1);
  const Memory<std::byte> scratch(evict::cuda_observation_bytes(queries, pool_.rows(kHeads, tokens, 0)));
  const Memory<float> scores(std::size_t{kHeads} * tokens);
  const evict::CudaObservation full{lse.data(), mean.data(), variance.data(), dispersion.data(), not_finite.data()};
  const evict::CudaObservation means{lse.data(), mean.data(), nullptr, nullptr, not_finite.data()};
  const float scale = 1 / std::sqrt(static_cast<float>(kDim));
  const auto observe = [&](const evict::CudaObservation& out, std::size_t round) {
    check(
        evict::cuda_observe(queries, pool_.rows(kHeads, tokens, round), columns, scale, scratch.data(), out, stream_));
  };
  measure("observe, with variances" + at, key_bytes + 2 * statistic_bytes,
          [&](std::size_t round) { observe(full, round); });
  measure("observe, means alone" + at, key_bytes + statistic_bytes, [&](std::size_t round) { observe(means, round); });
  const evict::Pooling pooling;
  measure("cake: observe and score" + at, key_bytes + 4 * statistic_bytes + score_bytes, [&](std::size_t round) {
    observe(full, round);
    check(evict::cuda_cake_scores(mean.data(), variance.data(), kQueryHeads, kHeads, columns, evict::kCakeGamma,
                                  pooling, scores.data(), stream_));
  });
  measure("snapkv: observe and score" + at, key_bytes + 2 * statistic_bytes + score_bytes, [&](std::size_t round) {
    observe(means, round);
    check(evict::cuda_cake_scores(mean.data(), nullptr, kQueryHeads, kHeads, columns, 0, pooling, scores.data(),
                                  stream_));
  });
  const evict::WindowRule rule;
  measure("windowkv: observe and score" + at, key_bytes + 2 * statistic_bytes, [&](std::size_t round) {
    observe(means, round);
    check(evict::cuda_window_scores(mean.data(), kQueryHeads, columns, kWindow, rule, scores.data(), stream_));
  });
  measure("knorm" + at, key_bytes + score_bytes, [&](std::size_t round) {
    check(evict::cuda_knorm_scores(pool_.rows(kHeads, tokens, round), scores.data(), stream_));
  });
  const Memory<std::byte> keydiff(evict::cuda_keydiff_bytes(pool_.rows(kHeads, tokens, 0)));
  measure("keydiff" + at, 2 * key_bytes + score_bytes, [&](std::size_t round) {
    check(evict::cuda_keydiff_scores(pool_.rows(kHeads, tokens, round), keydiff.data(), scores.data(), stream_));
  });
}

void Bench::measure_selection() {
  constexpr std::uint32_t kScored = kLongTokens - kWindow;
  // Scores in fp32 from a random order of the numbers.
  std::vector<float> numbers(std::size_t{kHeads} * kScored);
  std::iota(numbers.begin(), numbers.end(), 1.0F);
  std::ranges::shuffle(numbers, std::mt19937(3));
  const Memory<float> scores(numbers.size());
  check(cudaMemcpy(scores.data(), numbers.data(), numbers.size() * sizeof(float), cudaMemcpyHostToDevice));
  const Memory<std::byte> scratch(evict::cuda_selection_bytes(kHeads, kScored));
  for (const double share : {0.032, 0.12}) {
    const auto count = static_cast<std::uint32_t>(share * kLongTokens);
    const std::uint32_t kept_count = count + kWindow;
    const Memory<std::uint32_t> kept(std::size_t{kHeads} * kept_count);
    const std::size_t out_bytes = std::size_t{kHeads} * kept_count * kDim * kElementBytes;
    const Memory<std::byte> keys(out_bytes);
    const Memory<std::byte> values(out_bytes);
    char text[16];
    std::snprintf(text, sizeof text, " %.1f %%", share * 100);
    const double score_bytes = static_cast<double>(numbers.size()) * sizeof(float);
    const double kept_bytes = static_cast<double>(kHeads) * kept_count * sizeof(std::uint32_t);
    const auto select = [&] {
      check(evict::cuda_select_best(scores.data(), kHeads, kScored, count, kWindow, scratch.data(), kept.data(),
                                    stream_));
    };
    const auto gather = [&](std::size_t round) {
      check(evict::cuda_gather_rows(pool_.rows(kHeads, kLongTokens, round), kept.data(), kept_count, keys.data(),
                                    stream_));
      check(evict::cuda_gather_rows(pool_.rows(kHeads, kLongTokens, round + 1), kept.data(), kept_count, values.data(),
                                    stream_));
    };
    measure(std::string("select 128k to") + text, score_bytes + kept_bytes, [&](std::size_t) { select(); });
    measure(std::string("gather K and V 128k to") + text, 4.0 * static_cast<double>(out_bytes) + kept_bytes, gather);
    measure(std::string("select and gather 128k to") + text,
            score_bytes + 2 * kept_bytes + 4.0 * static_cast<double>(out_bytes), [&](std::size_t round) {
              select();
              gather(round);
            });
  }
}

void Bench::measure_layers() {
  constexpr std::size_t kTokens = std::size_t{kHeads} * kLongTokens;
  constexpr std::size_t kLayer = kTokens * kDim * kElementBytes;
  constexpr double kBytes = static_cast<double>(kLayer);
  constexpr double kNumbers = static_cast<double>(kTokens) * sizeof(float);
  const auto layer = [&](std::size_t round) { return pool_.rows(kHeads, kLongTokens, round); };
  const Memory<std::byte> out(kLayer);
  {
    const Memory<std::byte> directions(kLayer);
    const Memory<float> x_lengths(kTokens);
    const Memory<float> y_lengths(kTokens);
    const Memory<float> angles(kTokens);
    const merge::MergedRows merged{directions.data(), DType::kBFloat16, x_lengths.data(), y_lengths.data(),
                                   angles.data()};
    measure("minicache merge 128k", 3 * kBytes + 3 * kNumbers, [&](std::size_t round) {
      check(merge::cuda_merge_layers(layer(round), layer(round + 1), merge::Options{}.weight, merged, stream_));
    });
    const HeadRows rows = HeadRows::contiguous(directions.data(), DType::kBFloat16, kHeads, kLongTokens, kDim);
    measure("minicache restore 128k", 2 * kBytes + kNumbers,
            [&](std::size_t) { check(merge::cuda_restore_rows(rows, x_lengths.data(), out.data(), stream_)); });
  }
  {
    constexpr std::uint32_t kPairs = kDim / 2;
    std::vector<double> frequencies;
    for (std::uint32_t pair = 0; pair < kPairs; ++pair) frequencies.push_back(std::pow(500000.0, -2.0 * pair / kDim));
    const Memory<double> inverse(kPairs);
    check(cudaMemcpy(inverse.data(), frequencies.data(), kPairs * sizeof(double), cudaMemcpyHostToDevice));
    const Memory<float> cosines(std::size_t{kLongTokens} * kPairs);
    const Memory<float> sines(std::size_t{kLongTokens} * kPairs);
    const rope::TurnsView turns{kLongTokens, kPairs, cosines.data(), sines.data()};
    constexpr double kTurns = 2.0 * kLongTokens * kPairs * sizeof(float);
    measure("rope turns 128k", kTurns, [&](std::size_t) {
      check(rope::cuda_turns(inverse.data(), kPairs, nullptr, 0, kLongTokens, cosines.data(), sines.data(), stream_));
    });
    measure("rope rotate 128k", 2 * kBytes + kTurns, [&](std::size_t round) {
      check(rope::cuda_rotate(layer(round), turns, rope::Style::kNeox, rope::Direction::kBack, DType::kBFloat16,
                              out.data(), stream_));
    });
  }
  const cluster::Options options;
  const Memory<float> keys(kTokens * kDim);
  const Memory<float> values(kTokens * kDim);
  const Memory<cluster::Members> members(kTokens);
  const Memory<std::uint32_t> assignment(kTokens);
  const Memory<std::uint32_t> entries(kHeads);
  const Memory<std::byte> workspace(cluster::cuda_compress_workspace_bytes(layer(0), layer(1), options));
  const cluster::DeviceClusters clusters{keys.data(), values.data(), members.data(), assignment.data(), entries.data()};
  const auto compress = [&](std::size_t round) {
    check(cluster::cuda_compress(layer(round), layer(round + 1), options, clusters, workspace.data(), stream_));
  };
  compress(0);
  check(cudaStreamSynchronize(stream_));
  double written = 4.0 * static_cast<double>(kTokens);
  for (const std::uint32_t count : entries.get(kHeads)) {
    written += count * (2.0 * kDim * sizeof(float) + sizeof(cluster::Members));
  }
  measure("centroidkv compress 128k", 2 * kBytes + written, compress);
}

/// A chunk's pages, all over a cache of 32 layers in vLLM's layout [block][token][head][K | V], against copies of one
/// page each: on the device, and to and from pinned memory. heads: on this rank.
void Bench::measure_pages(std::uint32_t heads) {
  constexpr std::uint32_t kLayers = 32;
  constexpr std::uint32_t kBlockTokens = 16;
  constexpr std::uint32_t kBlocks = kChunkTokens / kBlockTokens;
  constexpr std::size_t kLayerBytes = kPoolBytes / kLayers;
  constexpr std::uint32_t kScatter = 331;  // a prime, no factor of the number of blocks
  const std::size_t page_bytes = std::size_t{2} * kBlockTokens * heads * kDim * kElementBytes;
  const std::size_t chunk_bytes = kLayers * kBlocks * page_bytes;
  const auto blocks = static_cast<std::uint32_t>(kLayerBytes / page_bytes);
  PagedCache cache;
  cache.block_tokens = kBlockTokens;
  cache.group_layers = kLayers;
  cache.heads = cache.model_heads = heads;
  cache.key_dim = cache.value_dim = kDim;
  const Memory<std::byte> pages(kPoolBytes);
  for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
    cache.layers.push_back({.base = pages.data() + layer * kLayerBytes,
                            .pages = blocks,
                            .page_stride_bytes = page_bytes,
                            .head_stride_bytes = 2 * kDim * kElementBytes,
                            .token_stride_bytes = heads * 2 * kDim * kElementBytes,
                            .value_offset_bytes = kDim * kElementBytes});
  }
  // Block ids of every chunk that the cache holds, one after the other.
  std::vector<std::uint32_t> ids;
  const std::uint32_t chunks = (blocks - 1) / kBlocks;
  for (std::uint32_t i = 0; i < chunks * kBlocks; ++i) ids.push_back(1 + i * kScatter % (blocks - 1));
  const Memory<std::uint32_t> device_ids(ids.size());
  const Memory<PagedLayer> layers(kLayers);
  const Memory<std::uint32_t> bad(1);
  const Memory<std::byte> planes(chunk_bytes);
  check(cudaMemcpy(device_ids.data(), ids.data(), ids.size() * sizeof ids[0], cudaMemcpyHostToDevice));
  check(cudaMemcpy(layers.data(), cache.layers.data(), kLayers * sizeof(PagedLayer), cudaMemcpyHostToDevice));
  void* pinned = nullptr;
  check(cudaMallocHost(&pinned, chunk_bytes));
  auto* host = static_cast<std::byte*>(pinned);

  const ShardShape shape = cache.shape(kBlocks);
  const std::size_t plane = std::size_t{kChunkTokens} * kDim * kElementBytes;
  const std::uint32_t row = kDim * kElementBytes;
  const auto move = [&](std::size_t round) {
    return PageMove{.cache = cache,
                    .shape = shape,
                    .tokens = kChunkTokens,
                    .keys = {planes.data(), plane, row},
                    .values = {planes.data() + chunk_bytes / 2, plane, row},
                    .layers = layers.data(),
                    .block_ids = device_ids.data() + round % chunks * kBlocks,
                    .bad = bad.data()};
  };
  // Page by page between the cache and memory without gaps.
  std::vector<void*> in_cache;
  std::vector<void*> apart;
  const auto list = [&](std::size_t round, std::byte* memory) {
    in_cache.clear();
    apart.clear();
    for (const PagedLayer& layer : cache.layers) {
      for (std::uint32_t i = 0; i < kBlocks; ++i) {
        in_cache.push_back(layer.base + ids[round % chunks * kBlocks + i] * page_bytes);
        apart.push_back(memory + apart.size() * page_bytes);
      }
    }
  };
  const std::vector<std::size_t> sizes(std::size_t{kLayers} * kBlocks, page_bytes);
  const auto one_by_one = [&](const std::vector<void*>& to, const std::vector<void*>& from) {
    for (std::size_t i = 0; i < to.size(); ++i) {
      check(cudaMemcpyAsync(to[i], from[i], page_bytes, cudaMemcpyDefault, stream_));
    }
  };
  const auto batched = [&](const std::vector<void*>& to, const std::vector<void*>& from) {
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    std::size_t first = 0;
    check(cudaMemcpyBatchAsync(to.data(), const_cast<const void* const*>(from.data()), sizes.data(), sizes.size(),
                               &attributes, &first, 1, stream_));
  };
  const std::string of = ", pages of " + std::to_string(page_bytes >> 10) + " KiB";
  const double on_device = 2.0 * static_cast<double>(chunk_bytes);
  const auto across = static_cast<double>(chunk_bytes);
  measure("gather" + of, on_device, [&](std::size_t round) { check(cuda_gather_pages(move(round), stream_)); });
  measure("scatter" + of, on_device, [&](std::size_t round) { check(cuda_scatter_pages(move(round), stream_)); });
  measure("batched copies out" + of, on_device, [&](std::size_t round) {
    list(round, planes.data());
    batched(apart, in_cache);
  });
  measure("batched copies in" + of, on_device, [&](std::size_t round) {
    list(round, planes.data());
    batched(in_cache, apart);
  });
  measure("copies one by one" + of, on_device, [&](std::size_t round) {
    list(round, planes.data());
    one_by_one(apart, in_cache);
  });
  measure("gather, to host" + of, across, [&](std::size_t round) {
    check(cuda_gather_pages(move(round), stream_));
    check(cudaMemcpyAsync(host, planes.data(), chunk_bytes, cudaMemcpyDefault, stream_));
  });
  measure("batched copies to host" + of, across, [&](std::size_t round) {
    list(round, host);
    batched(apart, in_cache);
  });
  measure("from host, scatter" + of, across, [&](std::size_t round) {
    check(cudaMemcpyAsync(planes.data(), host, chunk_bytes, cudaMemcpyDefault, stream_));
    check(cuda_scatter_pages(move(round), stream_));
  });
  measure("batched copies from host" + of, across, [&](std::size_t round) {
    list(round, host);
    batched(in_cache, apart);
  });
  check(cudaFreeHost(pinned));
}

int main(int argc, char** argv) {
  std::string json;
  int rounds = 15;
  CLI::App app("Kernels on the GPU beside a copy within its memory.");
  app.add_option("--json", json, "file for the results");
  app.add_option("--rounds", rounds, "rounds after those that warm up")->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0));
    Bench bench(rounds);
    std::printf("%s\n%-34s %9s %9s %9s %9s\n", properties.name, "", "ms", "MiB", "GB/s", "of copy");
    bench.measure_copy();
    bench.measure_codecs();
    for (const std::uint32_t heads : {8U, 2U}) bench.measure_pages(heads);
    bench.measure_layers();
    bench.measure_selection();
    for (const std::uint32_t tokens : {32768U, kLongTokens}) bench.measure_scores(tokens);
    if (!json.empty()) {
      const nlohmann::json file = {{"device", properties.name}, {"rounds", rounds}, {"measured", bench.results}};
      std::ofstream(json) << file.dump(1) << "\n";
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace kvern::bench

int main(int argc, char** argv) { return kvern::bench::main(argc, argv); }
