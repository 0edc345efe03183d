#pragma once

#include <memory>
#include <optional>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/paged_cache.h"
#include "transport/device_memory.h"

namespace kvern {

class Device;

/// Pages of a session on a device, mapped into this process. Thread-safe.
class DevicePages {
 public:
  /// memory: what the layers of the cache lie in.
  DevicePages(std::shared_ptr<Device> device, PagedCache cache, std::vector<std::unique_ptr<ImportedMemory>> memory)
      : device_(std::move(device)), cache_(std::move(cache)), memory_(std::move(memory)) {}

  Device& device() const { return *device_; }
  const PagedCache& cache() const { return cache_; }

  /// Keeps the pages from being revoked while it lives. Held by whoever lets the device read or write them.
  using Use = std::shared_lock<std::shared_mutex>;
  /// nullopt once they are revoked.
  std::optional<Use> use() const {
    Use use(mutex_);
    if (revoked_) return std::nullopt;
    return use;
  }
  /// When it returns nobody touches the pages, and nobody will: before the session's client may hear that it has ended,
  /// since the engine then gives the pages to others.
  void revoke() {
    const std::unique_lock lock(mutex_);
    revoked_ = true;
  }

 private:
  const std::shared_ptr<Device> device_;
  const PagedCache cache_;
  const std::vector<std::unique_ptr<ImportedMemory>> memory_;
  mutable std::shared_mutex mutex_;
  bool revoked_ = false;
};

}  // namespace kvern
