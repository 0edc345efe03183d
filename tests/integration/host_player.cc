#include <cstring>

#include "tests/integration/device_player.h"
#include "tests/integration/host_device.h"

namespace kvern::testing {
namespace {

class HostPlayer final : public DevicePlayer {
 public:
  explicit HostPlayer(const std::string& kind) {
    if (kind == "private") device_->refuse_sharing();
  }
  std::byte* allocate(std::size_t bytes) override { return device_->allocate(bytes).data(); }
  void write(std::byte* device, const std::byte* host, std::size_t bytes) override { std::memcpy(device, host, bytes); }
  void read(std::byte* host, const std::byte* device, std::size_t bytes) override { std::memcpy(host, device, bytes); }
  std::shared_ptr<const EngineDevice> engine_device() override {
    return std::make_shared<const EngineDevice>(EngineDevice{
        .memory = device_,
        .make_coder = []() -> Result<std::unique_ptr<PageCoder>> { return std::make_unique<HostPageCoder>(); }});
  }

 private:
  std::shared_ptr<HostDevice> device_ = std::make_shared<HostDevice>();
};

}  // namespace

std::vector<std::string> device_kinds() { return {"shared", "private"}; }
std::unique_ptr<DevicePlayer> make_device_player(const std::string& kind) { return std::make_unique<HostPlayer>(kind); }
std::string device_daemon_path() { return HOST_DEVICE_DAEMON_PATH; }

}  // namespace kvern::testing
