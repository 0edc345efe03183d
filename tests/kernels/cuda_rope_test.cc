#include "kernels/cuda/rope.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "tests/kernels/device_memory.h"
#include "tests/kernels/samples.h"

namespace kvern::rope {
namespace {

using CudaRope = CudaTest;

TEST_F(CudaRope, MakesTheBytesOfTheCpu) {
  constexpr std::uint32_t kTokens = 37;
  constexpr std::int64_t kFirst = 100000;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const DType to : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const std::uint32_t dim : {64U, 80U, 128U, 256U}) {
        for (const Style style : {Style::kNeox, Style::kInterleaved}) {
          const ShardShape shape = sample_shape(dtype, kTokens, dim, 0, 1, 3);
          const Bytes canonical = sample_canonical(shape, dim);
          Parameters parameters;
          parameters.rotary_dim = dim / 4 * 2;
          const auto frequencies = parameters.inverse_frequencies();
          const Turns turns = Turns::from(frequencies, kFirst, kTokens);
          const auto rows = HeadRows::contiguous(canonical.data(), dtype, 3, kTokens, dim);
          Bytes expected(std::size_t{3} * kTokens * dim * dtype_bytes(to));
          ASSERT_TRUE(rotate(rows, turns, style, Direction::kBack, to, expected.data()));

          const DeviceArray<std::byte> input(canonical);
          const DeviceArray<std::byte> output(Bytes(expected.size()));
          const DeviceArray<double> on_device(frequencies);
          const DeviceArray<float> cosines(std::vector<float>(turns.cosines.size()));
          const DeviceArray<float> sines(std::vector<float>(turns.sines.size()));
          ASSERT_TRUE(cuda_turns(on_device.data(), turns.pairs, nullptr, kFirst, kTokens, cosines.data(), sines.data(),
                                 nullptr));
          ASSERT_TRUE(cuda_rotate(HeadRows::contiguous(input.data(), dtype, 3, kTokens, dim),
                                  {kTokens, turns.pairs, cosines.data(), sines.data()}, style, Direction::kBack, to,
                                  output.data(), nullptr));
          ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
          ASSERT_EQ(cosines.get(), turns.cosines);
          ASSERT_EQ(sines.get(), turns.sines);
          ASSERT_EQ(output.get(), expected) << dtype_name(dtype) << " to " << dtype_name(to) << ", " << dim;
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvern::rope
