#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/status.h"
#include "transport/shared_memory.h"

namespace kvern {

/// How memory of a device is named to another process of the same host.
enum class DeviceHandleKind : std::uint32_t {
  kCudaIpc = 1,     ///< 64 bytes that the driver understands: allocations of cudaMalloc
  kDescriptor = 2,  ///< a file descriptor: allocations of the driver's virtual memory management
};

/// One allocation, as its owner hands it to a peer.
struct SharedAllocation {
  DeviceHandleKind kind = DeviceHandleKind::kCudaIpc;
  std::uint64_t bytes = 0;  ///< of the whole allocation, as the owner knows it
  std::string handle;       ///< kCudaIpc
  UniqueFd descriptor;      ///< kDescriptor
};

/// Memory of another process that is mapped here; unmapped on destruction. The owner's end takes nothing away: the
/// bytes stay where they are until this goes.
class ImportedMemory {
 public:
  virtual ~ImportedMemory() = default;
  /// Addresses of the device, for kernels and copies that run there; as long as the allocation really is.
  virtual std::span<std::byte> bytes() const = 0;
};

/// The memory of one device: how an engine hands its pages out and how the daemon reaches them. Thread-safe.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  /// The same in every process: "GPU-1f8c…".
  virtual std::string_view uuid() const = 0;
  /// Of the device in this process, as the CUDA runtime counts.
  virtual int number() const = 0;

  /// An allocation and where in it an address lies.
  struct Place {
    SharedAllocation allocation;
    std::uint64_t offset = 0;
  };
  /// The allocation of this process that holds [pointer, pointer + bytes). kRefused in a sentence when it cannot be
  /// shared: another device, a memory pool, virtual memory without a handle type for descriptors or in several pieces.
  virtual Result<Place> share(const std::byte* pointer, std::uint64_t bytes) = 0;
  /// Maps an allocation of a peer. Nothing that the peer says is believed: the size is the driver's. kRefused when the
  /// driver cannot open it, kInvalid when it is smaller than it claims.
  virtual Result<std::unique_ptr<ImportedMemory>> import(const SharedAllocation& allocation) = 0;

  /// Lets the device read and write host memory of this process without copies in between, until the result goes.
  virtual Result<std::shared_ptr<void>> pin(std::span<std::byte> host) = 0;
  /// Waits for an event of the device that the caller has recorded (a CUevent), blocking the thread.
  virtual Status wait(std::uintptr_t event) = 0;
};

/// The CUDA device of that uuid, or the one that an address of this process belongs to. kRefused in a sentence without
/// a driver, without such a device, and in a build without CUDA. libcuda is opened on the first call.
Result<std::shared_ptr<DeviceMemory>> cuda_device(std::string_view uuid);
Result<std::shared_ptr<DeviceMemory>> cuda_device_of(const std::byte* pointer);

}  // namespace kvern
