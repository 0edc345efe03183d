#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels/cuda/device.h"

namespace kvern {

/// Skips where there is no device.
class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda_available()) GTEST_SKIP() << "no CUDA device";
  }
};

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

/// Numbers in device memory; filled with 0xee where nothing was put, unless KVERN_UNFILLED is set: compute-sanitizer's
/// initcheck sees what nobody wrote only where nobody filled it.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : count_(count) {
    check_cuda(cudaMalloc(&data_, std::max<std::size_t>(count * sizeof(T), 1)));
    static const bool filled = std::getenv("KVERN_UNFILLED") == nullptr;
    if (filled) check_cuda(cudaMemset(data_, 0xee, count * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    put(0, values.data(), values.size());
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return static_cast<T*>(data_); }
  void put(std::size_t at, const T* from, std::size_t count) {
    check_cuda(cudaMemcpy(data() + at, from, count * sizeof(T), cudaMemcpyHostToDevice));
    // A copy from pageable memory may still be under way, and streams of coders do not wait for the default one.
    check_cuda(cudaDeviceSynchronize());
  }
  std::vector<T> get(std::size_t at, std::size_t count) const {
    std::vector<T> values(count);
    check_cuda(cudaMemcpy(values.data(), data() + at, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
  std::vector<T> get() const { return get(0, count_); }

 private:
  void* data_ = nullptr;
  std::size_t count_;
};

/// A word that kernels set.
class DeviceFlag {
 public:
  DeviceFlag() : memory_(std::vector<std::uint32_t>{0}) {}
  std::uint32_t* pointer() const { return memory_.data(); }
  std::uint32_t value() const { return memory_.get().front(); }

 private:
  DeviceArray<std::uint32_t> memory_;
};

}  // namespace kvern
