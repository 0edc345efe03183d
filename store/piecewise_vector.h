#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

namespace kvern {

/// A vector that grows by pieces: no element is ever moved, and no room is held for twice as many. (The pieces of
/// libstdc++'s std::deque have 512 bytes, so that records of 80 bytes leave a tenth of them empty.)
template <typename T>
class PiecewiseVector {
 public:
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) { return pieces_[i / kPiece][i % kPiece]; }
  const T& operator[](std::size_t i) const { return pieces_[i / kPiece][i % kPiece]; }

  /// At least so many elements; new ones are value-initialised.
  void grow(std::size_t size) {
    while (pieces_.size() * kPiece < size) pieces_.push_back(std::make_unique<T[]>(kPiece));
    if (size > size_) size_ = size;
  }
  void push_back(T element) {
    grow(size_ + 1);
    (*this)[size_ - 1] = std::move(element);
  }

 private:
  static constexpr std::size_t kPiece = 64;

  std::vector<std::unique_ptr<T[]>> pieces_;
  std::size_t size_ = 0;
};

}  // namespace kvern
