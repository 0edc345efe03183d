#include "transport/device_memory.h"

namespace kvern {

Result<std::shared_ptr<DeviceMemory>> cuda_device(std::string_view) {
  return failure(Code::kRefused, "this build of Kvern has no CUDA: build it with -DKVERN_CUDA=ON");
}
Result<std::shared_ptr<DeviceMemory>> cuda_device_of(const std::byte*) { return cuda_device({}); }

}  // namespace kvern
