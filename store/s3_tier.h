#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "store/circuit_breaker.h"
#include "store/s3_client.h"
#include "store/tier.h"

namespace kvern {

struct S3TierConfig {
  S3Bucket bucket;
  std::string ca_file;  ///< PEM; empty: the system's certificates
  std::string proxy;    ///< "http://host:port"; empty: none
  /// What all keys begin with; daemons with the same bucket and prefix share their objects.
  std::string prefix = "kvern";
  /// Larger objects are uploaded in parts of this size, at least 5 MiB. An upload that a daemon's death cuts off stays
  /// in the bucket until a lifecycle rule (AbortIncompleteMultipartUpload) removes it.
  std::uint64_t part_bytes = std::uint64_t{16} << 20;
  std::uint32_t parts_at_once = 4;  ///< of one upload
  /// How many blocks of a cell, the longest prefixes first, are asked for as an object's last block. Each is a request
  /// that is paid for, and a round trip: a full cell is found at the first, a prompt's end seldom at any.
  std::uint32_t probes_per_cell = 2;
  std::uint32_t concurrent_probes = 32;
  std::uint32_t concurrent_reads = 16;
  std::uint32_t concurrent_writes = 4;
  std::uint32_t concurrent_erases = 16;
  /// Finds and reads that have not ended; one more is kBusy.
  std::uint32_t max_outstanding = 4096;
  std::uint64_t write_queue_bytes = std::uint64_t{256} << 20;
  /// What waits for longer is given up (kBusy).
  std::int64_t write_queue_age_ns = 60'000'000'000;
  std::int64_t connect_timeout_ns = 2'000'000'000;
  /// Of a find; what is not known by then is a miss.
  std::int64_t find_timeout_ns = 1'000'000'000;
  /// Of a read, and of each request of a write, with all attempts, from when its turn has come.
  std::int64_t read_timeout_ns = 10'000'000'000;
  std::int64_t write_timeout_ns = 30'000'000'000;
  std::int64_t attempt_timeout_ns = 10'000'000'000;
  S3Retries retries;
  BreakerConfig breaker;

  /// kInvalid says what is wrong. Does not look at files, variables or the network.
  Status validate() const;
};

/// Objects in an S3-compatible bucket, shared with other daemons (remote_key.h): one chunk object is one S3 object, and
/// its size there is the hit's size.
///
/// One thread of its own does everything, over connections that are kept. Uploads become visible as a whole, at once,
/// and last; a second upload of a key replaces the first one by an object that serves as well, and is left out where
/// one of the same size is there. Reads are range requests of just the bytes that are asked for; they are checked
/// against the object's size, and its containers' checksums do the rest.
class S3Tier final : public Tier {
 public:
  /// clock and observer (may be null) outlive the tier. Throws std::invalid_argument when the configuration is not
  /// valid or a secret cannot be read, std::system_error without a thread, std::runtime_error without libcurl.
  S3Tier(S3TierConfig config, const Clock& clock, TierObserver* observer);
  /// Ends all operations that are under way, with kUnavailable.
  ~S3Tier() override;

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
