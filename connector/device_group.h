#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"
#include "connector/cache_layout.h"
#include "connector/client.h"
#include "kernels/page_coder.h"
#include "kernels/paged_cache.h"
#include "transport/device_memory.h"

namespace kvern {

/// A device as the engine's process reaches it.
struct EngineDevice {
  std::shared_ptr<DeviceMemory> memory;
  std::function<Result<std::unique_ptr<PageCoder>>()> make_coder;
};
/// The CUDA device that holds the pointer.
Result<std::shared_ptr<const EngineDevice>> cuda_engine_device(const std::byte* pointer);

/// Pages of a group on a device. The daemon reads and writes them itself where it can reach them, and then encoded
/// bytes alone cross the bus; elsewhere this process moves them, and raw bytes cross it when chunks are stored.
/// Thread-safe.
class DeviceGroup {
 public:
  /// pages.device must be there and outlive nothing; the layout must have validated.
  explicit DeviceGroup(const GroupPages& pages);

  /// The number that the daemon knows the pages by; registers them at the first call in each session. The refusal
  /// comes back as the failure, every time, and is told once; a daemon that was too slow is asked again after a while.
  Result<std::uint64_t> pages_id(const Session& session, std::chrono::milliseconds timeout);

  const PagedCache& cache() const { return cache_; }
  /// Waits for an event that the engine has recorded (0: none), after which its pages hold what they should.
  Status wait(std::uintptr_t event) const { return event == 0 ? Status::ok() : device_->memory->wait(event); }
  /// Lends a coder of this process to the function.
  Status with_coder(const std::function<Status(PageCoder&)>& function);

 private:
  Result<std::uint64_t> register_with(const Session& session, std::chrono::milliseconds timeout);

  const std::uint16_t group_;
  const std::shared_ptr<const EngineDevice> device_;
  const PagedCache cache_;
  std::vector<std::uint64_t> reachable_;  ///< by layer
  std::mutex mutex_;                      ///< held while registering: others wait for the answer
  std::uint64_t session_number_ = 0;
  std::optional<Result<std::uint64_t>> registered_;  ///< in the session of that number
  std::chrono::steady_clock::time_point ask_again_;  ///< after a failure
  bool told_ = false;
  std::mutex coder_mutex_;
  std::unique_ptr<PageCoder> coder_;
};

}  // namespace kvern
