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

/// The slab and the map of its containers (ContainerMap): two named files in tmpfs. To reserve the space of a large
/// slab takes seconds, so that it is done piece by piece on a thread of its own while the daemon serves already; what
/// is not reserved yet must not be written, since a full tmpfs would end the daemon by SIGBUS.
class SlabFile {
 public:
  /// keep: files of that name from an earlier run are opened and stay when this object goes, so that a warm restart
  /// finds them; otherwise old ones are replaced, and ours removed at the end. A file that is larger than asked for, or
  /// somebody else's, is replaced. Throws std::runtime_error with a sentence when there is not enough room now.
  SlabFile(const std::string& path, std::uint64_t bytes, bool keep);
  ~SlabFile();

  /// The files are not worth keeping: removed at the end.
  void discard() { keep_ = false; }

  std::span<std::byte> bytes() const { return memory_.bytes(); }
  std::span<std::byte> map_bytes() const { return map_.bytes(); }
  Result<UniqueFd> read_only_fd() const { return memory_.read_only_fd(); }
  /// [0, usable_bytes()) can be written. Grows to the whole, unless somebody else fills tmpfs meanwhile: then it
  /// stays smaller.
  std::uint64_t usable_bytes() const { return usable_bytes_.load(std::memory_order_acquire); }
  bool stays_smaller() const { return stays_smaller_.load(std::memory_order_acquire); }
  /// Of those, what is in huge pages.
  std::uint64_t huge_page_bytes() const { return huge_page_bytes_.load(std::memory_order_relaxed); }

 private:
  Status reserve_piece();
  void reserve_rest();
  void remove_files() const;

  const std::string path_;
  bool keep_;
  SharedMemory memory_;
  SharedMemory map_;
  std::atomic<std::uint64_t> usable_bytes_{0};
  std::atomic<std::uint64_t> huge_page_bytes_{0};
  std::atomic<bool> stays_smaller_{false};
  std::atomic<bool> stopping_{false};
  std::thread reserver_;
};

}  // namespace kvern
