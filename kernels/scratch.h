#pragma once

#include <cstddef>
#include <new>
#include <span>

namespace kvern {

/// Memory for the planes of one section, aligned for vectors; not initialised.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes)
      : bytes_(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kAlignment}))), size_(bytes) {}
  ~Scratch() { ::operator delete (bytes_, std::align_val_t{kAlignment}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::byte* data() const { return bytes_; }
  std::span<std::byte> first(std::size_t bytes) const { return std::span(bytes_, size_).first(bytes); }

 private:
  static constexpr std::size_t kAlignment = 64;

  std::byte* bytes_;
  std::size_t size_;
};

}  // namespace kvern
