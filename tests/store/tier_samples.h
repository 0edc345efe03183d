#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <future>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "store/tier.h"

namespace kvern::testing {

/// Bytes at an address that direct I/O takes.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::size_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kTierAlignment}))) {
    std::memset(data_, 0, bytes);
  }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  ~AlignedBytes() { ::operator delete (data_, std::align_val_t{kTierAlignment}); }
  std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  std::size_t bytes_;
  std::byte* data_;
};

inline NamespaceId sample_namespace(std::uint8_t number) {
  NamespaceId id;
  id.bytes.fill(number);
  return id;
}

inline BlockHash sample_hash(std::uint64_t prompt, std::uint64_t block) {
  std::vector<std::uint8_t> bytes(32, 0x5a);
  std::memcpy(bytes.data(), &prompt, sizeof prompt);
  std::memcpy(bytes.data() + sizeof prompt, &block, sizeof block);
  return BlockHash(bytes);
}

/// An object of made-up bytes and its memory. The bytes follow from the seed.
struct SampleObject {
  SampleObject(std::uint64_t prompt, std::uint32_t block_count, const std::vector<std::size_t>& piece_bytes,
               std::uint64_t seed = 0, std::uint8_t namespace_number = 1) {
    for (std::uint32_t i = 0; i < block_count; ++i) blocks.push_back(sample_hash(prompt, i));
    key = {sample_namespace(namespace_number), 0, blocks.back()};
    std::mt19937_64 random(prompt * 1000 + seed);
    for (const std::size_t bytes : piece_bytes) {
      pieces.push_back(std::make_shared<AlignedBytes>(bytes));
      for (std::size_t at = 0; at < bytes; at += sizeof(std::uint64_t)) {
        const std::uint64_t word = random();
        std::memcpy(pieces.back()->span().data() + at, &word, sizeof word);
      }
    }
  }

  TierObject object() const {
    TierObject made{.key = key, .blocks = blocks, .pieces = {}, .hold = std::make_shared<decltype(pieces)>(pieces)};
    for (const auto& piece : pieces) made.pieces.push_back(piece->span());
    return made;
  }
  CellQuery query() const { return {.namespace_id = key.namespace_id, .group = key.group, .blocks = blocks}; }
  TierHit hit() const {
    return {.key = key, .bytes = object().bytes(), .blocks = static_cast<std::uint32_t>(blocks.size())};
  }
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> all;
    for (const auto& piece : pieces) all.insert(all.end(), piece->span().begin(), piece->span().end());
    return all;
  }

  ChunkKey key;
  std::vector<BlockHash> blocks;
  std::vector<std::shared_ptr<AlignedBytes>> pieces;
};

// The tier's operations, waited for.

template <typename T>
T wait_for(std::future<T> ended) {
  if (ended.wait_for(std::chrono::seconds(60)) != std::future_status::ready) {
    ADD_FAILURE() << "an operation does not end";
    std::abort();  // it may still write into memory that is about to go
  }
  return ended.get();
}

inline Status write(Tier& tier, const SampleObject& sample) {
  std::promise<Status> ended;
  tier.write(sample.object(), [&](Status status) { ended.set_value(std::move(status)); });
  return wait_for(ended.get_future());
}

inline Result<std::vector<TierHit>> find(Tier& tier, std::vector<CellQuery> cells, std::stop_token cancel = {}) {
  std::promise<Result<std::vector<TierHit>>> ended;
  tier.find(std::move(cells), std::move(cancel), [&](auto hits) { ended.set_value(std::move(hits)); });
  return wait_for(ended.get_future());
}

/// The object's bytes, or what went wrong.
inline Result<std::vector<std::byte>> read(Tier& tier, const TierHit& hit, std::uint64_t offset, std::size_t bytes) {
  const AlignedBytes memory(bytes);
  std::promise<Status> ended;
  tier.read(hit, offset, memory.span(), {}, [&](Status status) { ended.set_value(std::move(status)); });
  if (auto status = wait_for(ended.get_future()); !status) return failure(std::move(status));
  return std::vector<std::byte>(memory.span().begin(), memory.span().end());
}
inline Result<std::vector<std::byte>> read(Tier& tier, const TierHit& hit) { return read(tier, hit, 0, hit.bytes); }

inline Status erase(Tier& tier, std::vector<ChunkKey> keys) {
  std::promise<Status> ended;
  tier.erase(std::move(keys), [&](Status status) { ended.set_value(std::move(status)); });
  return wait_for(ended.get_future());
}

inline Status erase_all(Tier& tier, const NamespaceSet& namespaces) {
  std::promise<Status> ended;
  tier.erase_all(namespaces, [&](Status status) { ended.set_value(std::move(status)); });
  return wait_for(ended.get_future());
}

/// Bytes of the objects by their keys.
using Sizes = std::map<std::string, std::uint64_t>;
inline Sizes list(Tier& tier, const NamespaceSet& namespaces) {
  Sizes sizes;
  std::promise<Status> ended;
  const auto take = [&](const std::vector<TierHit>& hits) {
    for (const auto& hit : hits) sizes.emplace(hit.key.to_string(), hit.bytes);
  };
  tier.list(namespaces, take, [&](Status status) { ended.set_value(std::move(status)); });
  const Status status = wait_for(ended.get_future());
  EXPECT_TRUE(status) << status.to_string();
  return sizes;
}

inline bool has(Tier& tier, const SampleObject& sample) {
  const auto hits = find(tier, {sample.query()});
  return hits && hits->front().blocks == sample.blocks.size();
}

}  // namespace kvern::testing
