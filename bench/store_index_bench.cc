// What the DRAM store costs beside the bytes that it keeps: memory per chunk, look-ups, and taking the slab back when
// the daemon starts again.
//
// Chunks of 8 blocks in real containers. Look-ups go as local clients do them: fingerprints of a prompt's blocks
// through the index in shared memory, prompts in random order, one thread.

#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "bench/steps.h"
#include "kernels/codec.h"
#include "kernels/container.h"
#include "store/chunk_store.h"
#include "store/container_map.h"
#include "tests/store/store_fixture.h"

namespace kvern::bench {
namespace {

constexpr std::uint32_t kBlocks = 8;
constexpr int kRounds = 5;

void report(const char* key, double value) { std::printf("%s %.6g\n", key, value); }

/// Bytes of K and V of one chunk: layers * heads * kBlocks * 16 tokens * 2 * dim * 2.
struct Shape {
  std::uint32_t layers, heads, dim;
};

ContainerInfo chunk_of(std::uint64_t prompt, const Shape& shape) {
  ContainerInfo info = testing::ChunkSpec{.prompt = prompt, .blocks = kBlocks}.info();
  info.group_layers = shape.layers;
  info.model_heads = shape.heads;
  info.shape.layers = shape.layers;
  info.shape.heads = shape.heads;
  info.shape.key_dim = info.shape.value_dim = shape.dim;
  return info;
}

/// Memory that outlives the stores that use it.
class Store {
 public:
  Store(std::uint32_t chunks, std::uint64_t bytes_per_chunk, std::string policy)
      : policy_(std::move(policy)),
        config_{.slab_bytes = chunks * bytes_per_chunk, .chunk_capacity = chunks, .index_slots = chunks * kBlocks * 2},
        slab_(config_.slab_bytes),
        map_(ContainerMap::bytes_for(config_.slab_bytes)) {}

  /// Seconds that it took; what the slab holds is taken back.
  double start() {
    store_.reset();
    index_ = std::make_unique<testing::PageAlignedBytes>(
        block_index_bytes({config_.chunk_capacity, config_.index_slots, config_.generation}));
    const double begin = now(kWallTime);
    store_ = std::make_unique<ChunkStore>(config_, slab_.span(), index_->span(),
                                          value_of(make_eviction_policy(policy_)), nullptr, clock_, map_.span());
    return now(kWallTime) - begin;
  }
  void put(const ContainerInfo& info, std::span<const std::byte> canonical) {
    const auto codec = value_of(make_codec("raw"));
    const auto ticket = value_of(store_->begin_write(info, container_max_bytes(*codec, info)));
    const auto bytes = value_of(encode_container(*codec, info, canonical, {}, store_->bytes(ticket)));
    if (!value_of(store_->publish(ticket, info, bytes))) throw std::runtime_error("a chunk is not complete");
  }
  BlockIndexReader reader() { return BlockIndexReader::attach(index_->span()).value(); }
  ChunkStoreStats stats() const { return store_->stats(); }

 private:
  std::string policy_;
  ChunkStoreConfig config_;
  testing::PageAlignedBytes slab_, map_;
  std::unique_ptr<testing::PageAlignedBytes> index_;
  ManualClock clock_;
  std::unique_ptr<ChunkStore> store_;
};

std::size_t allocated() {
  const auto memory = mallinfo2();
  return memory.uordblks + memory.hblkhd;
}

void fill(Store& store, std::uint32_t chunks, const Shape& shape) {
  const std::vector<std::byte> canonical(chunk_of(0, shape).shape.raw_bytes(), std::byte{42});
  for (std::uint64_t prompt = 0; prompt < chunks; ++prompt) store.put(chunk_of(prompt, shape), canonical);
  if (store.stats().chunks != chunks) throw std::runtime_error("the store does not hold all chunks");
}

double restart_seconds(Store& store, std::uint32_t chunks) {
  std::vector<double> seconds;
  for (int round = 0; round < kRounds; ++round) {
    seconds.push_back(store.start());
    if (store.stats().recovered_chunks != chunks) throw std::runtime_error("the restart lost chunks");
  }
  return median(seconds);
}

constexpr std::uint32_t kSmallChunks = 65'536;
constexpr Shape kSmallShape{.layers = 1, .heads = 1, .dim = 8};

double private_bytes_per_chunk(Store& store) {
  store.start();
  const std::size_t before = allocated();
  fill(store, kSmallChunks, kSmallShape);
  return static_cast<double>(allocated() - before) / kSmallChunks;
}

void many_small_chunks() {
  constexpr std::uint32_t kChunks = kSmallChunks;
  constexpr Shape kShape = kSmallShape;
  {
    Store store(kChunks, 8192, "lru");
    report("store.index.lru_bytes_per_chunk", private_bytes_per_chunk(store));
  }
  Store store(kChunks, 8192, "reuse");
  report("store.index.bytes_per_chunk", private_bytes_per_chunk(store));
  report("store.index.shared_bytes_per_chunk", static_cast<double>(store.stats().index_slots_used) * 16 / kChunks);

  std::vector<std::uint64_t> fingerprints;
  std::vector<std::uint64_t> prompts(kChunks);
  for (std::uint64_t prompt = 0; prompt < kChunks; ++prompt) prompts[prompt] = prompt;
  std::ranges::shuffle(prompts, std::mt19937_64(1));
  for (const auto prompt : prompts) {
    const ContainerInfo info = chunk_of(prompt, kShape);
    for (const auto& hash : info.block_hashes) {
      fingerprints.push_back(block_fingerprint(info.key.namespace_id, 0, hash.bytes()));
    }
  }
  const auto reader = store.reader();
  std::vector<double> rates;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<BlockIndexHit> hits(kBlocks);
    std::size_t found = 0;
    const double begin = now(kThreadTime);
    for (std::size_t at = 0; at < fingerprints.size(); at += kBlocks) {
      found += reader.find_leading(std::span(fingerprints).subspan(at, kBlocks), hits);
    }
    rates.push_back(static_cast<double>(found) / (now(kThreadTime) - begin));
    if (found != fingerprints.size()) throw std::runtime_error("the index lost blocks");
  }
  report("store.index.lookups_per_s", median(rates));
  report("store.recovery.dram_s_per_million", restart_seconds(store, kChunks) / kChunks * 1e6);
}

void large_chunks() {
  constexpr std::uint32_t kChunks = 512;
  constexpr Shape kShape{.layers = 16, .heads = 8, .dim = 32};
  constexpr std::uint64_t kBytes = (4 << 20) + (64 << 10);
  Store store(kChunks, kBytes, "reuse");
  store.start();
  fill(store, kChunks, kShape);
  const auto stored = static_cast<double>(store.stats().used_bytes);
  report("store.recovery.dram_s_per_16gib", restart_seconds(store, kChunks) / stored * (std::uint64_t{16} << 30));
}

}  // namespace
}  // namespace kvern::bench

int main() {
  kvern::bench::many_small_chunks();
  kvern::bench::large_chunks();
}
