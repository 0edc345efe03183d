#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/status.h"
#include "transport/shared_memory.h"

namespace kvern {

/// Bytes that a data plane made readable. Keeps a remote copy alive; a view of shared memory stays valid as long as its
/// lease and session do.
class PulledBytes {
 public:
  PulledBytes() = default;
  explicit PulledBytes(std::span<const std::byte> view) : view_(view) {}
  PulledBytes(std::shared_ptr<std::byte[]> owned, std::size_t bytes)
      : owned_(std::move(owned)), view_(owned_.get(), bytes) {}
  std::span<const std::byte> bytes() const { return view_; }

 private:
  std::shared_ptr<std::byte[]> owned_;
  std::span<const std::byte> view_;
};

/// Bytes on their way. Their memory stays in use until wait() or the destructor returns; either blocks, and ends when
/// the session does.
class Transfer {
 public:
  virtual ~Transfer() = default;
  /// Once. The bytes of a pull; nothing for a push.
  virtual Result<PulledBytes> wait() = 0;
};

/// Client side: how the bytes of one session travel. Thread-safe. Transfers must not outlive it.
class DataPlane {
 public:
  virtual ~DataPlane() = default;
  /// "shm", "ucx/tcp", "ucx/rdma": logged once and exported.
  virtual std::string_view name() const = 0;
  /// Writable memory that stands for the reserved staging extent (64-byte aligned). kInvalid outside of staging.
  virtual Result<std::span<std::byte>> staging(std::uint64_t offset, std::size_t bytes) = 0;
  /// Brings the staged bytes to the daemon. Nothing to do with shared memory. Several may be under way.
  virtual std::unique_ptr<Transfer> start_push(std::uint64_t reservation_id, std::uint64_t offset,
                                               std::size_t bytes) = 0;
  /// Makes [offset, offset+bytes) of the slab readable under the lease. Several may be under way.
  virtual std::unique_ptr<Transfer> start_pull(std::uint64_t lease_id, std::uint64_t offset, std::size_t bytes) = 0;
  virtual void close() = 0;

  Status push(std::uint64_t reservation_id, std::uint64_t offset, std::size_t bytes) {
    return status_of(start_push(reservation_id, offset, bytes)->wait());
  }
  Result<PulledBytes> pull(std::uint64_t lease_id, std::uint64_t offset, std::size_t bytes) {
    return start_pull(lease_id, offset, bytes)->wait();
  }
};

/// A transfer that had ended before it began.
class EndedTransfer final : public Transfer {
 public:
  explicit EndedTransfer(Result<PulledBytes> result) : result_(std::move(result)) {}
  Result<PulledBytes> wait() override { return std::move(result_); }

 private:
  Result<PulledBytes> result_;
};

std::unique_ptr<DataPlane> make_shm_data_plane(SharedMemory slab, SharedMemory staging);

}  // namespace kvern
