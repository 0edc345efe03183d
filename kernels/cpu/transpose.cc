#include "kernels/transpose.h"

#include <cstdint>
#include <cstring>

#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/transpose.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvern {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

struct View {
  std::uint8_t* destination;
  std::size_t destination_stride;
  const std::uint8_t* source;
  std::size_t source_stride;
};

// Rows [row, row_end) x columns [column, column_end), element by element.
template <typename T>
void transpose_elements(const View& view, std::size_t row, std::size_t row_end, std::size_t column,
                        std::size_t column_end) {
  for (std::size_t c = column; c < column_end; ++c) {
    for (std::size_t r = row; r < row_end; ++r) {
      std::memcpy(view.destination + c * view.destination_stride + r * sizeof(T),
                  view.source + r * view.source_stride + c * sizeof(T), sizeof(T));
    }
  }
}

#if HWY_TARGET == HWY_SCALAR

template <typename T>
void transpose_tiles(const View& view, std::size_t rows, std::size_t columns) {
  transpose_elements<T>(view, 0, rows, 0, columns);
}

#else

// One step of a transposition inside each 128-bit block: of the bits (row, column) that number an element it moves the
// highest to the lowest place, so that as many steps as a row number has bits swap row and column.
template <class D, class V, std::size_t kRows>
HWY_INLINE void interleave(D d, V (&rows)[kRows]) {
  V out[kRows];
  for (std::size_t i = 0; i < kRows / 2; ++i) {
    out[2 * i] = hn::InterleaveLower(d, rows[i], rows[i + kRows / 2]);
    out[2 * i + 1] = hn::InterleaveUpper(d, rows[i], rows[i + kRows / 2]);
  }
  for (std::size_t i = 0; i < kRows; ++i) rows[i] = out[i];
}

// Stores the 128-bit blocks of v to rows that lie stride apart.
template <class D>
HWY_INLINE void store_blocks(D d, hn::VFromD<D> v, std::uint8_t* to, std::size_t stride) {
  constexpr std::size_t kBytes = hn::MaxLanes(D());
  if constexpr (kBytes <= 16) {
    hn::StoreU(v, d, to);
  } else {
    const hn::Half<D> half;
    store_blocks(half, hn::LowerHalf(half, v), to, stride);
    store_blocks(half, hn::UpperHalf(half, v), to + kBytes / 32 * stride, stride);
  }
}

// 16 / sizeof(T) rows times one vector of columns. Afterwards block b of rows[k] is column b * kRows + k.
template <typename T, class D>
HWY_INLINE void transpose_tile(D d, const View& view, std::size_t row, std::size_t column) {
  constexpr std::size_t kRows = 16 / sizeof(T);
  const hn::Repartition<std::uint8_t, D> d8;
  using V = hn::VFromD<D>;
  V rows[kRows];
  for (std::size_t i = 0; i < kRows; ++i) {
    rows[i] = hn::BitCast(d, hn::LoadU(d8, view.source + (row + i) * view.source_stride + column * sizeof(T)));
  }
  for (std::size_t step = kRows; step > 1; step /= 2) interleave(d, rows);
  for (std::size_t k = 0; k < kRows; ++k) {
    store_blocks(d8, hn::BitCast(d8, rows[k]),
                 view.destination + (column + k) * view.destination_stride + row * sizeof(T),
                 kRows * view.destination_stride);
  }
}

template <typename T>
void transpose_tiles(const View& view, std::size_t rows, std::size_t columns) {
  constexpr std::size_t kRows = 16 / sizeof(T);
  const hn::CappedTag<T, 64 / sizeof(T)> wide;
  const hn::CappedTag<T, kRows> narrow;
  constexpr std::size_t kWide = hn::MaxLanes(wide);
  const std::size_t whole_rows = rows - rows % kRows;
  std::size_t column = 0;
  for (; column + kWide <= columns; column += kWide) {
    for (std::size_t row = 0; row < whole_rows; row += kRows) transpose_tile<T>(wide, view, row, column);
  }
  for (; column + kRows <= columns; column += kRows) {
    for (std::size_t row = 0; row < whole_rows; row += kRows) transpose_tile<T>(narrow, view, row, column);
  }
  transpose_elements<T>(view, 0, whole_rows, column, columns);
  transpose_elements<T>(view, whole_rows, rows, 0, columns);
}

#endif

void transpose2(std::uint8_t* destination, std::size_t destination_stride, const std::uint8_t* source,
                std::size_t source_stride, std::size_t rows, std::size_t columns) {
  transpose_tiles<std::uint16_t>({destination, destination_stride, source, source_stride}, rows, columns);
}
void transpose4(std::uint8_t* destination, std::size_t destination_stride, const std::uint8_t* source,
                std::size_t source_stride, std::size_t rows, std::size_t columns) {
  transpose_tiles<std::uint32_t>({destination, destination_stride, source, source_stride}, rows, columns);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvern {

HWY_EXPORT(transpose2);
HWY_EXPORT(transpose4);

void transpose(void* destination, std::size_t destination_stride_bytes, const void* source,
               std::size_t source_stride_bytes, std::size_t rows, std::size_t columns, std::size_t element_bytes) {
  auto* to = static_cast<std::uint8_t*>(destination);
  const auto* from = static_cast<const std::uint8_t*>(source);
  if (element_bytes == 2) {
    HWY_DYNAMIC_DISPATCH(transpose2)(to, destination_stride_bytes, from, source_stride_bytes, rows, columns);
    return;
  }
  if (element_bytes == 4) {
    HWY_DYNAMIC_DISPATCH(transpose4)(to, destination_stride_bytes, from, source_stride_bytes, rows, columns);
    return;
  }
  for (std::size_t column = 0; column < columns; ++column) {
    for (std::size_t row = 0; row < rows; ++row) {
      std::memcpy(to + column * destination_stride_bytes + row * element_bytes,
                  from + row * source_stride_bytes + column * element_bytes, element_bytes);
    }
  }
}

}  // namespace kvern
#endif
