#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "store/circuit_breaker.h"
#include "store/tier.h"

namespace kvern {

struct RedisTierConfig {
  /// "host:port" of some nodes of a Redis or Valkey cluster (one suffices, more survive its absence), or of one server
  /// without cluster support. Version 6 or later.
  std::vector<std::string> nodes;
  std::string user;  ///< empty: the default user
  std::string password;
  bool tls = false;
  std::string tls_ca_file;                         ///< PEM; empty: the system's certificates
  std::string tls_certificate_file, tls_key_file;  ///< PEM, of this side; empty: none
  /// What all keys begin with; daemons with the same prefix share their objects.
  std::string prefix = "kvern";
  /// After so long objects go. 0: never, which leaves it to the server's maxmemory-policy.
  std::uint64_t ttl_seconds = 0;
  bool refresh_ttl_on_read = true;
  /// How many blocks of a cell, the longest prefixes first, are looked up as an object's last block.
  std::uint32_t probes_per_cell = 64;
  /// Few: a server that is asked for many megabytes at once spends its time on memory for the answers (measured: 2 to 8
  /// reads of 1 MiB are a fifth faster than 16, and 64 three times slower).
  std::uint32_t concurrent_reads = 8;
  std::uint32_t concurrent_writes = 4;
  /// Finds and reads that have not ended; one more is kBusy.
  std::uint32_t max_outstanding = 4096;
  std::uint64_t write_queue_bytes = std::uint64_t{256} << 20;
  /// What waits for longer is given up (kBusy).
  std::int64_t write_queue_age_ns = 30'000'000'000;
  std::int64_t connect_timeout_ns = 1'000'000'000;
  std::int64_t find_timeout_ns = 500'000'000;
  /// Of one read or write, from when its turn has come.
  std::int64_t operation_timeout_ns = 5'000'000'000;
  BreakerConfig breaker;

  /// kInvalid says what is wrong. Does not look at files or the network.
  Status validate() const;
};

/// Objects in a Redis or Valkey cluster, or in a single server, shared with other daemons (remote_key.h,
/// redis_object.h).
///
/// One thread of its own does everything: it holds up to three connections to each node (redis_cluster.h), receives
/// straight into the reader's memory and sends from where an object lies. A write is durable once the master has
/// acknowledged it: what Redis itself loses in a failover is lost and found missing. An object is written and replaced
/// in one transaction, and read between two looks at its manifest, so that no reader sees parts of two; pieces that
/// were evicted make the object a miss, and it is dropped. Checksums are verified of pieces that are read whole.
class RedisTier final : public Tier {
 public:
  /// clock and observer (may be null) outlive the tier. Connects in the background. Throws std::invalid_argument when
  /// the configuration is not valid or a file of it cannot be used, std::system_error without a thread.
  RedisTier(RedisTierConfig config, const Clock& clock, TierObserver* observer);
  /// Ends all operations that are under way, with kUnavailable.
  ~RedisTier() override;

 private:
  struct Work;

  void do_find(std::vector<CellQuery> cells, std::stop_token cancel, FindDone done) override;
  void do_read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
               Done done) override;
  void do_write(TierObject object, Done done) override;
  void do_erase(std::vector<ChunkKey> keys, Done done) override;
  void do_erase_all(const NamespaceSet& namespaces, Done done) override;
  void do_list(const NamespaceSet& namespaces, PageDone page, Done done) override;
  Status do_drain(std::int64_t timeout_ns) override;
  TierStats do_stats() const override;

  std::unique_ptr<Work> work_;
};

}  // namespace kvern
