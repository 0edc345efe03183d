#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>

#include "base/keys.h"
#include "kernels/kv_shape.h"

namespace kvern {

/// Shards that somebody has reserved and not yet stored or given up: others need not send them too. Thread-safe.
class InFlight {
  struct Key {
    ChunkKey chunk;
    std::uint32_t layer_begin = 0, layers = 0, head_begin = 0, heads = 0;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Key& key) const {
      return std::hash<ChunkKey>()(key.chunk) ^
             ((std::size_t{key.layer_begin} << 32 | key.head_begin) * 0x9e3779b97f4a7c15ULL);
    }
  };

 public:
  /// Move-only; ends the claim on destruction. The table must outlive it.
  class Claim {
   public:
    Claim() = default;
    Claim(Claim&& other) noexcept : table_(std::exchange(other.table_, nullptr)), key_(other.key_) {}
    Claim& operator=(Claim&& other) noexcept {
      std::swap(table_, other.table_);
      std::swap(key_, other.key_);
      return *this;
    }
    ~Claim() {
      if (table_ != nullptr) table_->erase(key_);
    }
    explicit operator bool() const { return table_ != nullptr; }

   private:
    friend class InFlight;
    Claim(InFlight* table, const Key& key) : table_(table), key_(key) {}
    InFlight* table_ = nullptr;
    Key key_;
  };

  /// An empty claim when that very shard is in flight already.
  Claim claim(const ChunkKey& chunk, const ShardShape& shard) {
    const Key key{chunk, shard.layer_begin, shard.layers, shard.head_begin, shard.heads};
    std::lock_guard lock(mutex_);
    if (!keys_.insert(key).second) return {};
    return Claim(this, key);
  }
  /// Whether a shard of the chunk that this block names is in flight; for explanations.
  bool has_chunk_of(const BlockHash& last_block) const {
    std::lock_guard lock(mutex_);
    for (const Key& key : keys_) {
      if (key.chunk.last_block == last_block) return true;
    }
    return false;
  }
  std::size_t size() const {
    std::lock_guard lock(mutex_);
    return keys_.size();
  }

 private:
  void erase(const Key& key) {
    std::lock_guard lock(mutex_);
    keys_.erase(key);
  }

  mutable std::mutex mutex_;
  std::unordered_set<Key, Hash> keys_;
};

}  // namespace kvern
