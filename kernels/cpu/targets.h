#pragma once

/// Instruction sets that the kernels are compiled for, chosen at run time: plain C++, SSE4, AVX2 and AVX-512 on x86-64.
/// SSSE3 alone and the extensions of Ice Lake would add code and no speed. Include it before hwy/foreach_target.h.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
