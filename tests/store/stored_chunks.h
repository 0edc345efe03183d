#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/codec.h"
#include "kernels/container.h"
#include "tests/store/store_fixture.h"

namespace kvern::testing {

/// Canonical bytes of a chunk, different for each chunk and shard.
inline std::vector<std::byte> canonical_bytes(const ContainerInfo& info) {
  std::vector<std::byte> bytes(info.shape.raw_bytes());
  std::uint64_t state =
      block_fingerprint(info.key.namespace_id, info.key.group, info.key.last_block.bytes()) + info.shape.head_begin;
  for (auto& byte : bytes) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    byte = static_cast<std::byte>(state >> 56);
  }
  return bytes;
}

/// Stores a real container; true when the chunk is complete by it.
inline Result<bool> store_chunk(ChunkStore& store, const ChunkSpec& spec) {
  const auto info = spec.info();
  const auto codec = make_codec("raw");
  const auto ticket = store.begin_write(info, container_max_bytes(**codec, info));
  if (!ticket) return failure(ticket.error());
  const auto bytes = encode_container(**codec, info, canonical_bytes(info), {}, store.bytes(*ticket));
  if (!bytes) return failure(bytes.error());
  return store.publish(*ticket, info, *bytes);
}

/// The object that a lower tier would keep of a chunk.
inline std::vector<std::byte> object_of(std::span<const ChunkSpec> shards) {
  std::vector<std::byte> object;
  const auto codec = make_codec("raw");
  for (const ChunkSpec& spec : shards) {
    const auto info = spec.info();
    const std::size_t at = object.size();
    object.resize(at + container_max_bytes(**codec, info));
    const auto bytes = encode_container(**codec, info, canonical_bytes(info), {}, std::span(object).subspan(at));
    object.resize(at + bytes.value());
    object.resize((object.size() + 4095) / 4096 * 4096);
  }
  return object;
}

/// All of the chunk is there, and its bytes are those that were stored.
inline ::testing::AssertionResult holds_exactly(ChunkStore& store, const ChunkSpec& spec) {
  const auto info = spec.info();
  const auto pinned = store.pin(info.key.namespace_id, info.key.group, info.key.last_block);
  if (!pinned) return ::testing::AssertionFailure() << pinned.error().to_string();
  ::testing::AssertionResult result = ::testing::AssertionSuccess();
  for (const StoredShard& shard : pinned->shards) {
    const auto reader = ContainerReader::parse(store.bytes(shard));
    if (!reader) {
      result = ::testing::AssertionFailure() << reader.error().to_string();
      break;
    }
    if (const Status good = reader->verify(); !good) {
      result = ::testing::AssertionFailure() << good.to_string();
      break;
    }
    ContainerInfo expected = info;
    expected.shape = reader->info().shape;
    std::vector<std::byte> again(container_max_bytes(reader->codec(), expected));
    const auto bytes = encode_container(reader->codec(), expected, canonical_bytes(expected), {}, again);
    const auto stored = store.bytes(shard);
    if (!bytes || *bytes != stored.size() || !std::ranges::equal(stored, std::span(again).first(*bytes))) {
      result = ::testing::AssertionFailure() << "other bytes than those that were stored";
    }
  }
  store.unpin(pinned->pin);
  return result;
}

}  // namespace kvern::testing
