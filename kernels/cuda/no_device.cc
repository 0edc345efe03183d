#include "kernels/cuda/device.h"

namespace kvern {

bool cuda_available() { return false; }

}  // namespace kvern
