#pragma once

#include <algorithm>
#include <vector>

#include "kernels/kivi.h"
#include "tests/golden_vectors/tensor.h"

namespace kvern::golden {

/// A tensor [heads][tokens][dim], quantised as published, along tokens or channels.
struct Quantised {
  Quantised(const Tensor& tensor, std::uint32_t bits, std::size_t group, bool along_tokens) {
    const std::vector<float> values = tensor.floats();
    const std::size_t dim = tensor.columns();
    const std::size_t tokens = tensor.shape.at(tensor.shape.size() - 2);
    const std::size_t length = along_tokens ? tokens : dim;
    const std::size_t groups = (length + group - 1) / group;
    codes.resize(values.size());
    dequantised.resize(values.size());
    scales.resize(values.size() / length * groups);
    lows.resize(scales.size());
    const std::size_t stride = along_tokens ? dim : 1;
    for (std::size_t plane = 0; plane < values.size(); plane += tokens * dim) {
      for (std::size_t line = 0; line < tokens * dim / length; ++line) {
        for (std::size_t g = 0; g < groups; ++g) {
          const std::size_t count = std::min(group, length - g * group);
          const std::size_t first = plane + g * group * stride + (along_tokens ? line : line * dim);
          const kivi::Group made = kivi::quantise(&values[first], &codes[first], count, stride, bits);
          // [head][group][channel] or [head][token][group].
          const std::size_t at = plane / length * groups + (along_tokens ? g * dim + line : line * groups + g);
          scales[at] = made.scale;
          lows[at] = made.low;
          for (std::size_t i = 0; i < count; ++i) {
            dequantised[first + i * stride] = made.decode(codes[first + i * stride]);
          }
        }
      }
    }
  }
  std::vector<std::uint8_t> codes;
  std::vector<float> dequantised, scales, lows;
};

}  // namespace kvern::golden
