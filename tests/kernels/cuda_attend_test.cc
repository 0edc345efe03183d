#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "kernels/chain.h"
#include "kernels/cuda/attend.h"
#include "tests/kernels/attend_samples.h"
#include "tests/kernels/device_memory.h"

namespace kvern {
namespace {

/// Output and lse of two runs of one plan, which are the same.
std::pair<std::vector<float>, std::vector<float>> run_plan(const AttendProblem& problem, const std::byte* queries,
                                                           const std::int32_t* query_positions,
                                                           std::uint32_t piece_entries = 0) {
  auto plan = CudaAttendPlan::make(problem, {piece_entries});
  if (!plan) throw std::runtime_error(plan.error().to_string());
  const std::size_t rows = std::size_t{problem.queries.heads} * problem.queries.tokens;
  const DeviceArray<std::byte> memory(plan->device_bytes());
  std::pair<std::vector<float>, std::vector<float>> result;
  for (int i = 0; i < 2; ++i) {
    const DeviceArray<float> output(rows * problem.value_dim), lse(rows);
    Status status = i == 0 ? plan->put(memory.data(), nullptr) : Status::ok();
    if (status) status = plan->attend(queries, query_positions, output.data(), lse.data(), nullptr);
    if (!status) throw std::runtime_error(status.to_string());
    const auto before = std::exchange(result, std::pair(output.get(), lse.get()));
    if (i > 0 && before != result) throw std::runtime_error("two runs differ");
  }
  return result;
}

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

  std::pair<std::vector<float>, std::vector<float>> run(std::uint32_t piece_entries = 0) const {
    return run_plan(problem, problem.queries.data, problem.query_positions, piece_entries);
  }

 private:
  template <typename T>
  T* allocate(std::size_t count) {
    void* memory = nullptr;
    if (cudaMalloc(&memory, std::max<std::size_t>(count, 1) * sizeof(T)) != cudaSuccess) {
      throw std::runtime_error("no device memory");
    }
    memory_.push_back(memory);
    return static_cast<T*>(memory);
  }

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

 public:
  AttendProblem problem;
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
  const auto plan = run_plan({queries.rows(), dim, 0, nullptr, gpu_heads}, device_queries.data(), nullptr);
  for (std::size_t i = 0; i < output.size(); ++i) ASSERT_NEAR(plan.first[i], output[i], tolerance);
  for (std::size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(plan.second[i], lse[i], tolerance);
}

TEST_F(CudaAttend, ReadsSectionsAsDecodedOnes) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const std::uint32_t dim : {64U, 128U, 192U, 256U}) {
      expect_sections_as_on_the_cpu("int4(group=64,scheme=asymmetric)", 64, dtype, dim, 2501, 2e-5);
      expect_sections_as_on_the_cpu("int4(group=32,scheme=asymmetric)", 32, dtype, dim, 77, 2e-5);
      expect_sections_as_on_the_cpu("int4(group=128,scheme=symmetric)", 128, dtype, dim, 1000, 2e-5);
      expect_sections_as_on_the_cpu("int8(group=64)", 64, dtype, dim, 2501, 2e-5);
      expect_sections_as_on_the_cpu("int8(group=256)", 256, dtype, dim, 31, 2e-5);
    }
  }
}

TEST_F(CudaAttend, IsTheSameWhateverThePieces) {
  const Matrix queries(DType::kBFloat16, 8, 1, 128, 1);
  const Cache cache(DType::kBFloat16, 2, 128, 128, {5000, 17, 300}, 2);
  DeviceProblem device({queries.rows(), 128, 0, nullptr, cache.heads}, cache);
  const auto expected = device.run();
  for (const std::uint32_t piece : {1U, 300U, 1024U, 1000000U}) {
    const auto got = device.run(piece);
    for (std::size_t i = 0; i < got.first.size(); ++i) ASSERT_NEAR(got.first[i], expected.first[i], 1e-6) << piece;
    for (std::size_t i = 0; i < got.second.size(); ++i) ASSERT_NEAR(got.second[i], expected.second[i], 1e-5) << piece;
  }
}

TEST_F(CudaAttend, AHeadWithoutEntriesGetsZeros) {
  const Matrix queries(DType::kBFloat16, 4, 2, 64, 1);
  const Cache cache(DType::kBFloat16, 2, 64, 64, {0}, 2);
  DeviceProblem device({queries.rows(), 64, 0, nullptr, cache.heads}, cache);
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
