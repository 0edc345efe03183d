#include "kernels/cuda/quantise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/cpu/quantise.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/samples.h"

namespace kvern {
namespace {

using quantise::Form;
using quantise::Kind;
using quantise::Scheme;

using CudaQuantise = CudaTest;

constexpr Kind kKinds[] = {Kind::kFp8, Kind::kInt4, Kind::kInt3, Kind::kInt2, Kind::kInt8Residual};
constexpr std::uint32_t kPlanes = 3;

std::size_t section_stride(const Form& form) { return (form.section_bytes() + 63) / 64 * 64; }

/// Encodes kPlanes planes and decodes tokens [begin, end) on the device, and compares with the CPU.
void expect_same_bytes(const Form& form, const Bytes& canonical, std::uint32_t begin, std::uint32_t end) {
  SCOPED_TRACE(testing::Message() << "kind " << static_cast<int>(form.kind) << " scheme "
                                  << static_cast<int>(form.scheme) << " " << dtype_name(form.dtype) << " "
                                  << form.tokens << " x " << form.dim << " in groups of " << form.group
                                  << (form.per_channel ? " K" : " V"));
  const std::size_t row = form.dim * form.element_bytes();
  const std::size_t plane = form.tokens * row;
  const std::size_t stride = section_stride(form);
  DeviceArray<std::byte> planes(kPlanes * plane);
  DeviceArray<std::byte> sections(kPlanes * stride);
  DeviceArray<std::byte> rows(kPlanes * plane);
  planes.put(0, canonical.data(), canonical.size());
  const DeviceFlag not_finite;
  const DeviceFlag invalid;
  ASSERT_TRUE(quantise::cuda_encode_planes(form, planes.data(), plane, kPlanes, sections.data(), stride,
                                           not_finite.pointer(), nullptr));
  ASSERT_TRUE(quantise::cuda_decode_rows(form, sections.data(), stride, kPlanes, begin, end, rows.data(), plane,
                                         invalid.pointer(), nullptr));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(not_finite.value(), 0U);
  EXPECT_EQ(invalid.value(), 0U);
  for (std::uint32_t i = 0; i < kPlanes; ++i) {
    AlignedBytes section(Bytes(form.section_bytes()));
    ASSERT_TRUE(quantise::encode_plane(form, &canonical[i * plane], section.span().data()));
    ASSERT_EQ(sections.get(i * stride, form.section_bytes()), Bytes(section.span().begin(), section.span().end()));
    Bytes decoded((end - begin) * row);
    ASSERT_TRUE(quantise::decode_rows(form, section.span().data(), begin, end, decoded.data()));
    ASSERT_EQ(rows.get(i * plane, decoded.size()), decoded);
  }
}

/// Runs for every kind with the schemes that it has.
template <typename Run>
void with_kinds(Run run) {
  for (const Kind kind : kKinds) {
    for (const Scheme scheme : {Scheme::kAsymmetric, Scheme::kSymmetric}) {
      if (kind != Kind::kFp8 || scheme == Scheme::kSymmetric) run(kind, scheme);
    }
  }
}

TEST_F(CudaQuantise, MakesTheBytesOfTheCpuAndDecodesThemAlike) {
  struct Row {
    std::uint32_t dim;
    std::uint32_t group;
  };
  // V in runs of groups of 2, 4, 8 and 16 packs; with a last group that is shorter; in groups of six packs; in more
  // than one tile.
  constexpr Row kRows[] = {{64, 16},  {64, 64}, {128, 32}, {128, 64}, {128, 128},
                           {192, 64}, {80, 64}, {96, 64},  {272, 64}};
  with_kinds([&](Kind kind, Scheme scheme) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const std::uint32_t tokens : {1U, 33U, 200U}) {
        for (const Row& row : kRows) {
          const ShardShape shape = sample_shape(dtype, tokens, row.dim, 0, 1, kPlanes);
          const Bytes canonical = sample_canonical(shape, tokens + row.dim);
          for (const bool key : {true, false}) {
            const std::uint32_t group = key ? row.group : Form::channel_group(row.dim, row.group);
            expect_same_bytes({dtype, key, tokens, row.dim, group, kind, scheme}, canonical, tokens / 3,
                              tokens - tokens / 8);
          }
        }
      }
    }
  });
}

/// The element of these bits; 0 for what is not finite.
std::uint16_t finite_bits(DType dtype, std::uint32_t bits) {
  const auto raw = static_cast<std::uint16_t>(bits);
  const float value = dtype == DType::kBFloat16 ? from_bfloat16(raw) : from_float16(raw);
  return std::abs(value) <= largest_finite(dtype) ? raw : std::uint16_t{0};
}

TEST_F(CudaQuantise, CodesEveryValueOfSixteenBitsAsTheCpu) {
  constexpr std::uint32_t kTokens = 512;
  constexpr std::uint32_t kDim = 128;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    // In order, for groups of values beside each other; by an odd factor, for groups across the range; each with a one
    // or a large number between, which leave the others few codes.
    std::vector<std::uint16_t> elements;
    const auto one = static_cast<std::uint16_t>(dtype == DType::kFloat16 ? 0x3C00 : 0x3F80);
    for (std::uint32_t i = 0; i < kTokens * kDim; ++i) elements.push_back(finite_bits(dtype, i));
    for (std::uint32_t i = 0; i < kTokens * kDim; ++i) elements.push_back(finite_bits(dtype, i * 40503));
    for (std::uint32_t i = 0; i < kTokens * kDim; ++i) elements.push_back(i % 2 == 0 ? one : finite_bits(dtype, i));
    Bytes canonical(elements.size() * sizeof elements[0]);
    std::memcpy(canonical.data(), elements.data(), canonical.size());
    for (const bool key : {true, false}) {
      with_kinds([&](Kind kind, Scheme scheme) {
        expect_same_bytes({dtype, key, kTokens, kDim, 64, kind, scheme}, canonical, 0, kTokens);
      });
    }
  }
}

/// K, V in runs and V in groups that are none.
std::vector<Form> forms_of_every_path(Kind kind, Scheme scheme) {
  return {{DType::kBFloat16, true, 64, 64, 64, kind, scheme},
          {DType::kBFloat16, false, 64, 64, 64, kind, scheme},
          {DType::kBFloat16, false, 64, 96, 48, kind, scheme}};
}

TEST_F(CudaQuantise, FlagsWhatIsNotFinite) {
  for (const Form& form : forms_of_every_path(Kind::kInt4, Scheme::kAsymmetric)) {
    for (const std::uint16_t bits : {std::uint16_t{0x7FC0}, std::uint16_t{0x7F80}, std::uint16_t{0xFF80}}) {
      Bytes plane(std::size_t{form.tokens} * form.dim * 2);
      std::memcpy(plane.data() + 1000, &bits, sizeof bits);
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
}

TEST_F(CudaQuantise, FlagsWhatEncodingCannotHaveMade) {
  with_kinds([&](Kind kind, Scheme scheme) {
    for (const Form& form : forms_of_every_path(kind, scheme)) {
      const auto flag_of = [&](std::size_t at, std::byte byte) {
        Bytes section(form.section_bytes());
        section[at] = byte;
        DeviceArray<std::byte> sections(section);
        DeviceArray<std::byte> rows(std::size_t{form.tokens} * form.dim * 2);
        const DeviceFlag flag;
        EXPECT_TRUE(quantise::cuda_decode_rows(form, sections.data(), section_stride(form), 1, 0, form.tokens,
                                               rows.data(), 0, flag.pointer(), nullptr));
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        return flag.value();
      };
      EXPECT_EQ(flag_of(0, std::byte{0}), 0U);
      EXPECT_EQ(flag_of(form.scales() * sizeof(std::uint16_t) - 1, std::byte{0xFF}), 1U);
      if (kind == Kind::kFp8) {
        EXPECT_EQ(flag_of(form.section_bytes() - 1, std::byte{0x7F}), 1U);
        EXPECT_EQ(flag_of(form.first_at() + 5, std::byte{0xFF}), 1U);
        EXPECT_EQ(flag_of(form.first_at() + 5, std::byte{0xFE}), 0U);
      }
    }
  });
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
