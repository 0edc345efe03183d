#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <list>

#include "kernels/chain.h"
#include "kernels/cuda/attend.h"
#include "tests/kernels/attend_samples.h"
#include "tests/kernels/device_problem.h"

namespace kvern {
namespace {

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

        const DeviceProblem device(host);
        const auto [got, got_lse] = device.run();
        for (std::size_t i = 0; i < output.size(); ++i) {
          ASSERT_NEAR(got[i], output[i], 2e-5) << dtype_name(dtype) << " dim " << dim << " group " << group;
        }
        for (std::size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(got_lse[i], lse[i], 2e-5);
      }
    }
  }
}

/// K or V of a head as a section, for the CPU and for the GPU.
struct Section {
  Section(const PlaneForm& form, SectionForm section_form, Part part, const Matrix& rows)
      : encoded(form.max_bytes(shape(part, rows)) + 64), section(section_form) {
    offset = (64 - reinterpret_cast<std::uintptr_t>(encoded.data()) % 64) % 64;
    const auto out = std::span(encoded).subspan(offset, form.max_bytes(shape(part, rows)));
    const auto size = form.encode(shape(part, rows), rows.bytes, out);
    if (!size) throw std::runtime_error(size.error().to_string());
    reader = std::make_unique<PlaneReader>(form, shape(part, rows), out.first(*size));
    device = std::make_unique<DeviceArray<std::byte>>(
        std::vector(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(*size)));
  }
  static PlaneShape shape(Part part, const Matrix& rows) { return {rows.dtype, part, rows.tokens, rows.dim}; }

  std::vector<std::byte> encoded;
  std::size_t offset = 0;
  SectionForm section;
  std::unique_ptr<PlaneReader> reader;
  std::unique_ptr<DeviceArray<std::byte>> device;
};

SectionForm section_form(const std::string& spec, Part part, const Matrix& rows, std::uint32_t group) {
  const bool keys = part == Part::kKey;
  if (spec.starts_with("int8")) {
    return int8::Form{rows.dtype, keys, rows.tokens, rows.dim, keys ? group : int8::Form::channel_group(rows.dim)};
  }
  return quantise::Form{
      rows.dtype,
      keys,
      rows.tokens,
      rows.dim,
      keys ? group : quantise::Form::channel_group(rows.dim, group),
      quantise::Kind::kInt4,
      spec.find("asymmetric") != std::string::npos ? quantise::Scheme::kAsymmetric : quantise::Scheme::kSymmetric};
}

/// Heads of one section and a tail of plain rows, with biases and lengths.
void expect_sections_as_on_the_cpu(const std::string& spec, std::uint32_t group, DType dtype, std::uint32_t dim,
                                   std::uint32_t tokens, double tolerance) {
  SCOPED_TRACE(spec + " " + std::string(dtype_name(dtype)) + " dim " + std::to_string(dim));
  const auto chain = parse_chain(spec);
  ASSERT_TRUE(chain) << chain.error().to_string();
  const Matrix queries(dtype, 8, 2, dim, dim);
  std::vector<float> bias(tokens), lengths(tokens);
  for (std::uint32_t i = 0; i < tokens; ++i) {
    bias[i] = std::log(1.0F + static_cast<float>(i % 5));
    lengths[i] = 0.25F + static_cast<float>(i % 7) / 4;
  }
  const DeviceArray<float> device_bias(bias), device_lengths(lengths);
  const Matrix tail(dtype, 1, 40, dim, dim + 5);
  const DeviceArray<std::byte> device_tail(std::vector<std::byte>(tail.bytes.begin(), tail.bytes.end()));
  std::vector<std::unique_ptr<Section>> sections;
  std::vector<std::vector<AttendSegment>> on_cpu, on_gpu;
  for (std::uint32_t head = 0; head < 2; ++head) {
    std::vector<AttendSegment>* of_head[2] = {&on_cpu.emplace_back(), &on_gpu.emplace_back()};
    const Matrix keys(dtype, 1, tokens, dim, head + 1), values(dtype, 1, tokens, dim, head + 3);
    for (const Matrix* rows : {&keys, &values}) {
      const Part part = rows == &keys ? Part::kKey : Part::kValue;
      sections.push_back(std::make_unique<Section>(*chain->form, section_form(spec, part, *rows, group), part, *rows));
    }
    for (const bool gpu : {false, true}) {
      AttendSegment segment;
      segment.entries = tokens;
      for (std::size_t i = 0; i < 2; ++i) {
        const Section& section = *sections[sections.size() - 2 + i];
        AttendRows rows = AttendRows::of(*section.reader, dtype);
        if (gpu) {
          rows = std::visit(
              [&](const auto& form) {
                if constexpr (requires { form.dtype; }) return AttendRows::of_section(section.device->data(), form);
                return AttendRows();
              },
              section.section);
        }
        if (head == 1) rows.lengths = gpu ? device_lengths.data() : lengths.data();
        (i == 0 ? segment.keys : segment.values) = rows;
      }
      segment.bias = gpu ? device_bias.data() : bias.data();
      const HeadRows rows = HeadRows::contiguous(gpu ? device_tail.data() : tail.bytes.data(), dtype, 1, 40, dim);
      *of_head[gpu] = {segment, {40, AttendRows::of(rows, 0), AttendRows::of(rows, 0)}};
    }
  }
  const std::vector<std::span<const AttendSegment>> cpu_heads(on_cpu.begin(), on_cpu.end());
  const std::vector<std::span<const AttendSegment>> gpu_heads(on_gpu.begin(), on_gpu.end());
  const AttendProblem host{queries.rows(), dim, 0, nullptr, cpu_heads};
  std::vector<float> workspace(attend_workspace_floats(host)), output(std::size_t{16} * dim), lse(16);
  ASSERT_TRUE(attend(host, workspace, output, lse, nullptr));

  const DeviceArray<std::byte> device_queries(std::vector<std::byte>(queries.bytes.begin(), queries.bytes.end()));
  const auto plan =
      run_plan({HeadRows::contiguous(device_queries.data(), dtype, 8, 2, dim), dim, 0, nullptr, gpu_heads});
  for (std::size_t i = 0; i < output.size(); ++i) ASSERT_NEAR(plan.first[i], output[i], tolerance);
  for (std::size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(plan.second[i], lse[i], tolerance);
}

TEST_F(CudaAttend, ReadsSectionsAsDecodedOnes) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const std::uint32_t dim : {64U, 128U, 192U, 256U}) {
      expect_sections_as_on_the_cpu("int4(group=64,scheme=asymmetric)", 64, dtype, dim, 2501, 2e-5);
      expect_sections_as_on_the_cpu("int4(group=32,scheme=asymmetric)", 32, dtype, dim, 77, 2e-5);
      expect_sections_as_on_the_cpu("int4(group=128,scheme=symmetric)", 128, dtype, dim, 1000, 2e-5);
      expect_sections_as_on_the_cpu("int4(group=128,scheme=asymmetric)", 128, dtype, dim, 2501, 2e-5);
      expect_sections_as_on_the_cpu("int8(group=64)", 64, dtype, dim, 2501, 2e-5);
      expect_sections_as_on_the_cpu("int8(group=256)", 256, dtype, dim, 31, 2e-5);
    }
  }
}

TEST_F(CudaAttend, IsTheSameWhateverThePieces) {
  const Matrix queries(DType::kBFloat16, 8, 1, 128, 1);
  const Cache cache(DType::kBFloat16, 2, 128, 128, {5000, 17, 300}, 2);
  const DeviceProblem device({queries.rows(), 128, 0, nullptr, cache.heads});
  const auto expected = device.run();
  for (const std::uint32_t piece : {1U, 300U, 1024U, 1000000U}) {
    const auto got = device.run(piece);
    for (std::size_t i = 0; i < got.first.size(); ++i) ASSERT_NEAR(got.first[i], expected.first[i], 1e-6) << piece;
    for (std::size_t i = 0; i < got.second.size(); ++i) ASSERT_NEAR(got.second[i], expected.second[i], 1e-5) << piece;
  }
}

/// A chain of plans, each with the output of the one before as its biases, so that a step which does not wait is found
/// out: with the device idle in between, queued, and as a graph.
TEST_F(CudaAttend, StepsThatFollowEachOtherSeeWhatWasWrittenBefore) {
  constexpr std::uint32_t kSteps = 40, kHeads = 8, kDim = 128, kEntries = kHeads * kDim;
  using Bytes = std::vector<std::byte>;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    SCOPED_TRACE(dtype_name(dtype));
    const Matrix queries(dtype, kHeads, 1, kDim, 1), keys(dtype, 2, kEntries, kDim, 2),
        values(dtype, 2, kEntries, kDim, 3);
    const DeviceArray<std::byte> device_queries(Bytes(queries.bytes.begin(), queries.bytes.end()));
    const DeviceArray<std::byte> device_keys(Bytes(keys.bytes.begin(), keys.bytes.end()));
    const DeviceArray<std::byte> device_values(Bytes(values.bytes.begin(), values.bytes.end()));
    const DeviceArray<float> outputs(std::size_t{kSteps + 1} * kEntries), lse(kHeads);
    std::list<DeviceArray<std::byte>> memory;
    std::vector<CudaAttendPlan> plans;
    for (std::uint32_t step = 0; step < kSteps; ++step) {
      AttendSegment segments[2];
      for (std::uint32_t head = 0; head < 2; ++head) {
        segments[head] = {
            kEntries,
            AttendRows::of(HeadRows::contiguous(device_keys.data(), dtype, 2, kEntries, kDim), head),
            AttendRows::of(HeadRows::contiguous(device_values.data(), dtype, 2, kEntries, kDim), head),
            outputs.data() + std::size_t{step} * kEntries,
            nullptr,
        };
      }
      const std::span<const AttendSegment> heads[2] = {{&segments[0], 1}, {&segments[1], 1}};
      auto plan = CudaAttendPlan::make({queries.rows(), kDim, 0, nullptr, heads});
      ASSERT_TRUE(plan) << plan.error().to_string();
      ASSERT_TRUE(plan->put(memory.emplace_back(plan->device_bytes()).data(), nullptr));
      plans.push_back(std::move(*plan));
    }
    cudaStream_t stream = nullptr;
    ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
    const auto steps = [&](bool wait) {
      for (std::uint32_t step = 0; step < kSteps; ++step) {
        float* output = outputs.data() + std::size_t{step + 1} * kEntries;
        if (!plans[step].attend(device_queries.data(), nullptr, output, lse.data(), stream)) return false;
        if (wait && cudaStreamSynchronize(stream) != cudaSuccess) return false;
      }
      return true;
    };
    const auto reset = [&] {
      check_cuda(cudaMemset(outputs.data(), 0, std::size_t{kSteps + 1} * kEntries * sizeof(float)));
      check_cuda(cudaDeviceSynchronize());
    };
    reset();
    ASSERT_TRUE(steps(true));
    const std::vector<float> expected = outputs.get();
    reset();
    ASSERT_TRUE(steps(false));
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(outputs.get(), expected);

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    const bool captured = steps(false);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_TRUE(captured);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    reset();
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(outputs.get(), expected);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

TEST_F(CudaAttend, AHeadWithoutEntriesGetsZeros) {
  const Matrix queries(DType::kBFloat16, 4, 2, 64, 1);
  const Cache cache(DType::kBFloat16, 2, 64, 64, {0}, 2);
  const DeviceProblem device({queries.rows(), 64, 0, nullptr, cache.heads});
  const auto [output, lse] = device.run();
  for (const float value : output) ASSERT_EQ(value, 0);
  for (const float value : lse) ASSERT_EQ(value, -std::numeric_limits<float>::infinity());
}

TEST(CudaAttendArguments, AreChecked) {
  class Reader final : public RowReader {
    Status read(TokenRange, std::byte*) const override { return Status::ok(); }
  };
  const Reader reader;
  const Matrix queries(DType::kFloat32, 2, 1, 64, 1);
  const AttendSegment segment{4, AttendRows::of(reader, DType::kFloat32), AttendRows::of(reader, DType::kFloat32)};
  const std::span<const AttendSegment> head(&segment, 1);
  AttendProblem problem{queries.rows(), 64, 0, nullptr, {&head, 1}};
  EXPECT_EQ(CudaAttendPlan::make(problem).error().code(), Code::kRefused);
  const std::vector<std::byte> bytes(4096);
  AttendSegment coded{4, {}, {}};
  const quantise::Form form{DType::kFloat32, true, 4, 64, 32};
  coded.keys = coded.values = AttendRows::of_section(bytes.data(), form);
  const std::span<const AttendSegment> coded_head(&coded, 1);
  problem.heads = {&coded_head, 1};
  EXPECT_EQ(CudaAttendPlan::make(problem).error().code(), Code::kRefused);
  std::vector<float> workspace(attend_workspace_floats(problem)), output(128), lse(2);
  EXPECT_EQ(attend(problem, workspace, output, lse, nullptr).code(), Code::kRefused);
  problem.value_dim = 0;
  EXPECT_EQ(CudaAttendPlan::make(problem).error().code(), Code::kInvalid);
}

}  // namespace
}  // namespace kvern
