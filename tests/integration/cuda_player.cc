#include <cuda_runtime_api.h>

#include <filesystem>

#include "tests/integration/device_player.h"
#include "tests/transport/cuda_allocation.h"

namespace kvern::testing {
namespace {

class CudaPlayer final : public DevicePlayer {
 public:
  explicit CudaPlayer(std::string kind) : kind_(std::move(kind)) {}
  ~CudaPlayer() override {
    for (void* pointer : pool_) cudaFreeAsync(pointer, nullptr);
    cudaDeviceSynchronize();
  }
  std::byte* allocate(std::size_t bytes) override {
    if (kind_ != "private") return allocations_.emplace_back(std::make_unique<CudaAllocation>(kind_, bytes))->data();
    void* pointer = nullptr;
    check(cudaMallocAsync(&pointer, bytes, nullptr), "cudaMallocAsync");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    pool_.push_back(pointer);
    return static_cast<std::byte*>(pointer);
  }
  void write(std::byte* device, const std::byte* host, std::size_t bytes) override {
    check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void read(std::byte* host, const std::byte* device, std::size_t bytes) override {
    check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  std::shared_ptr<const EngineDevice> engine_device() override {
    const auto* first = allocations_.empty() ? static_cast<std::byte*>(pool_.front()) : allocations_.front()->data();
    return cuda_engine_device(first).value();
  }

 private:
  const std::string kind_;
  std::vector<std::unique_ptr<CudaAllocation>> allocations_;
  std::vector<void*> pool_;
};

}  // namespace

std::vector<std::string> device_kinds() { return {"malloc", "vmm", "private"}; }
std::unique_ptr<DevicePlayer> make_device_player(const std::string& kind) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return nullptr;
  return std::make_unique<CudaPlayer>(kind);
}
std::string device_daemon_path() {
  // Beside the test, where both were carried to a machine with a device; else in the build tree.
  const auto beside = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "kvernd";
  return std::filesystem::exists(beside) ? beside.string() : KVERND_PATH;
}

}  // namespace kvern::testing
