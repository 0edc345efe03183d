#include "kernels/cuda/device.h"

#include <cuda_runtime_api.h>

namespace kvern {

bool cuda_available() {
  static const bool available = [] {
    int count = 0;
    // Without a driver this returns an error and leaves the count alone. The error is no news to later calls.
    if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
    cudaGetLastError();
    return false;
  }();
  return available;
}

}  // namespace kvern
