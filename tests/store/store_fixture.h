#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "kernels/container_layout.h"
#include "store/chunk_store.h"

namespace kvern::testing {

class PageAlignedBytes {
 public:
  explicit PageAlignedBytes(std::size_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{4096}))) {
    std::memset(data_, 0, bytes);
  }
  PageAlignedBytes(const PageAlignedBytes&) = delete;
  PageAlignedBytes& operator=(const PageAlignedBytes&) = delete;
  ~PageAlignedBytes() { ::operator delete (data_, std::align_val_t{4096}); }
  std::span<std::byte> span() { return {data_, bytes_}; }

 private:
  std::size_t bytes_;
  std::byte* data_;
};

inline NamespaceId namespace_of(std::uint8_t number) {
  NamespaceId id;
  id.bytes[0] = number;
  return id;
}

/// The hash of one block of a made-up prompt.
inline BlockHash block_hash(std::uint64_t prompt, std::uint64_t block) {
  std::vector<std::uint8_t> bytes(32, 0x5a);
  std::memcpy(bytes.data(), &prompt, sizeof prompt);
  std::memcpy(bytes.data() + sizeof prompt, &block, sizeof block);
  return BlockHash(bytes);
}

/// One chunk of a prompt, or one shard of it, of a model with 4 layers and 8 heads.
struct ChunkSpec {
  std::uint64_t prompt = 0;
  std::uint64_t first_block = 0;
  std::uint32_t blocks = 4;
  std::uint8_t namespace_number = 1;
  std::uint32_t layer_begin = 0, layers = 4, head_begin = 0, heads = 8;

  ContainerInfo info() const {
    ContainerInfo info;
    info.block_tokens = 16;
    info.group_layers = 4;
    info.model_heads = 8;
    info.position = first_block * info.block_tokens;
    info.codec_spec = "raw";
    info.shape = {.dtype = DType::kBFloat16,
                  .layer_begin = layer_begin,
                  .layers = layers,
                  .head_begin = head_begin,
                  .heads = heads,
                  .tokens = blocks * info.block_tokens,
                  .key_dim = 8,
                  .value_dim = 8};
    for (std::uint32_t i = 0; i < blocks; ++i) info.block_hashes.push_back(block_hash(prompt, first_block + i));
    info.key = {namespace_of(namespace_number), 0, info.block_hashes.back()};
    if (first_block > 0) {
      info.previous_tag = block_tag(info.key.namespace_id, 0, block_hash(prompt, first_block - 1).bytes());
    }
    return info;
  }
  ChunkSpec shard(std::uint32_t head_from, std::uint32_t head_count) const {
    ChunkSpec copy = *this;
    copy.head_begin = head_from;
    copy.heads = head_count;
    return copy;
  }
};

/// Room for what a made-up container must say: the names of its blocks, where a real one has them.
inline constexpr std::size_t kContainerHead = 512;

inline void write_names(std::span<std::byte> container, const ContainerInfo& info) {
  std::size_t at = block_hashes_offset(info.codec_spec);
  for (const BlockHash& hash : info.block_hashes) {
    container[at++] = static_cast<std::byte>(hash.size());
    std::memcpy(container.data() + at, hash.bytes().data(), hash.size());
    at += hash.size();
  }
}

/// A store over memory of its own, with hazards that the test sets by hand.
struct StoreFixture {
  explicit StoreFixture(ChunkStoreConfig store_config)
      : config(store_config),
        slab_memory(config.slab_bytes),
        index_memory(block_index_bytes({config.chunk_capacity, config.index_slots, config.generation})),
        store(
            config, slab_memory.span(), index_memory.span(), make_lru_policy(),
            [this](std::unordered_set<std::uint32_t>& set) { set.insert(claimed.begin(), claimed.end()); }, clock) {}

  static ChunkStoreConfig pages(std::uint64_t slab_pages) {
    return {.slab_bytes = slab_pages * 4096, .chunk_capacity = 64, .index_slots = 1024};
  }

  BlockIndexReader reader() { return BlockIndexReader::attach(index_memory.span()).value(); }

  Result<bool> put(const ChunkSpec& spec, std::size_t bytes = 4096) {
    const auto info = spec.info();
    const auto ticket = store.begin_write(info, bytes);
    if (!ticket) return failure(ticket.error());
    write_names(store.bytes(*ticket), info);
    return store.publish(*ticket, info, bytes);
  }
  bool has(const ChunkSpec& spec) {
    const auto info = spec.info();
    return store.match(info.key.namespace_id, 0, info.block_hashes) == info.block_hashes.size();
  }
  Result<PinnedChunk> pin(const ChunkSpec& spec, PinFor what_for = PinFor::kUse) {
    return store.pin(spec.info().key.namespace_id, 0, spec.info().key.last_block, what_for);
  }
  std::uint32_t number_of(const ChunkSpec& spec) {
    const auto info = spec.info();
    return reader().find(block_fingerprint(info.key.namespace_id, 0, info.key.last_block.bytes())).value().chunk;
  }

  ChunkStoreConfig config;
  PageAlignedBytes slab_memory;
  PageAlignedBytes index_memory;
  ManualClock clock;
  std::unordered_set<std::uint32_t> claimed;
  ChunkStore store;
};

}  // namespace kvern::testing
