#include "kernels/cuda/quantise.h"

#include <gtest/gtest.h>

#include "kernels/cpu/quantise.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/samples.h"

namespace kvern {
namespace {

using quantise::Form;
using quantise::Kind;
using quantise::Scheme;

using CudaQuantise = CudaTest;

/// Encodes and decodes on the device and compares with the CPU.
void expect_same_bytes(const Form& form) {
  constexpr std::uint32_t kPlanes = 3;
  const ShardShape shape = sample_shape(form.dtype, form.tokens, form.dim, 0, 1, kPlanes);
  const Bytes canonical = sample_canonical(shape, form.tokens + form.dim);
  const std::size_t plane = shape.plane_bytes(Part::kKey);
  const std::size_t section_stride = (form.section_bytes() + 63) / 64 * 64;
  DeviceArray<std::byte> planes(kPlanes * plane);
  DeviceArray<std::byte> sections(kPlanes * section_stride);
  DeviceArray<std::byte> rows(kPlanes * plane);
  planes.put(0, canonical.data(), canonical.size());
  const DeviceFlag not_finite;
  const DeviceFlag invalid;
  ASSERT_TRUE(quantise::cuda_encode_planes(form, planes.data(), plane, kPlanes, sections.data(), section_stride,
                                           not_finite.pointer(), nullptr));
  const std::uint32_t begin = form.tokens / 3;
  ASSERT_TRUE(quantise::cuda_decode_rows(form, sections.data(), section_stride, kPlanes, begin, form.tokens,
                                         rows.data(), plane, invalid.pointer(), nullptr));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(not_finite.value(), 0U);
  EXPECT_EQ(invalid.value(), 0U);
  for (std::uint32_t i = 0; i < kPlanes; ++i) {
    AlignedBytes section(Bytes(form.section_bytes()));
    ASSERT_TRUE(quantise::encode_plane(form, &canonical[i * plane], section.span().data()));
    ASSERT_EQ(sections.get(i * section_stride, form.section_bytes()),
              Bytes(section.span().begin(), section.span().end()));
    Bytes decoded((form.tokens - begin) * shape.row_bytes(Part::kKey));
    ASSERT_TRUE(quantise::decode_rows(form, section.span().data(), begin, form.tokens, decoded.data()));
    ASSERT_EQ(rows.get(i * plane, decoded.size()), decoded);
  }
}

TEST_F(CudaQuantise, MakesTheBytesOfTheCpuAndDecodesThemAlike) {
  for (const Kind kind : {Kind::kFp8, Kind::kInt4, Kind::kInt3, Kind::kInt2, Kind::kInt8Residual}) {
    for (const Scheme scheme : {Scheme::kAsymmetric, Scheme::kSymmetric}) {
      if (kind == Kind::kFp8 && scheme == Scheme::kAsymmetric) continue;
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        for (const std::uint32_t tokens : {1U, 33U, 200U}) {
          for (const std::uint32_t dim : {64U, 80U, 128U, 192U}) {
            for (const bool key : {true, false}) {
              const Form form{dtype, key, tokens, dim, key ? 64 : Form::channel_group(dim, 64), kind, scheme};
              SCOPED_TRACE(static_cast<int>(kind));
              expect_same_bytes(form);
            }
          }
        }
      }
    }
  }
}

TEST_F(CudaQuantise, FlagsWhatIsNotFinite) {
  for (const bool key : {true, false}) {
    const Form form{DType::kBFloat16, key, 64, 64, 64, Kind::kInt4, Scheme::kAsymmetric};
    Bytes plane(64 * 64 * 2);
    const std::uint16_t nan = 0x7FC0;
    std::memcpy(plane.data() + 1000, &nan, sizeof nan);
    DeviceArray<std::byte> planes(plane.size());
    planes.put(0, plane.data(), plane.size());
    DeviceArray<std::byte> sections(form.section_bytes());
    const DeviceFlag flag;
    ASSERT_TRUE(quantise::cuda_encode_planes(form, planes.data(), plane.size(), 1, sections.data(),
                                             form.section_bytes(), flag.pointer(), nullptr));
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(flag.value(), 1U);
  }
}

TEST(CudaQuantiseArguments, AreCheckedBeforeTheLaunch) {
  const auto encode = [](const Form& form, std::uint32_t count) {
    return quantise::cuda_encode_planes(form, nullptr, 0, count, nullptr, 0, nullptr, nullptr).code();
  };
  EXPECT_EQ(encode({DType::kOpaqueBytes, true, 64, 64, 64}, 1), Code::kInvalid);
  EXPECT_EQ(encode({DType::kBFloat16, true, 64, 64, 64}, 0), Code::kInvalid);
  EXPECT_EQ(encode({DType::kBFloat16, true, 64, 72, 64}, 1), Code::kInvalid);
  EXPECT_EQ(encode({DType::kBFloat16, false, 64, 256, 256}, 1), Code::kInvalid);
  const Form form{DType::kBFloat16, true, 64, 64, 64};
  EXPECT_EQ(quantise::cuda_decode_rows(form, nullptr, 0, 1, 0, 65, nullptr, 0, nullptr, nullptr).code(),
            Code::kInvalid);
  EXPECT_EQ(quantise::cuda_decode_rows(form, nullptr, 0, 1, 8, 8, nullptr, 0, nullptr, nullptr).code(), Code::kInvalid);
}

TEST(CudaQuantiseArguments, WithoutADeviceTheLaunchFailsInASentence) {
  if (cuda_available()) GTEST_SKIP() << "there is a CUDA device";
  const Form form{DType::kBFloat16, true, 64, 64, 64};
  const Status status = quantise::cuda_encode_planes(form, nullptr, 0, 1, nullptr, 0, nullptr, nullptr);
  EXPECT_EQ(status.code(), Code::kInternal);
  EXPECT_FALSE(status.message().empty());
}

}  // namespace
}  // namespace kvern
