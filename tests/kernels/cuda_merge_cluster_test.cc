#include <gtest/gtest.h>

#include <stdexcept>

#include "kernels/cuda/cluster.h"
#include "kernels/cuda/merge.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/samples.h"

namespace kvern {
namespace {

constexpr DType kDtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

using CudaMergeCluster = CudaTest;

TEST_F(CudaMergeCluster, MergesAndRestoresTheBitsOfTheCpu) {
  constexpr std::uint32_t kHeads = 3;
  for (const DType dtype : kDtypes) {
    for (const std::uint32_t dim : {2U, 64U, 80U, 96U, 112U, 128U, 192U, 256U}) {
      for (const std::uint32_t tokens : {1U, 16U, 77U}) {
        const ShardShape shape = sample_shape(dtype, tokens, dim, 0, 1, kHeads);
        Bytes x = sample_canonical(shape, dim);
        const Bytes y = sample_canonical(shape, dim + 1);
        std::fill_n(x.begin(), dim * dtype_bytes(dtype), std::byte{0});  // a vector without a direction
        const std::size_t rows = std::size_t{kHeads} * tokens;
        Bytes directions(x.size());
        std::vector<float> x_lengths(rows);
        std::vector<float> y_lengths(rows);
        std::vector<float> angles(rows);
        const auto view = [&](const std::byte* data) { return HeadRows::contiguous(data, dtype, kHeads, tokens, dim); };
        ASSERT_TRUE(merge::merge_layers(view(x.data()), view(y.data()), 0.6F,
                                        {directions.data(), dtype, x_lengths.data(), y_lengths.data(), angles.data()},
                                        nullptr));
        Bytes restored(x.size());
        ASSERT_TRUE(merge::restore_rows(view(directions.data()), x_lengths, restored.data(), nullptr));

        const DeviceArray<std::byte> device_x(x);
        const DeviceArray<std::byte> device_y(y);
        const DeviceArray<std::byte> device_directions(x.size());
        const DeviceArray<std::byte> device_restored(x.size());
        const DeviceArray<float> device_x_lengths(rows);
        const DeviceArray<float> device_y_lengths(rows);
        const DeviceArray<float> device_angles(rows);
        ASSERT_TRUE(merge::cuda_merge_layers(
            view(device_x.data()), view(device_y.data()), 0.6F,
            {device_directions.data(), dtype, device_x_lengths.data(), device_y_lengths.data(), device_angles.data()},
            nullptr));
        ASSERT_TRUE(merge::cuda_restore_rows(view(device_directions.data()), device_x_lengths.data(),
                                             device_restored.data(), nullptr));
        check_cuda(cudaDeviceSynchronize());
        EXPECT_EQ(device_directions.get(), directions);
        EXPECT_EQ(device_x_lengths.get(), x_lengths);
        EXPECT_EQ(device_y_lengths.get(), y_lengths);
        EXPECT_EQ(device_angles.get(), angles);
        EXPECT_EQ(device_restored.get(), restored);
      }
    }
  }
}

TEST_F(CudaMergeCluster, ClustersAsTheCpuDoes) {
  constexpr std::uint32_t kHeads = 2;
  for (const DType dtype : kDtypes) {
    for (const std::uint32_t dim : {2U, 5U, 64U, 128U, 256U}) {
      for (const std::uint32_t tokens : {1U, 70U, 300U, 333U}) {
        for (const std::vector<std::uint32_t>& merges :
             {std::vector<std::uint32_t>{32}, std::vector<std::uint32_t>{32, 20},
              std::vector<std::uint32_t>{9, 32, 1}}) {
          const ShardShape shape = sample_shape(dtype, tokens, dim, dim, 1, kHeads);
          const Bytes rows = sample_canonical(shape, tokens);
          const auto view = [&](const std::byte* data, Part part) {
            return HeadRows::contiguous(data + shape.plane_offset(0, part, 0), dtype, kHeads, tokens, dim);
          };
          cluster::Options options;
          // More targets than a warp takes at a time, and not a whole number of them.
          if (tokens == 333) options.chunk = 90;
          options.recent = 30;
          options.merges = merges;
          cluster::Clusters clusters;
          ASSERT_TRUE(cluster::compress(view(rows.data(), Part::kKey), view(rows.data(), Part::kValue), options,
                                        clusters, nullptr));

          const std::size_t count = std::size_t{kHeads} * tokens;
          const DeviceArray<std::byte> device_rows(rows);
          const DeviceArray<float> keys(count * dim);
          const DeviceArray<float> values(count * dim);
          const DeviceArray<cluster::Members> members(count);
          const DeviceArray<std::uint32_t> assignment(count);
          const DeviceArray<std::uint32_t> entries(kHeads);
          const HeadRows device_keys = view(device_rows.data(), Part::kKey);
          const HeadRows device_values = view(device_rows.data(), Part::kValue);
          const DeviceArray<std::byte> workspace(
              cluster::cuda_compress_workspace_bytes(device_keys, device_values, options));
          ASSERT_TRUE(
              cluster::cuda_compress(device_keys, device_values, options,
                                     {keys.data(), values.data(), members.data(), assignment.data(), entries.data()},
                                     workspace.data(), nullptr));
          check_cuda(cudaDeviceSynchronize());
          const auto all_keys = keys.get();
          const auto all_values = values.get();
          const auto all_members = members.get();
          const auto all_assignment = assignment.get();
          const auto all_entries = entries.get();
          for (std::uint32_t head = 0; head < kHeads; ++head) {
            const cluster::HeadClusters expected = clusters.head(head);
            const std::size_t first = std::size_t{head} * tokens;
            ASSERT_EQ(all_entries[head], expected.entries);
            EXPECT_TRUE(
                std::ranges::equal(std::span(all_keys).subspan(first * dim, expected.keys.size()), expected.keys));
            EXPECT_TRUE(std::ranges::equal(std::span(all_values).subspan(first * dim, expected.values.size()),
                                           expected.values));
            EXPECT_TRUE(std::ranges::equal(std::span(all_members).subspan(first, expected.entries), expected.members));
            EXPECT_TRUE(std::ranges::equal(std::span(all_assignment).subspan(first, tokens), expected.assignment));
          }
        }
      }
    }
  }
}

TEST_F(CudaMergeCluster, ChunksThatDoNotFitAreRefused) {
  const HeadRows rows = HeadRows::contiguous(nullptr, DType::kBFloat16, 1, 16, 256);
  cluster::Options options;
  options.chunk = 256;
  EXPECT_EQ(cluster::cuda_compress(rows, rows, options, {}, nullptr, nullptr).code(), Code::kRefused);
}

}  // namespace
}  // namespace kvern
