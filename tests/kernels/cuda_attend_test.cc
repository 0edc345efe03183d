#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "kernels/cuda/attend.h"
#include "tests/kernels/attend_samples.h"
#include "tests/kernels/device_memory.h"

namespace kvern {
namespace {

/// Copies on the device of everything that a problem points to.
class DeviceProblem {
 public:
  DeviceProblem(const AttendProblem& host, const Cache& cache) {
    problem = host;
    const auto& queries = host.queries;
    problem.queries.data = copy(queries.data, queries.head_stride_bytes * queries.heads);
    if (host.query_positions != nullptr) problem.query_positions = copy(host.query_positions, queries.tokens);
    const std::byte* keys = copy(cache.keys->bytes.data(), cache.keys->bytes.size());
    const std::byte* values = copy(cache.values->bytes.data(), cache.values->bytes.size());
    for (const auto& segments : host.heads) {
      auto& of_head = segments_.emplace_back(segments.begin(), segments.end());
      for (AttendSegment& segment : of_head) {
        segment.keys.data = keys + (segment.keys.data - cache.keys->bytes.data());
        segment.values.data = values + (segment.values.data - cache.values->bytes.data());
        for (AttendRows* rows : {&segment.keys, &segment.values}) {
          if (rows->index != nullptr) rows->index = copy(rows->index, segment.entries);
          if (rows->lengths != nullptr) rows->lengths = copy(rows->lengths, segment.entries);
        }
        if (segment.bias != nullptr) segment.bias = copy(segment.bias, segment.entries);
        if (segment.positions != nullptr) segment.positions = copy(segment.positions, segment.entries);
      }
    }
    heads_.assign(segments_.begin(), segments_.end());
    problem.heads = heads_;
  }
  ~DeviceProblem() {
    for (void* memory : memory_) cudaFree(memory);
  }
  DeviceProblem(const DeviceProblem&) = delete;
  DeviceProblem& operator=(const DeviceProblem&) = delete;

  template <typename T>
  T* allocate(std::size_t count) {
    void* memory = nullptr;
    if (cudaMalloc(&memory, std::max<std::size_t>(count, 1) * sizeof(T)) != cudaSuccess) {
      throw std::runtime_error("no device memory");
    }
    memory_.push_back(memory);
    return static_cast<T*>(memory);
  }

  AttendProblem problem;

 private:
  template <typename T>
  const T* copy(const T* from, std::size_t count) {
    T* memory = allocate<T>(count);
    if (cudaMemcpy(memory, from, count * sizeof(T), cudaMemcpyHostToDevice) != cudaSuccess) {
      throw std::runtime_error("copy");
    }
    return memory;
  }

  std::vector<void*> memory_;
  std::vector<std::vector<AttendSegment>> segments_;
  std::vector<std::span<const AttendSegment>> heads_;
};

using CudaAttend = CudaTest;

TEST_F(CudaAttend, AgreesWithTheCpu) {
  const std::vector<std::int32_t> positions = {10, 63, 30};
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::uint32_t dim : {64U, 80U, 96U, 112U, 128U, 192U, 256U, 35U}) {
      for (const std::uint32_t group : {1U, 3U, 4U, 7U}) {
        const Matrix queries(dtype, 2 * group, 3, dim, dim + group);
        const Cache cache(dtype, 2, dim, dim == 192 ? 128 : dim, {70, 0, 1, 33, 2500}, dim);
        const AttendProblem host{queries.rows(), cache.values->dim, 0, positions.data(), cache.heads};
        const std::size_t rows = std::size_t{queries.heads} * queries.tokens;
        std::vector<float> workspace(attend_workspace_floats(host)), output(rows * host.value_dim), lse(rows);
        ASSERT_TRUE(attend(host, workspace, output, lse, nullptr));

        DeviceProblem device(host, cache);
        const std::size_t floats = cuda_attend_workspace_floats(device.problem);
        float* device_output = device.allocate<float>(output.size());
        float* device_lse = device.allocate<float>(lse.size());
        const Status status =
            cuda_attend(device.problem, device.allocate<float>(floats), floats, device_output, device_lse, nullptr);
        ASSERT_TRUE(status) << status.to_string();
        std::vector<float> got(output.size()), got_lse(lse.size());
        ASSERT_EQ(cudaMemcpy(got.data(), device_output, got.size() * 4, cudaMemcpyDeviceToHost), cudaSuccess);
        ASSERT_EQ(cudaMemcpy(got_lse.data(), device_lse, got_lse.size() * 4, cudaMemcpyDeviceToHost), cudaSuccess);
        for (std::size_t i = 0; i < output.size(); ++i) {
          ASSERT_NEAR(got[i], output[i], 2e-5) << dtype_name(dtype) << " dim " << dim << " group " << group;
        }
        for (std::size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(got_lse[i], lse[i], 2e-5);
      }
    }
  }
}

TEST(CudaAttendArguments, AreCheckedBeforeTheLaunch) {
  class Reader final : public RowReader {
    Status read(TokenRange, std::byte*) const override { return Status::ok(); }
  };
  const Reader reader;
  const Matrix queries(DType::kFloat32, 2, 1, 64, 1);
  const AttendSegment segment{4, AttendRows::of(reader, DType::kFloat32), AttendRows::of(reader, DType::kFloat32)};
  const std::span<const AttendSegment> head(&segment, 1);
  AttendProblem problem{queries.rows(), 64, 0, nullptr, {&head, 1}};
  const std::size_t floats = cuda_attend_workspace_floats(problem);
  EXPECT_EQ(cuda_attend(problem, nullptr, floats, nullptr, nullptr, nullptr).code(), Code::kRefused);
  EXPECT_EQ(cuda_attend(problem, nullptr, floats - 1, nullptr, nullptr, nullptr).code(), Code::kInvalid);
  problem.value_dim = 0;
  EXPECT_EQ(cuda_attend(problem, nullptr, floats, nullptr, nullptr, nullptr).code(), Code::kInvalid);
}

}  // namespace
}  // namespace kvern
