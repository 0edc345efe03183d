#include "service/device.h"

#include <chrono>
#include <utility>

#include "kernels/cuda/page_coder.h"
#include "service/log.h"

namespace kvern {
namespace {

// How often the slab is looked at until all of it is reserved.
constexpr std::chrono::milliseconds kPinCheck{20};

}  // namespace

OpenDevice cuda_devices(std::uint32_t multiprocessors) {
  return [multiprocessors](std::string_view uuid) -> Result<DeviceAccess> {
    auto memory = cuda_device(uuid);
    if (!memory) return failure(memory.error());
    // One for all coders of the device, so that they share the limit.
    auto partition = CudaPartition::make((*memory)->number(), multiprocessors);
    if (!partition) {
      return failure(partition.error().code(),
                     partition.error().message() +
                         (multiprocessors != 0 ? "; pipeline.device_multiprocessors = 0 does without" : ""));
    }
    log_info("chunks are coded on a device", {{"device", uuid}, {"multiprocessors", (*partition)->multiprocessors()}});
    return DeviceAccess{.memory = std::move(*memory),
                        .make_coder = [partition = std::move(*partition)] { return make_cuda_page_coder(partition); }};
  };
}

Device::Device(DeviceAccess access, std::size_t threads, std::span<std::byte> slab,
               std::function<std::uint64_t()> usable_bytes)
    : access_(std::move(access)),
      slab_(slab),
      usable_bytes_(std::move(usable_bytes)),
      threads_("kvern-device", threads, kMaxQueued) {
  pinner_ = std::thread([this] { pin_slab(); });
}

Device::~Device() {
  stopping_.store(true);
  pinner_.join();
}

void Device::pin_slab() {
  while (usable_bytes_() < slab_.size()) {
    if (stopping_.load()) return;
    std::this_thread::sleep_for(kPinCheck);
  }
  auto pinned = access_.memory->pin(slab_);
  if (!pinned) {
    log_warn("the slab is not pinned, copies from and to the device are slower",
             {{"device", access_.memory->uuid()}, {"why", pinned.error().message()}});
    return;
  }
  pinned_ = std::move(*pinned);
  pinned_bytes_.store(slab_.size(), std::memory_order_relaxed);
  log_info("the slab is pinned", {{"device", access_.memory->uuid()}, {"bytes", slab_.size()}});
}

Status Device::submit(Kind kind, std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  // Its task finds the work: it takes the lock first.
  if (!threads_.submit([this] { run_next(); })) return {Code::kBusy, "too many chunks wait for the device"};
  (kind == Kind::kLoad ? loads_ : stores_).push_back(std::move(work));
  return Status::ok();
}

void Device::run_next() {
  std::function<void()> work;
  {
    const std::lock_guard lock(mutex_);
    auto& queue = loads_.empty() ? stores_ : loads_;
    work = std::move(queue.front());
    queue.pop_front();
  }
  work();
}

Status Device::with_coder(const std::function<Status(PageCoder&)>& function) {
  std::unique_ptr<PageCoder> coder;
  {
    const std::lock_guard lock(mutex_);
    if (!idle_coders_.empty()) {
      coder = std::move(idle_coders_.back());
      idle_coders_.pop_back();
    }
  }
  if (!coder) {
    auto made = access_.make_coder();
    if (!made) return made.error();
    coder = std::move(*made);
  }
  const PageCoder::Moved before = coder->moved();
  Status status = function(*coder);
  const PageCoder::Moved after = coder->moved();
  to_host_.fetch_add(after.to_host - before.to_host, std::memory_order_relaxed);
  to_device_.fetch_add(after.to_device - before.to_device, std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  idle_coders_.push_back(std::move(coder));
  return status;
}

PageCoder::Moved Device::moved() const {
  return {.to_host = to_host_.load(std::memory_order_relaxed), .to_device = to_device_.load(std::memory_order_relaxed)};
}

}  // namespace kvern
