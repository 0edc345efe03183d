#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/targets.h"

// clang-format off
#include <hwy/targets.h>
// clang-format on

namespace kvern {

/// Runs a function once per instruction set that the kernels are compiled for and this machine has, plain C++ included.
template <typename Function>
void for_each_target(Function function) {
  for (const std::int64_t target : {HWY_SCALAR, HWY_SSE4, HWY_AVX2, HWY_AVX3}) {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().DeInit();
    if (target != HWY_SCALAR && (hwy::SupportedTargets() & target) == 0) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    function(hwy::TargetName(target));
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

}  // namespace kvern
