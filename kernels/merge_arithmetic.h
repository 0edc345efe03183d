#pragma once

#include <cmath>
#include <cstddef>

#include "kernels/element.h"

/// The arithmetic of merging two layers, shared by CPU and GPU: every step is one correctly rounded IEEE operation, so
/// that both give the same bits. Ops names the operations on one float, or on a vector of them.
namespace kvern::merge {

/// Squared lengths below it count as zero: partial sums of larger ones hardly feel whether denormals are flushed.
constexpr float kMinSquaredLength = 0x1p-90F;
constexpr float kMaxSquaredLength = 0x1.fffffep127F;
constexpr float kPi = 3.14159265358979323846F;

struct ScalarOps {
  using Value = float;
  KVERN_HOST_DEVICE static float set(float value) { return value; }
  KVERN_HOST_DEVICE static float add(float a, float b) { return a + b; }
  KVERN_HOST_DEVICE static float sub(float a, float b) { return a - b; }
  KVERN_HOST_DEVICE static float mul(float a, float b) { return a * b; }
  KVERN_HOST_DEVICE static float div(float a, float b) { return a / b; }
  KVERN_HOST_DEVICE static float sqrt(float a) { return ::sqrtf(a); }
  /// a <= b ? yes : no
  KVERN_HOST_DEVICE static float select_le(float a, float b, float yes, float no) { return a <= b ? yes : no; }
};

KVERN_HOST_DEVICE inline bool usable(float squared_length) {
  return squared_length >= kMinSquaredLength && squared_length <= kMaxSquaredLength;
}

#include "kernels/merge_arithmetic-inl.h"

}  // namespace kvern::merge
