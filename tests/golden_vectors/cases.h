#pragma once

#include <functional>

#include "tests/golden_vectors/vectors.h"

namespace kvern::golden {

/// Calls a function once for every way to run kernels, with its name (an instruction set, a device).
using ForEachWay = std::function<void(const std::function<void(const char*)>&)>;

/// What a test program does: one test per case of the manifest in the folder that KVERN_GOLDEN names (default:
/// tests/golden), run every way. Cases of other methods are failures, or left out where `some` of the methods are
/// given; no case at all is a failure, too. Returns what main() does.
int run_cases(int argc, char** argv, const Methods& methods, bool some, const ForEachWay& for_each_way);

}  // namespace kvern::golden
