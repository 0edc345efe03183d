#pragma once

#include <memory>

#include "base/status.h"
#include "kernels/cuda/partition.h"
#include "kernels/page_coder.h"

namespace kvern {

/// A coder that works on the partition, with a stream of the lowest priority: engines go first. Its scratch on the
/// device grows to the raw and the encoded bytes of the largest chunk. Knows raw, int8, int8r, fp8, int4, int3 and
/// int2. kRefused in a build without CUDA and where the device cannot be used.
Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(std::shared_ptr<const CudaPartition> partition);
/// On the whole of the device of that number.
Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(int device);

}  // namespace kvern
