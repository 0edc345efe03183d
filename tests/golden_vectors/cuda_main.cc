// Golden vectors on a CUDA device: the cases whose methods have kernels there.

#include <cstdio>

#include "kernels/cuda/device.h"
#include "tests/golden_vectors/cases.h"
#include "tests/golden_vectors/methods.h"

int main(int argc, char** argv) {
  using namespace kvern::golden;
  if (!kvern::cuda_available()) {
    std::printf("golden: skipped, no CUDA device\n");
    return 0;
  }
  return run_cases(argc, argv, methods_on(cuda_backend()), true, [](const auto& run) { run("CUDA"); });
}
