#include "transport/buffer_pool.h"

#include <sys/mman.h>

#include <cstdlib>

namespace kvern {
namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kHugePageBytes = 2U << 20;

std::size_t rounded(std::size_t bytes) {
  const std::size_t unit = bytes >= kHugePageBytes ? kHugePageBytes : kPageBytes;
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

std::shared_ptr<BufferPool> BufferPool::create(std::size_t max_idle_bytes) {
  return std::shared_ptr<BufferPool>(new BufferPool(max_idle_bytes));
}

BufferPool::~BufferPool() {
  for (const auto& [bytes, buffer] : idle_) std::free(buffer);
}

std::shared_ptr<std::byte[]> BufferPool::take(std::size_t bytes) {
  std::size_t capacity = rounded(bytes);
  std::byte* buffer = nullptr;
  {
    std::lock_guard lock(mutex_);
    // Up to twice the size: a large buffer is not spent on a small request.
    if (const auto fit = idle_.lower_bound(capacity); fit != idle_.end() && fit->first <= 2 * capacity) {
      capacity = fit->first;
      buffer = fit->second;
      idle_bytes_ -= capacity;
      idle_.erase(fit);
    }
  }
  if (buffer == nullptr) {
    const bool huge = capacity % kHugePageBytes == 0;
    buffer = static_cast<std::byte*>(std::aligned_alloc(huge ? kHugePageBytes : kPageBytes, capacity));
    if (buffer == nullptr) return nullptr;
    if (huge) ::madvise(buffer, capacity, MADV_HUGEPAGE);
  }
  return {buffer, [pool = shared_from_this(), capacity](std::byte* used) { pool->give_back(used, capacity); }};
}

void BufferPool::give_back(std::byte* buffer, std::size_t bytes) {
  {
    std::lock_guard lock(mutex_);
    if (idle_bytes_ + bytes <= max_idle_bytes_) {
      idle_.emplace(bytes, buffer);
      idle_bytes_ += bytes;
      return;
    }
  }
  std::free(buffer);
}

}  // namespace kvern
