#pragma once

#include <memory>

#include "base/status.h"
#include "kernels/page_coder.h"

namespace kvern {

/// A coder for the CUDA device of that number, with a stream of the lowest priority: engines go first. Its scratch on
/// the device grows to the raw and the encoded bytes of the largest chunk. Knows raw, int8, int8r, fp8, int4, int3 and
/// int2. kRefused in a build without CUDA and where the device cannot be used.
Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(int device);

}  // namespace kvern
