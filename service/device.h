#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/executor.h"
#include "base/status.h"
#include "kernels/page_coder.h"
#include "transport/device_memory.h"

namespace kvern {

/// How the daemon reaches a device: its memory, and what codes chunks on it.
struct DeviceAccess {
  std::shared_ptr<DeviceMemory> memory;
  std::function<Result<std::unique_ptr<PageCoder>>()> make_coder;
};
using OpenDevice = std::function<Result<DeviceAccess>(std::string_view uuid)>;
/// CUDA devices, of each so many multiprocessors (0: all) for the coders; everything is refused where there are none.
OpenDevice cuda_devices(std::uint32_t multiprocessors);

/// A device at work: its threads, coders and the pinned slab. Thread-safe.
class Device {
 public:
  static constexpr std::size_t kMaxQueued = 1U << 16;

  /// threads: chunks under way at the same time. One gathers and encodes, one crosses the bus, others have their
  /// checksums taken; each has scratch on the device for its raw and encoded bytes.
  /// Pins the slab on a thread of its own once all of it is usable; until then copies are slower, not wrong.
  Device(DeviceAccess access, std::size_t threads, std::span<std::byte> slab,
         std::function<std::uint64_t()> usable_bytes);
  ~Device();

  DeviceMemory& memory() const { return *access_.memory; }
  /// Runs work on one of the device's threads, loads before stores: a request waits for them. kBusy when too much
  /// waits.
  enum class Kind { kLoad, kStore };
  Status submit(Kind kind, std::function<void()> work);
  /// Lends a coder to the function.
  Status with_coder(const std::function<Status(PageCoder&)>& function);
  void drain() { threads_.drain(); }

  std::uint64_t pinned_bytes() const { return pinned_bytes_.load(std::memory_order_relaxed); }
  /// Of all coders so far.
  PageCoder::Moved moved() const;

 private:
  void pin_slab();
  void run_next();

  const DeviceAccess access_;
  const std::span<std::byte> slab_;
  const std::function<std::uint64_t()> usable_bytes_;
  std::atomic<std::uint64_t> pinned_bytes_{0};
  std::atomic<std::uint64_t> to_host_{0};
  std::atomic<std::uint64_t> to_device_{0};
  std::mutex mutex_;
  std::deque<std::function<void()>> loads_;  ///< each has a task of threads_, which takes the next of both
  std::deque<std::function<void()>> stores_;
  std::vector<std::unique_ptr<PageCoder>> idle_coders_;
  std::atomic<bool> stopping_{false};
  std::shared_ptr<void> pinned_;  ///< the thread's own
  std::thread pinner_;
  ThreadPool threads_;  ///< last: its tasks use the rest
};

}  // namespace kvern
