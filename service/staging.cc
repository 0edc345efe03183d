#include "service/staging.h"

#include <utility>

namespace kvern {

Staging::Block& Staging::Block::operator=(Block&& other) noexcept {
  if (this != &other) {
    release();
    staging_ = std::move(other.staging_);
    extent_ = other.extent_;
  }
  return *this;
}

void Staging::Block::release() {
  // Held to the end of this function: the mutex must outlive its lock.
  const auto staging = std::exchange(staging_, nullptr);
  if (!staging) return;
  std::lock_guard lock(staging->mutex_);
  staging->slab_.release(extent_);
}

std::span<std::byte> Staging::Block::bytes() const {
  return staging_->memory_.bytes().subspan(extent_.offset, extent_.bytes);
}

Result<std::shared_ptr<Staging>> Staging::create(const std::string& name, std::size_t bytes) {
  auto memory = SharedMemory::create_anonymous(name, bytes);
  if (!memory) return failure(memory.error());
  return std::shared_ptr<Staging>(new Staging(std::move(*memory)));
}

std::optional<Staging::Block> Staging::allocate(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  const auto extent = slab_.allocate(bytes);
  if (!extent) return std::nullopt;
  return Block(shared_from_this(), *extent);
}

std::uint64_t Staging::used_bytes() const {
  std::lock_guard lock(mutex_);
  return slab_.used_bytes();
}

}  // namespace kvern
