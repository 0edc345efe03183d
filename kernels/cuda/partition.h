#pragma once

#include <cstdint>
#include <memory>

#include "base/status.h"

struct CUstream_st;
struct CUgreenCtx_st;

namespace kvern {

/// A share of a CUDA device's multiprocessors (a green context of the driver): kernels on its streams leave the others
/// to whoever else works in this process, and under MPS in other processes. Copies are not limited. Immutable; streams
/// must be destroyed before it.
class CudaPartition {
 public:
  /// At least so many multiprocessors, rounded up to what the device can split off; 0 or more than there are: all of
  /// them. kRefused where the driver cannot split.
  static Result<std::shared_ptr<const CudaPartition>> make(int device, std::uint32_t multiprocessors);
  ~CudaPartition();
  CudaPartition(const CudaPartition&) = delete;
  CudaPartition& operator=(const CudaPartition&) = delete;

  int device() const { return device_; }
  std::uint32_t multiprocessors() const { return multiprocessors_; }
  /// A stream of the lowest priority, to be ended with cudaStreamDestroy().
  Result<CUstream_st*> make_stream() const;

 private:
  explicit CudaPartition(int device) : device_(device) {}

  const int device_;
  std::uint32_t multiprocessors_ = 0;
  CUgreenCtx_st* context_ = nullptr;  ///< null: the whole device
};

}  // namespace kvern
