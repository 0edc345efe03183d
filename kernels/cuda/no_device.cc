#include "kernels/cuda/device.h"
#include "kernels/cuda/page_coder.h"

namespace kvern {

bool cuda_available() { return false; }

Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(int) {
  return failure(Code::kRefused, "this build of Kvern has no CUDA: build it with -DKVERN_CUDA=ON");
}

}  // namespace kvern
