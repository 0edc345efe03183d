#include <atomic>
#include <utility>

#include "transport/data_plane.h"

namespace kvern {
namespace {

constexpr std::size_t kStagingAlignment = 64;

bool within(std::uint64_t offset, std::size_t bytes, std::size_t size) {
  return offset <= size && bytes <= size - offset;
}

Status outside(const char* what, std::uint64_t offset, std::size_t bytes, std::size_t size) {
  return Status(Code::kInvalid, std::string(what) + " extent at " + std::to_string(offset) + " of " +
                                    std::to_string(bytes) + " bytes does not lie in its " + std::to_string(size) +
                                    " bytes");
}

class ShmDataPlane final : public DataPlane {
 public:
  ShmDataPlane(SharedMemory slab, SharedMemory staging) : slab_(std::move(slab)), staging_(std::move(staging)) {}

  std::string_view name() const override { return "shm"; }

  Result<std::span<std::byte>> staging(std::uint64_t offset, std::size_t bytes) override {
    if (closed_) return failure(closed());
    if (offset % kStagingAlignment != 0 || !within(offset, bytes, staging_.bytes().size())) {
      return failure(outside("staging", offset, bytes, staging_.bytes().size()));
    }
    return staging_.bytes().subspan(offset, bytes);
  }

  std::unique_ptr<Transfer> start_push(std::uint64_t /*reservation_id*/, std::uint64_t offset,
                                       std::size_t bytes) override {
    const Status status = status_of(staging(offset, bytes));
    return std::make_unique<EndedTransfer>(status ? Result<PulledBytes>(PulledBytes()) : failure(status));
  }

  std::unique_ptr<Transfer> start_pull(std::uint64_t /*lease_id*/, std::uint64_t offset, std::size_t bytes) override {
    return std::make_unique<EndedTransfer>(view(offset, bytes));
  }

  // The mappings stay until destruction: views that were handed out remain readable.
  void close() override { closed_ = true; }

 private:
  Result<PulledBytes> view(std::uint64_t offset, std::size_t bytes) const {
    if (closed_) return failure(closed());
    if (!within(offset, bytes, slab_.bytes().size())) {
      return failure(outside("slab", offset, bytes, slab_.bytes().size()));
    }
    return PulledBytes(std::span<const std::byte>(slab_.bytes().subspan(offset, bytes)));
  }
  static Status closed() { return Status(Code::kUnavailable, "the session was closed"); }

  const SharedMemory slab_;
  const SharedMemory staging_;
  std::atomic<bool> closed_ = false;
};

}  // namespace

std::unique_ptr<DataPlane> make_shm_data_plane(SharedMemory slab, SharedMemory staging) {
  return std::make_unique<ShmDataPlane>(std::move(slab), std::move(staging));
}

}  // namespace kvern
