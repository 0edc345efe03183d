#include "connector/page_rows.h"

#include <cstdint>
#include <cstring>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "connector/page_rows.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on
#include <hwy/cache_control.h>

HWY_BEFORE_NAMESPACE();
namespace kvern {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr std::size_t kColumns = 16;
constexpr std::size_t kPackedBytes = 64;

#if HWY_TARGET == HWY_SCALAR

void gather_lines(std::uint8_t* rows, std::size_t row_bytes, const std::uint8_t* source, std::size_t stride,
                  std::size_t count) {
  for (std::size_t row = 0; row < count; ++row) {
    std::memcpy(rows + row * row_bytes, source + row * stride, row_bytes);
  }
}

void interleave(std::uint8_t* packed, const std::uint8_t* rows, std::size_t row_stride, std::size_t pairs) {
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    for (std::size_t i = 0; i < 2 * kColumns; ++i) {
      std::memcpy(packed + pair * kPackedBytes + 2 * i, rows + (2 * pair + i % 2) * row_stride + i / 2 * 2, 2);
    }
  }
}

void deinterleave(std::uint8_t* rows, std::size_t row_stride, const std::uint8_t* packed, std::size_t pairs) {
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    for (std::size_t i = 0; i < 2 * kColumns; ++i) {
      std::memcpy(rows + (2 * pair + i % 2) * row_stride + i / 2 * 2, packed + pair * kPackedBytes + 2 * i, 2);
    }
  }
}

void stream_lines(std::uint8_t* destination, std::size_t stride, const std::uint8_t* rows, std::size_t row_bytes,
                  std::size_t count) {
  for (std::size_t row = 0; row < count; ++row) {
    std::memcpy(destination + row * stride, rows + row * row_bytes, row_bytes);
  }
}

#else

void stream_lines(std::uint8_t* destination, std::size_t stride, const std::uint8_t* rows, std::size_t row_bytes,
                  std::size_t count) {
  const hn::CappedTag<std::uint8_t, 64> d;
  constexpr std::size_t kLanes = hn::MaxLanes(d);
  for (std::size_t row = 0; row < count; ++row) {
    for (std::size_t at = 0; at < row_bytes; at += kLanes) {
      hn::Stream(hn::LoadU(d, rows + row * row_bytes + at), d, destination + row * stride + at);
    }
  }
}

void gather_lines(std::uint8_t* rows, std::size_t row_bytes, const std::uint8_t* source, std::size_t stride,
                  std::size_t count) {
  const hn::CappedTag<std::uint8_t, 64> d;
  constexpr std::size_t kLanes = hn::MaxLanes(d);
  for (std::size_t row = 0; row < count; ++row) {
    for (std::size_t at = 0; at < row_bytes; at += kLanes) {
      hn::StoreU(hn::LoadU(d, source + row * stride + at), d, rows + row * row_bytes + at);
    }
  }
}

void interleave(std::uint8_t* packed, const std::uint8_t* rows, std::size_t row_stride, std::size_t pairs) {
  const hn::CappedTag<std::uint16_t, kColumns> d;
  const hn::Repartition<std::uint8_t, decltype(d)> d8;
  constexpr std::size_t kLanes = hn::MaxLanes(d);
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    const std::uint8_t* even = rows + 2 * pair * row_stride;
    const std::uint8_t* odd = even + row_stride;
    for (std::size_t i = 0; i < kColumns; i += kLanes) {
      hn::StoreInterleaved2(hn::BitCast(d, hn::LoadU(d8, even + 2 * i)), hn::BitCast(d, hn::LoadU(d8, odd + 2 * i)), d,
                            reinterpret_cast<std::uint16_t*>(packed + pair * kPackedBytes) + 2 * i);
    }
  }
}

void deinterleave(std::uint8_t* rows, std::size_t row_stride, const std::uint8_t* packed, std::size_t pairs) {
  const hn::CappedTag<std::uint16_t, kColumns> d;
  const hn::Repartition<std::uint8_t, decltype(d)> d8;
  constexpr std::size_t kLanes = hn::MaxLanes(d);
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    const auto* unit = reinterpret_cast<const std::uint16_t*>(packed + pair * kPackedBytes);
    std::uint8_t* even = rows + 2 * pair * row_stride;
    std::uint8_t* odd = even + row_stride;
    for (std::size_t i = 0; i < kColumns; i += kLanes) {
      hn::VFromD<decltype(d)> first;
      hn::VFromD<decltype(d)> second;
      hn::LoadInterleaved2(d, unit + 2 * i, first, second);
      hn::StoreU(hn::BitCast(d8, first), d8, even + 2 * i);
      hn::StoreU(hn::BitCast(d8, second), d8, odd + 2 * i);
    }
  }
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace kvern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern {

HWY_EXPORT(interleave);
HWY_EXPORT(deinterleave);
HWY_EXPORT(stream_lines);
HWY_EXPORT(gather_lines);

namespace {
constexpr std::size_t kLineBytes = 64;
}

void interleave_pairs(void* packed, const void* rows, std::size_t row_stride_bytes, std::size_t pairs) {
  HWY_DYNAMIC_DISPATCH(interleave)
  (static_cast<std::uint8_t*>(packed), static_cast<const std::uint8_t*>(rows), row_stride_bytes, pairs);
}

void deinterleave_pairs(void* rows, std::size_t row_stride_bytes, const void* packed, std::size_t pairs) {
  HWY_DYNAMIC_DISPATCH(deinterleave)
  (static_cast<std::uint8_t*>(rows), row_stride_bytes, static_cast<const std::uint8_t*>(packed), pairs);
}

void stream_rows(void* destination, std::size_t destination_stride_bytes, const void* rows, std::size_t row_bytes,
                 std::size_t count) {
  auto* to = static_cast<std::uint8_t*>(destination);
  const auto* from = static_cast<const std::uint8_t*>(rows);
  const auto offsets = reinterpret_cast<std::uintptr_t>(destination) | destination_stride_bytes | row_bytes;
  if (offsets % kLineBytes == 0) {
    HWY_DYNAMIC_DISPATCH(stream_lines)(to, destination_stride_bytes, from, row_bytes, count);
    return;
  }
  for (std::size_t row = 0; row < count; ++row) {
    std::memcpy(to + row * destination_stride_bytes, from + row * row_bytes, row_bytes);
  }
}

void gather_rows(void* rows, std::size_t row_bytes, const void* source, std::size_t source_stride_bytes,
                 std::size_t count) {
  auto* to = static_cast<std::uint8_t*>(rows);
  const auto* from = static_cast<const std::uint8_t*>(source);
  if (row_bytes % kLineBytes == 0) {
    HWY_DYNAMIC_DISPATCH(gather_lines)(to, row_bytes, from, source_stride_bytes, count);
    return;
  }
  for (std::size_t row = 0; row < count; ++row) {
    std::memcpy(to + row * row_bytes, from + row * source_stride_bytes, row_bytes);
  }
}

}  // namespace kvern
#endif
