#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kvern::testing {

/// A function of the driver, without linking libcuda.
template <typename Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result) != cudaSuccess ||
      found == nullptr) {
    throw std::runtime_error(std::string("the driver has no ") + name);
  }
  return reinterpret_cast<Function*>(found);
}

inline void check(int result, const char* what) {
  if (result != 0) throw std::runtime_error(std::string(what) + " fails with " + std::to_string(result));
}

/// Device memory as engines have it: from cudaMalloc, or from the driver's virtual memory management with handles that
/// can be exported as descriptors ("vmm").
class CudaAllocation {
 public:
  CudaAllocation(std::string_view kind, std::size_t bytes) : bytes_(bytes), vmm_(kind == "vmm") {
    if (!vmm_) {
      void* pointer = nullptr;
      check(cudaMalloc(&pointer, bytes), "cudaMalloc");
      data_ = static_cast<std::byte*>(pointer);
      return;
    }
    check(cudaFree(nullptr), "a context");
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0};
    std::size_t granularity = 0;
    check(driver_function<CUresult(std::size_t*, const CUmemAllocationProp*, CUmemAllocationGranularity_flags)>(
              "cuMemGetAllocationGranularity")(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
          "cuMemGetAllocationGranularity");
    bytes_ = (bytes + granularity - 1) / granularity * granularity;
    CUmemGenericAllocationHandle handle = 0;
    check(driver_function<CUresult(CUmemGenericAllocationHandle*, std::size_t, const CUmemAllocationProp*,
                                   unsigned long long)>("cuMemCreate")(&handle, bytes_, &properties, 0),
          "cuMemCreate");
    CUdeviceptr address = 0;
    check(driver_function<CUresult(CUdeviceptr*, std::size_t, std::size_t, CUdeviceptr, unsigned long long)>(
              "cuMemAddressReserve")(&address, bytes_, 0, 0, 0),
          "cuMemAddressReserve");
    check(driver_function<CUresult(CUdeviceptr, std::size_t, std::size_t, CUmemGenericAllocationHandle,
                                   unsigned long long)>("cuMemMap")(address, bytes_, 0, handle, 0),
          "cuMemMap");
    const CUmemAccessDesc access{.location = properties.location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    check(driver_function<CUresult(CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t)>("cuMemSetAccess")(
              address, bytes_, &access, 1),
          "cuMemSetAccess");
    check(driver_function<CUresult(CUmemGenericAllocationHandle)>("cuMemRelease")(handle), "cuMemRelease");
    data_ = reinterpret_cast<std::byte*>(address);
  }
  ~CudaAllocation() {
    if (!vmm_) {
      cudaFree(data_);
      return;
    }
    const auto address = reinterpret_cast<CUdeviceptr>(data_);
    driver_function<CUresult(CUdeviceptr, std::size_t)>("cuMemUnmap")(address, bytes_);
    driver_function<CUresult(CUdeviceptr, std::size_t)>("cuMemAddressFree")(address, bytes_);
  }
  CudaAllocation(const CudaAllocation&) = delete;
  CudaAllocation& operator=(const CudaAllocation&) = delete;

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  bool vmm_ = false;
};

/// Small bfloat16 numbers that depend on the seed.
inline std::vector<std::byte> numbers(std::size_t bytes, std::uint64_t seed) {
  std::vector<std::byte> values(bytes);
  std::uint64_t state = seed * 0x9e37'79b9'7f4a'7c15ULL + 1;
  for (std::size_t i = 0; i + 1 < bytes; i += 2) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    values[i] = static_cast<std::byte>(state >> 56);
    values[i + 1] = static_cast<std::byte>((state >> 40 & 0x80U) | (0x3eU + (state >> 33) % 2));
  }
  return values;
}

inline std::vector<std::byte> on_host(const std::byte* device, std::size_t bytes) {
  std::vector<std::byte> host(bytes);
  check(cudaMemcpy(host.data(), device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return host;
}
inline void put(std::byte* device, const std::vector<std::byte>& host) {
  check(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
}

}  // namespace kvern::testing
