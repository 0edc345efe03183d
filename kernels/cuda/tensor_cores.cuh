#pragma once

#include <cstdint>

#include "base/dtype.h"

/// Instructions of the tensor cores of sm_80 and later, and elements of 16 bits as they take them: pairs in a register,
/// the first in the lower half. A lane of a warp is row = lane / 4 and column = lane % 4 of a fragment.
namespace kvern::cuda {

struct BFloat16Pairs {
  static constexpr DType kDType = DType::kBFloat16;
  /// Has float32's range, so that weights need not be kept within it.
  static constexpr bool kWide = true;

  /// Rounds to nearest, ties to even.
  __device__ static std::uint32_t pack(float low, float high) {
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  /// codes * scales + offsets, rounded once. Codes and scales are bfloat16 whatever the dtype.
  __device__ static std::uint32_t line(std::uint32_t codes, std::uint32_t scales, std::uint32_t offsets) {
    std::uint32_t pair;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(codes), "r"(scales), "r"(offsets));
    return pair;
  }
  __device__ static float low(std::uint32_t pair) { return __uint_as_float(pair << 16); }
  __device__ static float high(std::uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000U); }

  /// sums [16][8] += a [16][16] * b [16][8].
  __device__ static void multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct Float16Pairs {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr bool kWide = false;
  /// Weights are at most 2 to the power of this, so that small ones keep their bits.
  static constexpr float kHeadroom = 14;

  __device__ static std::uint32_t pack(float low, float high) {
    std::uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  __device__ static std::uint32_t line(std::uint32_t codes, std::uint32_t scales, std::uint32_t offsets) {
    return pack(fmaf(BFloat16Pairs::low(codes), BFloat16Pairs::low(scales), low(offsets)),
                fmaf(BFloat16Pairs::high(codes), BFloat16Pairs::high(scales), high(offsets)));
  }
  __device__ static float low(std::uint32_t pair) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<std::uint16_t>(pair)));
    return value;
  }
  __device__ static float high(std::uint32_t pair) { return low(pair >> 16); }

  __device__ static void multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

/// The transpose of eight by eight elements.
__device__ inline std::uint32_t transposed(std::uint32_t pair) {
  std::uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

/// The lower halves of two registers, and the upper ones.
__device__ inline std::uint32_t lower_halves(std::uint32_t a, std::uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ inline std::uint32_t upper_halves(std::uint32_t a, std::uint32_t b) { return __byte_perm(a, b, 0x7632); }

/// 16 bytes that are read once. The order of these loads among each other is kept. Not by the path for constants, which
/// is for what no kernel writes meanwhile: a kernel may begin before the one that writes has ended.
__device__ inline uint4 load_once(const std::byte* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

}  // namespace kvern::cuda
