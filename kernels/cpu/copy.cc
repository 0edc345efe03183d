#include "kernels/copy.h"

#include <algorithm>
#include <cstring>

#include "kernels/checksum.h"
#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/copy.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on
#include <hwy/cache_control.h>

HWY_BEFORE_NAMESPACE();
namespace kvern {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// destination is aligned to 64 bytes, lines counts 64-byte lines.
void stream_lines(std::uint8_t* destination, const std::uint8_t* source, std::size_t lines) {
#if HWY_TARGET == HWY_SCALAR
  std::memcpy(destination, source, lines * 64);
#else
  const hn::CappedTag<std::uint8_t, 64> d;
  constexpr std::size_t kLanes = hn::MaxLanes(d);
  constexpr std::size_t kVectors = 64 / kLanes;
  const auto line = [&](std::size_t index) HWY_ATTR {
    for (std::size_t i = 0; i < kVectors; ++i) {
      hn::Stream(hn::LoadU(d, source + index * 64 + i * kLanes), d, destination + index * 64 + i * kLanes);
    }
  };
  std::size_t index = 0;
  for (; index + 4 <= lines; index += 4) {
    line(index);
    line(index + 1);
    line(index + 2);
    line(index + 3);
  }
  for (; index < lines; ++index) line(index);
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern {

HWY_EXPORT(stream_lines);

namespace {
/// Below this the partial lines at both ends outweigh what is gained in between.
constexpr std::size_t kStreamMinBytes = 512;
constexpr std::size_t kLineBytes = 64;
}  // namespace

void stream_copy_unfenced(void* destination, const void* source, std::size_t bytes) {
  auto* to = static_cast<std::uint8_t*>(destination);
  const auto* from = static_cast<const std::uint8_t*>(source);
  if (bytes < kStreamMinBytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return;
  }
  const std::size_t head = (kLineBytes - reinterpret_cast<std::uintptr_t>(to) % kLineBytes) % kLineBytes;
  const std::size_t lines = (bytes - head) / kLineBytes;
  const std::size_t tail = bytes - head - lines * kLineBytes;
  std::memcpy(to, from, head);
  HWY_DYNAMIC_DISPATCH(stream_lines)(to + head, from + head, lines);
  std::memcpy(to + bytes - tail, from + bytes - tail, tail);
}

void stream_fence() { hwy::FlushStream(); }

void stream_copy(void* destination, const void* source, std::size_t bytes) {
  stream_copy_unfenced(destination, source, bytes);
  stream_fence();
}

std::uint64_t stream_copy_checksum(void* destination, const void* source, std::size_t bytes) {
  Checksum64 checksum;
  checksum.stream_copy(destination, source, bytes);
  return checksum.digest();
}

}  // namespace kvern
#endif
