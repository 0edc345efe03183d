#include "kernels/cuda/device.h"
#include "kernels/cuda/page_coder.h"

namespace kvern {
namespace {

tl::unexpected<Status> no_cuda() {
  return failure(Code::kRefused, "this build of Kvern has no CUDA: build it with -DKVERN_CUDA=ON");
}

}  // namespace

bool cuda_available() { return false; }

Result<std::shared_ptr<const CudaPartition>> CudaPartition::make(int, std::uint32_t) { return no_cuda(); }
CudaPartition::~CudaPartition() = default;

Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(std::shared_ptr<const CudaPartition>) { return no_cuda(); }
Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(int) { return no_cuda(); }

}  // namespace kvern
