#include "kernels/transpose.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "tests/kernels/targets.h"

namespace kvern {
namespace {

void expect_transposed(std::size_t rows, std::size_t columns, std::size_t element, std::size_t padding,
                       const char* target) {
  const std::size_t source_stride = columns * element + padding;
  const std::size_t destination_stride = rows * element + padding;
  std::mt19937 generator(static_cast<std::uint32_t>(rows * 1000 + columns));
  std::vector<std::uint8_t> source(rows * source_stride + 1);
  for (auto& byte : source) byte = static_cast<std::uint8_t>(generator());
  std::vector<std::uint8_t> destination(columns * destination_stride + 64, 0xee);
  std::vector<std::uint8_t> expected = destination;
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < columns; ++c) {
      std::memcpy(&expected[c * destination_stride + r * element], &source[r * source_stride + c * element], element);
    }
  }
  transpose(destination.data(), destination_stride, source.data(), source_stride, rows, columns, element);
  EXPECT_EQ(destination, expected) << rows << " x " << columns << " elements of " << element << " bytes, padding "
                                   << padding << ", " << target;
}

TEST(Transpose, SwapsRowsAndColumnsAndTouchesNothingElse) {
  for_each_target([](const char* target) {
    for (const std::size_t element : {1U, 2U, 4U, 8U}) {
      for (const std::size_t rows : {0U, 1U, 7U, 8U, 16U, 31U, 32U, 64U, 80U, 128U}) {
        for (const std::size_t columns : {0U, 1U, 5U, 8U, 24U, 33U, 64U, 96U, 112U}) {
          for (const std::size_t padding : {0U, 6U, 64U}) expect_transposed(rows, columns, element, padding, target);
        }
      }
    }
  });
}

}  // namespace
}  // namespace kvern
