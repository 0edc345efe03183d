#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/keys.h"
#include "base/status.h"
#include "store/ancestry.h"
#include "store/chunk_store.h"
#include "store/tier.h"

namespace kvern {

/// Told how a flush ended: what it took out of DRAM, and the first failure of a lower tier.
using FlushDone = std::function<void(const FlushedChunks& dram, const Status& lower)>;

/// Drops a prefix from all tiers: the chunks that hold its last block, and those that continue it (continue_prefix()).
/// Which these are only the containers know, so the start of every object of the namespaces is read. An object whose
/// start cannot be understood is erased: nobody could load it. One run per object of this class; nothing moves between
/// the tiers meanwhile.
class PrefixFlush : public std::enable_shared_from_this<PrefixFlush> {
 public:
  /// Calls the function while the tiers cannot go away; false, without the call, when they are going.
  using WithTiers = std::function<bool(const std::function<void()>& function)>;

  /// dram outlives this; the tiers are used within with_tiers alone.
  PrefixFlush(ChunkStore& dram, const std::vector<Tier*>& tiers, WithTiers with_tiers, const NamespaceSet& namespaces,
              const BlockHash& block, FlushDone done);
  void start();

 private:
  struct Buffer;
  /// What one tier has.
  struct Holding {
    Tier* tier = nullptr;
    std::string name = {};  // outlives the tier
    std::vector<TierHit> objects = {};
    std::vector<ChunkAncestry> chunks = {};
    std::vector<ChunkKey> unreadable = {};
    std::size_t next = 0, under_way = 0;
    bool reading = false;
    bool ended = false;
  };

  void read_on(Holding& holding);
  void read(Holding& holding, const TierHit& object);
  void take(Holding& holding, const TierHit& object, std::span<const std::byte> start, const Status& status);
  void trouble(const Holding& holding, const Status& status);
  void erase();
  void finish();

  ChunkStore& dram_;
  const WithTiers with_tiers_;
  const NamespaceSet namespaces_;
  const BlockHash block_;
  const FlushDone done_;
  std::mutex mutex_;  // guards all that follows
  std::vector<Holding> holdings_;
  std::size_t left_ = 0;  // tiers that are being read, then those that erase
  Status lower_;
  std::vector<ChunkKey> gone_;
  FlushedChunks flushed_;
};

}  // namespace kvern
