#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/keys.h"
#include "base/status.h"
#include "store/circuit_breaker.h"

namespace kvern {

/// A tier below DRAM: whole chunks by key, slow, fallible, larger.
///
/// What lies there is a *chunk object*: the containers of all shards of one complete chunk behind one another, each at
/// a multiple of kTierAlignment and padded with zeros up to the next. Containers describe themselves, so that the
/// object needs no header of its own; who reads one verifies it before anybody else sees it. Objects are immutable: two
/// objects under one key hold the same tokens, and either serves.

inline constexpr std::size_t kTierAlignment = 4096;

/// What one grid cell of a prompt asks for: the prompt's blocks in that cell, in order, at least one.
struct CellQuery {
  NamespaceId namespace_id;
  std::uint16_t group = 0;
  std::vector<BlockHash> blocks;
};

/// The object that serves most of the leading blocks of a cell.
struct TierHit {
  ChunkKey key;
  std::uint64_t bytes = 0;   ///< of the object, a multiple of kTierAlignment; 0: a miss
  std::uint32_t blocks = 0;  ///< leading blocks of the query that it serves
};

/// An object that is to be written. The pieces are its bytes in order; each starts at an address and has a length that
/// is a multiple of kTierAlignment, so that direct I/O can take it from where it lies.
struct TierObject {
  ChunkKey key;
  std::vector<BlockHash> blocks;
  std::vector<std::span<const std::byte>> pieces;
  std::shared_ptr<const void> hold;  ///< keeps the pieces valid and unchanged until it is let go

  std::uint64_t bytes() const;
};

enum class TierOperation { kFind, kRead, kWrite, kErase, kList };
std::string_view operation_name(TierOperation operation);

/// Told of every finished operation, from the tier's threads. Must not block or throw.
class TierObserver {
 public:
  virtual ~TierObserver() = default;
  virtual void finished(std::string_view tier, TierOperation operation, const Status& status, std::uint64_t bytes,
                        double seconds) = 0;
};

struct TierStats {
  std::uint64_t capacity_bytes = 0;  ///< 0: not known, as of remote tiers
  std::uint64_t used_bytes = 0;
  std::uint64_t objects = 0;
  std::uint64_t queued_bytes = 0;  ///< accepted by write() and not on the medium yet
  std::uint64_t outstanding = 0;   ///< operations that have not ended
  BreakerState breaker = BreakerState::kClosed;
};

/// Thread-safe. Every operation ends by exactly one call of its function, on a thread of the tier or on the caller's;
/// the function must not block or throw, and may start other operations. While the breaker is open, operations end at
/// once with kUnavailable.
///
/// The public methods check, measure and guard; a tier implements the do_* ones.
class Tier {
 public:
  using FindDone = std::function<void(Result<std::vector<TierHit>>)>;
  using Done = std::function<void(Status)>;
  using PageDone = std::function<void(std::vector<TierHit>)>;

  /// clock and observer (may be null) outlive the tier. name: "nvme", "redis", "s3", a label of metrics.
  Tier(std::string name, const BreakerConfig& breaker, const Clock& clock, TierObserver* observer);
  virtual ~Tier() = default;
  Tier(const Tier&) = delete;
  Tier& operator=(const Tier&) = delete;

  const std::string& name() const { return name_; }

  /// One hit or miss per cell. A tier may know objects by their last block only, and then misses a cell that the prompt
  /// leaves half-way.
  void find(std::vector<CellQuery> cells, std::stop_token cancel, FindDone done);
  /// Reads into.size() bytes from offset on; all three are multiples of kTierAlignment, and within hit.bytes. into is
  /// aligned too, and stays the tier's until done. kNotFound: gone since find(). kExpired: cancelled.
  void read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel, Done done);
  /// OK: durable in the sense of the tier. kBusy: its queue is full; kRefused: admission declined it.
  void write(TierObject object, Done done);
  void erase(std::vector<ChunkKey> keys, Done done);
  /// All objects of these namespaces.
  void erase_all(const NamespaceSet& namespaces, Done done);
  /// What there is of these namespaces, as hits for read(), a page at a time; blocks are not told. An object that comes
  /// or goes meanwhile may be named or not. page must not block for long or throw.
  void list(const NamespaceSet& namespaces, PageDone page, Done done);
  /// Waits until everything accepted by write() is durable or has failed; kExpired when that takes too long.
  Status drain(std::int64_t timeout_ns) { return do_drain(timeout_ns); }
  TierStats stats() const;

 private:
  virtual void do_find(std::vector<CellQuery> cells, std::stop_token cancel, FindDone done) = 0;
  virtual void do_read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
                       Done done) = 0;
  virtual void do_write(TierObject object, Done done) = 0;
  virtual void do_erase(std::vector<ChunkKey> keys, Done done) = 0;
  virtual void do_erase_all(const NamespaceSet& namespaces, Done done) = 0;
  virtual void do_list(const NamespaceSet& namespaces, PageDone page, Done done) = 0;
  virtual Status do_drain(std::int64_t timeout_ns) = 0;
  /// capacity, used, objects and queued bytes; the rest is filled by stats().
  virtual TierStats do_stats() const = 0;

  std::optional<std::uint64_t> begin(TierOperation operation);
  void end(std::uint64_t id, TierOperation operation, const Status& status, std::uint64_t bytes);
  void tell_breaker(const Status& status, std::int64_t now_ns);

  const std::string name_;
  const Clock& clock_;
  TierObserver* const observer_;
  mutable std::mutex mutex_;
  CircuitBreaker breaker_;
  struct Outstanding {
    TierOperation operation;
    std::int64_t started_ns;
  };
  std::map<std::uint64_t, Outstanding> outstanding_;  ///< by operation, oldest first
  std::uint64_t next_operation_ = 1;
  std::uint64_t probe_ = 0;  ///< the operation that the breaker let through last while it was half open
};

}  // namespace kvern
