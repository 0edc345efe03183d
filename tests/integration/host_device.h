#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "tests/kernels/host_page_coder.h"
#include "transport/device_memory.h"
#include "transport/shared_memory.h"

namespace kvern::testing {

/// A device whose memory is host memory in sealed files, shared by descriptor: everything of a device but its kernels,
/// on machines without one.
class HostDevice final : public DeviceMemory {
 public:
  static constexpr std::string_view kUuid = "HOST-0";

  std::string_view uuid() const override { return kUuid; }
  int number() const override { return 0; }

  /// "Device memory" of this process.
  std::span<std::byte> allocate(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    auto memory = SharedMemory::create_anonymous("host-device", bytes).value();
    const auto span = memory.bytes();
    allocations_.emplace(span.data(), std::move(memory));
    return span;
  }

  Result<Place> share(const std::byte* pointer, std::uint64_t bytes) override {
    const std::lock_guard lock(mutex_);
    auto found = allocations_.upper_bound(const_cast<std::byte*>(pointer));
    if (!sharing_ || found == allocations_.begin()) {
      return failure(Code::kRefused, "the allocation was not made for sharing");
    }
    --found;
    const auto memory = found->second.bytes();
    const auto offset = static_cast<std::uint64_t>(pointer - memory.data());
    if (offset + bytes > memory.size()) return failure(Code::kRefused, "the pages reach over several allocations");
    Place place;
    place.offset = offset;
    place.allocation.kind = DeviceHandleKind::kDescriptor;
    place.allocation.bytes = memory.size();
    place.allocation.descriptor = UniqueFd(::fcntl(found->second.fd(), F_DUPFD_CLOEXEC, 0));
    return place;
  }
  /// From here on nothing can be shared.
  void refuse_sharing() { sharing_ = false; }

  Result<std::unique_ptr<ImportedMemory>> import(const SharedAllocation& allocation) override {
    if (allocation.kind != DeviceHandleKind::kDescriptor) {
      return failure(Code::kInvalid, "this device shares by descriptor");
    }
    auto mapped =
        SharedMemory::map(UniqueFd(::fcntl(allocation.descriptor.get(), F_DUPFD_CLOEXEC, 0)), allocation.bytes, true);
    if (!mapped) return failure(Code::kInvalid, mapped.error().message());
    return std::make_unique<Mapped>(std::move(*mapped));
  }
  Result<std::shared_ptr<void>> pin(std::span<std::byte> host) override {
    return std::shared_ptr<void>(host.data(), [](void*) {});
  }
  Status wait(std::uintptr_t) override { return Status::ok(); }

 private:
  class Mapped final : public ImportedMemory {
   public:
    explicit Mapped(SharedMemory memory) : memory_(std::move(memory)) {}
    std::span<std::byte> bytes() const override { return memory_.bytes(); }

   private:
    SharedMemory memory_;
  };

  std::mutex mutex_;
  std::map<std::byte*, SharedMemory> allocations_;
  bool sharing_ = true;
};

}  // namespace kvern::testing
