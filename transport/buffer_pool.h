#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

namespace kvern {

/// Page-aligned buffers that are kept for the next taker: mapping and faulting new pages costs as much as filling them.
/// Thread-safe. A buffer may outlive all other users of the pool.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  /// max_idle_bytes: what is kept while nobody uses it.
  static std::shared_ptr<BufferPool> create(std::size_t max_idle_bytes);
  ~BufferPool();

  /// Null when memory is short. The bytes are those of the former user.
  std::shared_ptr<std::byte[]> take(std::size_t bytes);

 private:
  explicit BufferPool(std::size_t max_idle_bytes) : max_idle_bytes_(max_idle_bytes) {}
  void give_back(std::byte* buffer, std::size_t bytes);

  const std::size_t max_idle_bytes_;
  std::mutex mutex_;
  std::multimap<std::size_t, std::byte*> idle_;
  std::size_t idle_bytes_ = 0;
};

}  // namespace kvern
