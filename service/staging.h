#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>

#include "base/status.h"
#include "store/slab.h"
#include "transport/shared_memory.h"

namespace kvern {

/// The staging memory of one session: the only memory that it may write. It is never handed to another session, so that
/// a stopped writer that wakes up can hurt nobody; it is unmapped when the session and the last of its blocks are gone.
/// Thread-safe.
class Staging : public std::enable_shared_from_this<Staging> {
 public:
  /// A piece of staging, given back on destruction. Move-only; keeps the memory mapped.
  class Block {
   public:
    Block() = default;
    Block(Block&& other) noexcept = default;
    Block& operator=(Block&& other) noexcept;
    ~Block() { release(); }
    const Extent& extent() const { return extent_; }
    std::span<std::byte> bytes() const;

   private:
    friend class Staging;
    Block(std::shared_ptr<Staging> staging, Extent extent) : staging_(std::move(staging)), extent_(extent) {}
    void release();
    std::shared_ptr<Staging> staging_;
    Extent extent_;
  };

  static Result<std::shared_ptr<Staging>> create(const std::string& name, std::size_t bytes);

  std::optional<Block> allocate(std::size_t bytes);
  std::uint64_t capacity_bytes() const { return memory_.bytes().size(); }
  std::uint64_t used_bytes() const;
  int fd() const { return memory_.fd(); }

 private:
  explicit Staging(SharedMemory memory) : memory_(std::move(memory)), slab_(memory_.bytes().size()) {}

  SharedMemory memory_;
  mutable std::mutex mutex_;
  Slab slab_;
};

}  // namespace kvern
