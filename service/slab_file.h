#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <thread>

#include "base/status.h"
#include "transport/shared_memory.h"

namespace kvern {

/// The slab: a named file in tmpfs. To reserve the space of a large one takes seconds, so that it is done piece by
/// piece on a thread of its own while the daemon serves already; what is not reserved yet must not be written, since a
/// full tmpfs would end the daemon by SIGBUS.
class SlabFile {
 public:
  /// An old file of that name is replaced. Throws std::runtime_error with a sentence when there is not enough room now.
  SlabFile(const std::string& path, std::uint64_t bytes);
  ~SlabFile();

  std::span<std::byte> bytes() const { return memory_.bytes(); }
  Result<UniqueFd> read_only_fd() const { return memory_.read_only_fd(); }
  /// [0, usable_bytes()) can be written. Grows to the whole, unless somebody else fills tmpfs meanwhile.
  std::uint64_t usable_bytes() const { return usable_bytes_.load(std::memory_order_acquire); }

 private:
  Status reserve_piece();
  void reserve_rest();

  const std::string path_;
  SharedMemory memory_;
  std::atomic<std::uint64_t> usable_bytes_{0};
  std::atomic<bool> stopping_{false};
  std::thread reserver_;
};

}  // namespace kvern
