#include "kernels/cuda/partition.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

namespace kvern {
namespace {

/// The CUDA version whose form of the functions is asked of the driver: the first that has all of them.
constexpr unsigned kDriverVersion = 12050;

Status outcome(cudaError_t error) {
  if (error == cudaSuccess) return Status::ok();
  cudaGetLastError();  // so that it is no news to later calls
  return {Code::kInternal, std::string("CUDA partition: ") + cudaGetErrorString(error)};
}

/// A function of the driver, which is not linked: machines without one run everything else.
template <typename Function>
bool find(const char* name, Function& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion(name, &found, kDriverVersion, cudaEnableDefault, &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return false;
  }
  function = reinterpret_cast<Function>(found);
  return true;
}

struct Driver {
  decltype(&cuDeviceGet) device_get = nullptr;
  decltype(&cuDeviceGetDevResource) device_resource = nullptr;
  decltype(&cuDevSmResourceSplitByCount) split = nullptr;
  decltype(&cuDevResourceGenerateDesc) describe = nullptr;
  decltype(&cuGreenCtxCreate) create = nullptr;
  decltype(&cuGreenCtxDestroy) destroy = nullptr;
  decltype(&cuGreenCtxStreamCreate) create_stream = nullptr;
  bool complete = false;

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

 private:
  Driver() {
    complete = find("cuDeviceGet", device_get) && find("cuDeviceGetDevResource", device_resource) &&
               find("cuDevSmResourceSplitByCount", split) && find("cuDevResourceGenerateDesc", describe) &&
               find("cuGreenCtxCreate", create) && find("cuGreenCtxDestroy", destroy) &&
               find("cuGreenCtxStreamCreate", create_stream);
  }
};

}  // namespace

Result<std::shared_ptr<const CudaPartition>> CudaPartition::make(int device, std::uint32_t multiprocessors) {
  int all = 0;
  Status status = outcome(cudaSetDevice(device));
  if (status) status = outcome(cudaDeviceGetAttribute(&all, cudaDevAttrMultiProcessorCount, device));
  if (!status) return failure(status);
  const std::shared_ptr<CudaPartition> partition(new CudaPartition(device));
  partition->multiprocessors_ = static_cast<std::uint32_t>(all);
  if (multiprocessors == 0 || multiprocessors >= partition->multiprocessors_) return {partition};

  const Driver& driver = Driver::get();
  const auto refused = [&](const char* what) {
    return failure(Code::kRefused, std::string("the driver cannot set multiprocessors apart (") + what + ")");
  };
  if (!driver.complete) return refused("it is older than CUDA 12.5");
  // The primary context, of which the partition is a part.
  if (status = outcome(cudaFree(nullptr)); !status) return failure(status);
  CUdevice number = 0;
  CUdevResource whole{};
  CUdevResource part{};
  unsigned groups = 1;
  CUdevResourceDesc description = nullptr;
  if (driver.device_get(&number, device) != CUDA_SUCCESS ||
      driver.device_resource(number, &whole, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS) {
    return refused("cuDeviceGetDevResource");
  }
  // No kernel of ours needs clusters of blocks, so that smaller shares will do.
  if (driver.split(&part, &groups, &whole, nullptr, CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING, multiprocessors) !=
          CUDA_SUCCESS ||
      groups == 0) {
    return refused("cuDevSmResourceSplitByCount");
  }
  if (driver.describe(&description, &part, 1) != CUDA_SUCCESS ||
      driver.create(&partition->context_, description, number, CU_GREEN_CTX_DEFAULT_STREAM) != CUDA_SUCCESS) {
    return refused("cuGreenCtxCreate");
  }
  partition->multiprocessors_ = part.sm.smCount;
  return {partition};
}

CudaPartition::~CudaPartition() {
  if (context_ != nullptr) Driver::get().destroy(context_);
}

Result<CUstream_st*> CudaPartition::make_stream() const {
  int lowest = 0;
  int highest = 0;
  CUstream_st* stream = nullptr;
  Status status = outcome(cudaSetDevice(device_));
  if (status) status = outcome(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  if (status && context_ == nullptr) {
    status = outcome(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, lowest));
  } else if (status && Driver::get().create_stream(&stream, context_, CU_STREAM_NON_BLOCKING, lowest) != CUDA_SUCCESS) {
    status = Status(Code::kInternal, "CUDA partition: no stream can be made");
  }
  if (!status) return failure(status);
  return stream;
}

}  // namespace kvern
