#include "kernels/cuda/int8.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/cpu/int8.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/samples.h"

namespace kvern {
namespace {

using int8::Form;

using CudaInt8 = CudaTest;

TEST_F(CudaInt8, MakesTheBytesOfTheCpuAndDecodesThemAlike) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::uint32_t tokens : {1U, 33U, 64U, 200U, 256U}) {
      for (const std::uint32_t dim : {16U, 32U, 64U, 80U, 96U, 112U, 128U, 192U, 256U, 35U}) {
        for (const bool key : {true, false}) {
          constexpr std::uint32_t kPlanes = 3;
          const Form form{dtype, key, tokens, dim, key ? 64 : Form::channel_group(dim)};
          const ShardShape shape = sample_shape(dtype, tokens, dim, 0, 1, kPlanes);
          const Bytes canonical = sample_canonical(shape, tokens + dim);
          const std::size_t plane = shape.plane_bytes(Part::kKey);
          const std::size_t plane_stride = (plane + 15) / 16 * 16;
          const std::size_t section_stride = (form.section_bytes() + 63) / 64 * 64;
          DeviceArray<std::byte> planes(kPlanes * plane_stride);
          DeviceArray<std::byte> sections(kPlanes * section_stride);
          DeviceArray<std::byte> rows(kPlanes * plane_stride);
          for (std::uint32_t i = 0; i < kPlanes; ++i) planes.put(i * plane_stride, &canonical[i * plane], plane);
          const DeviceFlag not_finite;
          const DeviceFlag bad_scale;
          ASSERT_TRUE(int8::cuda_encode_planes(form, planes.data(), plane_stride, kPlanes, sections.data(),
                                               section_stride, not_finite.pointer(), nullptr));
          const std::uint32_t begin = tokens / 3;
          const std::uint32_t end = tokens - tokens / 8;
          ASSERT_TRUE(int8::cuda_decode_rows(form, sections.data(), section_stride, kPlanes, begin, end, rows.data(),
                                             plane_stride, bad_scale.pointer(), nullptr));
          ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
          EXPECT_EQ(not_finite.value(), 0U);
          EXPECT_EQ(bad_scale.value(), 0U);
          for (std::uint32_t i = 0; i < kPlanes; ++i) {
            Bytes section(form.section_bytes());
            auto* scales = reinterpret_cast<std::uint16_t*>(section.data());
            auto* codes = reinterpret_cast<std::int8_t*>(section.data() + form.codes_offset());
            ASSERT_TRUE(int8::encode_plane(form, &canonical[i * plane], scales, codes));
            ASSERT_EQ(sections.get(i * section_stride, section.size()), section)
                << dtype_name(dtype) << " " << tokens << " x " << dim << (key ? " K" : " V");
            Bytes decoded((end - begin) * shape.row_bytes(Part::kKey));
            ASSERT_TRUE(int8::decode_rows(form, scales, codes, begin, end, decoded.data()));
            ASSERT_EQ(rows.get(i * plane_stride, decoded.size()), decoded)
                << dtype_name(dtype) << " " << tokens << " x " << dim << (key ? " K" : " V");
          }
        }
      }
    }
  }
}

/// K, V in runs of groups and V in groups that are none.
constexpr Form kEveryPath[] = {
    {DType::kBFloat16, true, 64, 64, 64}, {DType::kBFloat16, false, 64, 64, 64}, {DType::kBFloat16, false, 64, 80, 80}};

TEST_F(CudaInt8, FlagsWhatIsNotFinite) {
  for (const Form& form : kEveryPath) {
    Bytes plane(std::size_t{form.tokens} * form.dim * 2);
    const std::uint16_t nan = 0x7FC0;
    std::memcpy(plane.data() + 1000, &nan, sizeof nan);
    DeviceArray<std::byte> planes(plane.size());
    planes.put(0, plane.data(), plane.size());
    DeviceArray<std::byte> sections(form.section_bytes());
    const DeviceFlag flag;
    ASSERT_TRUE(int8::cuda_encode_planes(form, planes.data(), plane.size(), 1, sections.data(), form.section_bytes(),
                                         flag.pointer(), nullptr));
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(flag.value(), 1U);
  }
}

TEST_F(CudaInt8, DecodesEveryCodeAsTheCpuAndFlagsScalesThatEncodingDoesNotMake) {
  for (const Form& form : kEveryPath) {
    for (const bool damaged : {false, true}) {
      Bytes section(form.section_bytes());
      auto* scales = reinterpret_cast<std::uint16_t*>(section.data());
      auto* codes = reinterpret_cast<std::int8_t*>(section.data() + form.codes_offset());
      for (std::size_t i = 0; i < form.scales(); ++i) scales[i] = static_cast<std::uint16_t>(0x3F80 + i);
      for (std::uint32_t i = 0; i < form.tokens * form.dim; ++i) codes[i] = static_cast<std::int8_t>(i & 0xFF);
      if (damaged) scales[form.scales() - 1] = 0xFFFF;
      const DeviceArray<std::byte> sections(section);
      const DeviceArray<std::byte> rows(std::size_t{form.tokens} * form.dim * 2);
      const DeviceFlag flag;
      ASSERT_TRUE(
          int8::cuda_decode_rows(form, sections.data(), 0, 1, 0, form.tokens, rows.data(), 0, flag.pointer(), nullptr));
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      EXPECT_EQ(flag.value(), damaged ? 1U : 0U);
      Bytes decoded(std::size_t{form.tokens} * form.dim * 2);
      EXPECT_EQ(int8::decode_rows(form, scales, codes, 0, form.tokens, decoded.data()), !damaged);
      if (!damaged) {
        EXPECT_EQ(rows.get(), decoded);
      }
    }
  }
}

TEST_F(CudaInt8, FlagsACodeThatIsNeverWrittenWhereItIsNotFinite) {
  for (const Form& form : kEveryPath) {
    for (const auto scale : {int8::max_scale_bits(form.dtype), int8::any_code_scale_bits(form.dtype)}) {
      Bytes section(form.section_bytes());
      auto* scales = reinterpret_cast<std::uint16_t*>(section.data());
      auto* codes = reinterpret_cast<std::int8_t*>(section.data() + form.codes_offset());
      std::fill_n(scales, form.scales(), scale);
      codes[5] = -128;
      const DeviceArray<std::byte> sections(section);
      const DeviceArray<std::byte> rows(std::size_t{form.tokens} * form.dim * 2);
      const DeviceFlag flag;
      ASSERT_TRUE(
          int8::cuda_decode_rows(form, sections.data(), 0, 1, 0, form.tokens, rows.data(), 0, flag.pointer(), nullptr));
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      Bytes decoded(std::size_t{form.tokens} * form.dim * 2);
      EXPECT_EQ(int8::decode_rows(form, scales, codes, 0, form.tokens, decoded.data()), flag.value() == 0);
      EXPECT_EQ(flag.value(), scale == int8::max_scale_bits(form.dtype) ? 1U : 0U);
    }
  }
}

TEST(CudaInt8Arguments, AreCheckedBeforeTheLaunch) {
  const Form opaque{DType::kOpaqueBytes, true, 64, 64, 64};
  EXPECT_EQ(int8::cuda_encode_planes(opaque, nullptr, 0, 1, nullptr, 0, nullptr, nullptr).code(), Code::kInvalid);
  const Form form{DType::kBFloat16, true, 64, 64, 64};
  EXPECT_EQ(int8::cuda_encode_planes(form, nullptr, 0, 0, nullptr, 0, nullptr, nullptr).code(), Code::kInvalid);
  EXPECT_EQ(int8::cuda_decode_rows(form, nullptr, 0, 1, 0, 65, nullptr, 0, nullptr, nullptr).code(), Code::kInvalid);
  EXPECT_EQ(int8::cuda_decode_rows(form, nullptr, 0, 1, 8, 8, nullptr, 0, nullptr, nullptr).code(), Code::kInvalid);
}

TEST(CudaInt8Arguments, WithoutADeviceTheLaunchFailsInASentence) {
  if (cuda_available()) GTEST_SKIP() << "there is a CUDA device";
  const Form form{DType::kBFloat16, true, 64, 64, 64};
  const Status status = int8::cuda_encode_planes(form, nullptr, 0, 1, nullptr, 0, nullptr, nullptr);
  EXPECT_EQ(status.code(), Code::kInternal);
  EXPECT_FALSE(status.message().empty());
}

}  // namespace
}  // namespace kvern
