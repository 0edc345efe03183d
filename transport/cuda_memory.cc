#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "transport/device_memory.h"

namespace kvern {
namespace {

constexpr const char* kDriverLibrary = "libcuda.so.1";

#define KVERN_TEXT_OF(name) #name
#define KVERN_TEXT(name) KVERN_TEXT_OF(name)
/// The driver's functions that are used here; cuda.h renames them to the versions that it declares.
#define KVERN_DRIVER_FUNCTIONS(DO)   \
  DO(cuInit)                         \
  DO(cuGetErrorString)               \
  DO(cuDeviceGetCount)               \
  DO(cuDeviceGet)                    \
  DO(cuDeviceGetUuid)                \
  DO(cuDevicePrimaryCtxRetain)       \
  DO(cuCtxPushCurrent)               \
  DO(cuCtxPopCurrent)                \
  DO(cuPointerGetAttribute)          \
  DO(cuMemGetAddressRange)           \
  DO(cuIpcGetMemHandle)              \
  DO(cuIpcOpenMemHandle)             \
  DO(cuIpcCloseMemHandle)            \
  DO(cuMemRetainAllocationHandle)    \
  DO(cuMemExportToShareableHandle)   \
  DO(cuMemImportFromShareableHandle) \
  DO(cuMemRelease)                   \
  DO(cuMemAddressReserve)            \
  DO(cuMemAddressFree)               \
  DO(cuMemMap)                       \
  DO(cuMemUnmap)                     \
  DO(cuMemSetAccess)                 \
  DO(cuMemGetAllocationGranularity)  \
  DO(cuMemHostRegister)              \
  DO(cuMemHostUnregister)            \
  DO(cuEventSynchronize)

struct Driver {
#define KVERN_DECLARE(name) decltype(&::name) name = nullptr;
  KVERN_DRIVER_FUNCTIONS(KVERN_DECLARE)
#undef KVERN_DECLARE
};

/// libcuda, opened once and never closed; a sentence when it is not there or has no device.
const Result<Driver>& driver() {
  static const Result<Driver> loaded = []() -> Result<Driver> {
    void* library = ::dlopen(kDriverLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
      return failure(Code::kRefused, "there is no NVIDIA driver (" + std::string(kDriverLibrary) + ")");
    Driver found;
#define KVERN_FIND(name)                                                                   \
  found.name = reinterpret_cast<decltype(found.name)>(::dlsym(library, KVERN_TEXT(name))); \
  if (found.name == nullptr)                                                               \
    return failure(Code::kRefused, "the NVIDIA driver is too old: it has no " KVERN_TEXT(name));
    KVERN_DRIVER_FUNCTIONS(KVERN_FIND)
#undef KVERN_FIND
    if (found.cuInit(0) != CUDA_SUCCESS)
      return failure(Code::kRefused, "the NVIDIA driver does not start: is there a GPU?");
    return found;
  }();
  return loaded;
}

/// "what: reason", or ok.
Status outcome(const Driver& cu, CUresult result, const char* what, Code code = Code::kInternal) {
  if (result == CUDA_SUCCESS) return Status::ok();
  const char* text = nullptr;
  cu.cuGetErrorString(result, &text);
  return {code, std::string(what) + ": " + (text == nullptr ? "unknown CUDA error" : text)};
}

CUdeviceptr address_of(const std::byte* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }
std::byte* pointer_of(CUdeviceptr address) { return reinterpret_cast<std::byte*>(address); }

/// A context is current on this thread while this lives.
class Current {
 public:
  Current(const Driver& cu, CUcontext context)
      : cu_(cu), status_(outcome(cu, cu.cuCtxPushCurrent(context), "CUDA context")) {}
  ~Current() {
    CUcontext ignored = nullptr;
    if (status_) cu_.cuCtxPopCurrent(&ignored);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  const Status& status() const { return status_; }

 private:
  const Driver& cu_;
  const Status status_;
};

/// The range of the allocation that an address lies in.
Result<std::span<std::byte>> range_of(const Driver& cu, CUdeviceptr address) {
  CUdeviceptr base = 0;
  std::size_t bytes = 0;
  if (Status status =
          outcome(cu, cu.cuMemGetAddressRange(&base, &bytes, address), "the allocation is not known", Code::kRefused);
      !status) {
    return failure(status);
  }
  return std::span(pointer_of(base), bytes);
}

class IpcMemory final : public ImportedMemory {
 public:
  IpcMemory(const Driver& cu, CUcontext context, CUdeviceptr opened, std::span<std::byte> bytes)
      : cu_(cu), context_(context), opened_(opened), bytes_(bytes) {}
  ~IpcMemory() override {
    const Current current(cu_, context_);
    cu_.cuIpcCloseMemHandle(opened_);
  }
  std::span<std::byte> bytes() const override { return bytes_; }

 private:
  const Driver& cu_;
  const CUcontext context_;
  const CUdeviceptr opened_;
  const std::span<std::byte> bytes_;
};

/// A mapping of a handle that came as a descriptor. Takes apart what was put together so far.
class MappedMemory final : public ImportedMemory {
 public:
  MappedMemory(const Driver& cu, CUcontext context) : cu_(cu), context_(context) {}
  ~MappedMemory() override {
    const Current current(cu_, context_);
    if (mapped_) cu_.cuMemUnmap(address_, bytes_);
    if (address_ != 0) cu_.cuMemAddressFree(address_, bytes_);
  }

  /// The caller has the context current.
  Status map(CUdevice device, int descriptor, std::uint64_t bytes) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
    std::size_t granularity = 0;
    if (Status status =
            outcome(cu_, cu_.cuMemGetAllocationGranularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                    "granularity");
        !status) {
      return status;
    }
    if (bytes == 0 || bytes % granularity != 0) {
      return {Code::kInvalid, "an allocation that comes as a descriptor has a multiple of " +
                                  std::to_string(granularity) + " bytes, not " + std::to_string(bytes)};
    }
    CUmemGenericAllocationHandle handle = 0;
    Status status = outcome(
        cu_,
        cu_.cuMemImportFromShareableHandle(&handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(descriptor)),
                                           CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "the descriptor is no memory of this driver", Code::kRefused);
    if (!status) return status;
    bytes_ = bytes;
    status = outcome(cu_, cu_.cuMemAddressReserve(&address_, bytes, 0, 0, 0), "no address space for the allocation");
    // The driver refuses to map more than the allocation has.
    if (status)
      status = outcome(cu_, cu_.cuMemMap(address_, bytes, 0, handle, 0),
                       "the allocation is smaller than it claims, or cannot be mapped", Code::kInvalid);
    mapped_ = status.is_ok();
    cu_.cuMemRelease(handle);  // a mapping keeps the memory
    if (!status) return status;
    const CUmemAccessDesc access{.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
                                 .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    return outcome(cu_, cu_.cuMemSetAccess(address_, bytes, &access, 1), "the allocation lies on another device",
                   Code::kRefused);
  }
  std::span<std::byte> bytes() const override { return {pointer_of(address_), bytes_}; }

 private:
  const Driver& cu_;
  const CUcontext context_;
  CUdeviceptr address_ = 0;
  std::size_t bytes_ = 0;
  bool mapped_ = false;
};

/// A device by its primary context, the one that the CUDA runtime uses too. The context is retained for the life of the
/// process: it holds the memory that kernels of others may use.
class CudaMemory final : public DeviceMemory {
 public:
  CudaMemory(const Driver& cu, int number, CUdevice device, CUcontext context, std::string uuid)
      : cu_(cu), number_(number), device_(device), context_(context), uuid_(std::move(uuid)) {}

  std::string_view uuid() const override { return uuid_; }
  int number() const override { return number_; }

  Result<Place> share(const std::byte* pointer, std::uint64_t bytes) override {
    const Current current(cu_, context_);
    if (!current.status()) return failure(current.status());
    const CUdeviceptr address = address_of(pointer);
    const auto range = range_of(cu_, address);
    if (!range) return failure(range.error());
    Place place;
    place.offset = address - address_of(range->data());
    place.allocation.bytes = range->size();
    if (place.offset + bytes > range->size()) {
      return failure(Code::kRefused,
                     "the pages reach over several allocations (expandable segments?): only whole ones can be shared");
    }
    int legacy = 0;
    if (cu_.cuPointerGetAttribute(&legacy, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, address) == CUDA_SUCCESS &&
        legacy != 0) {
      CUipcMemHandle handle{};
      if (Status status = outcome(cu_, cu_.cuIpcGetMemHandle(&handle, address), "the allocation has no CUDA IPC handle",
                                  Code::kRefused);
          !status) {
        return failure(status);
      }
      place.allocation.kind = DeviceHandleKind::kCudaIpc;
      place.allocation.handle.assign(handle.reserved, sizeof handle.reserved);
      return place;
    }
    CUmemGenericAllocationHandle handle = 0;
    if (cu_.cuMemRetainAllocationHandle(&handle, pointer_of(address)) != CUDA_SUCCESS) {
      return failure(Code::kRefused,
                     "the allocation is of a memory pool, which cannot be shared: use cudaMalloc or cuMemCreate");
    }
    int descriptor = -1;
    Status status =
        outcome(cu_, cu_.cuMemExportToShareableHandle(&descriptor, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                "the allocation was not made for sharing by descriptor", Code::kRefused);
    cu_.cuMemRelease(handle);
    if (!status) return failure(status);
    place.allocation.kind = DeviceHandleKind::kDescriptor;
    place.allocation.descriptor = UniqueFd(descriptor);
    return place;
  }

  Result<std::unique_ptr<ImportedMemory>> import(const SharedAllocation& allocation) override {
    const Current current(cu_, context_);
    if (!current.status()) return failure(current.status());
    if (allocation.kind == DeviceHandleKind::kDescriptor) {
      auto memory = std::make_unique<MappedMemory>(cu_, context_);
      if (Status status = memory->map(device_, allocation.descriptor.get(), allocation.bytes); !status)
        return failure(status);
      return memory;
    }
    CUipcMemHandle handle{};
    if (allocation.kind != DeviceHandleKind::kCudaIpc || allocation.handle.size() != sizeof handle.reserved) {
      return failure(Code::kInvalid, "an allocation is named by a CUDA IPC handle of " +
                                         std::to_string(sizeof handle.reserved) + " bytes or by a descriptor");
    }
    std::memcpy(handle.reserved, allocation.handle.data(), sizeof handle.reserved);
    CUdeviceptr opened = 0;
    if (Status status = outcome(cu_, cu_.cuIpcOpenMemHandle(&opened, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS),
                                "CUDA IPC cannot open the allocation", Code::kRefused);
        !status) {
      return failure(status);
    }
    const auto range = range_of(cu_, opened);
    auto memory = std::make_unique<IpcMemory>(cu_, context_, opened, range ? *range : std::span<std::byte>());
    if (!range) return failure(range.error());
    if (range->size() < allocation.bytes) {
      return failure(Code::kInvalid, "the allocation has " + std::to_string(range->size()) + " bytes, not " +
                                         std::to_string(allocation.bytes));
    }
    return memory;
  }

  Result<std::shared_ptr<void>> pin(std::span<std::byte> host) override {
    const Current current(cu_, context_);
    if (!current.status()) return failure(current.status());
    if (Status status = outcome(cu_, cu_.cuMemHostRegister(host.data(), host.size(), CU_MEMHOSTREGISTER_PORTABLE),
                                "the host memory cannot be pinned");
        !status) {
      return failure(status);
    }
    return std::shared_ptr<void>(host.data(), [&cu = cu_, context = context_](void* memory) {
      const Current there(cu, context);
      cu.cuMemHostUnregister(memory);
    });
  }

  Status wait(std::uintptr_t event) override {
    const Current current(cu_, context_);
    if (!current.status()) return current.status();
    return outcome(cu_, cu_.cuEventSynchronize(reinterpret_cast<CUevent>(event)), "the engine's event");
  }

 private:
  const Driver& cu_;
  const int number_;
  const CUdevice device_;
  const CUcontext context_;
  const std::string uuid_;
};

std::string uuid_text(const CUuuid& uuid) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "GPU-";
  for (std::size_t i = 0; i < sizeof uuid.bytes; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    const auto byte = static_cast<unsigned char>(uuid.bytes[i]);
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

/// The device of that number; made once per process.
Result<std::shared_ptr<DeviceMemory>> device_of_number(const Driver& cu, int number) {
  static std::mutex mutex;
  static std::map<int, std::shared_ptr<DeviceMemory>> devices;
  const std::lock_guard lock(mutex);
  auto& device = devices[number];
  if (device) return device;
  CUdevice handle = 0;
  CUuuid uuid{};
  CUcontext context = nullptr;
  Status status = outcome(cu, cu.cuDeviceGet(&handle, number), "CUDA device", Code::kRefused);
  if (status) status = outcome(cu, cu.cuDeviceGetUuid(&uuid, handle), "CUDA device", Code::kRefused);
  if (status) status = outcome(cu, cu.cuDevicePrimaryCtxRetain(&context, handle), "CUDA context", Code::kRefused);
  if (!status) return failure(status);
  device = std::make_shared<CudaMemory>(cu, number, handle, context, uuid_text(uuid));
  return device;
}

}  // namespace

Result<std::shared_ptr<DeviceMemory>> cuda_device(std::string_view uuid) {
  const auto& cu = driver();
  if (!cu) return failure(cu.error());
  int count = 0;
  if (Status status = outcome(*cu, cu->cuDeviceGetCount(&count), "CUDA devices", Code::kRefused); !status)
    return failure(status);
  for (int number = 0; number < count; ++number) {
    CUdevice handle = 0;
    CUuuid found{};
    if (cu->cuDeviceGet(&handle, number) != CUDA_SUCCESS || cu->cuDeviceGetUuid(&found, handle) != CUDA_SUCCESS)
      continue;
    if (uuid_text(found) == uuid) return device_of_number(*cu, number);
  }
  return failure(Code::kRefused, "this process sees no CUDA device " + std::string(uuid) + " (CUDA_VISIBLE_DEVICES?)");
}

Result<std::shared_ptr<DeviceMemory>> cuda_device_of(const std::byte* pointer) {
  const auto& cu = driver();
  if (!cu) return failure(cu.error());
  int number = 0;
  if (Status status =
          outcome(*cu, cu->cuPointerGetAttribute(&number, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address_of(pointer)),
                  "the pages are no memory of a CUDA device", Code::kRefused);
      !status) {
    return failure(status);
  }
  return device_of_number(*cu, number);
}

}  // namespace kvern
