// Golden vectors on the CPU: every case, on each instruction set that this machine has.

#include "tests/golden_vectors/cases.h"
#include "tests/golden_vectors/methods.h"
#include "tests/kernels/targets.h"

int main(int argc, char** argv) {
  using namespace kvern::golden;
  Methods methods = methods_on(cpu_backend());
  add_host_methods(methods);
  return run_cases(argc, argv, methods, false, [](const auto& run) { kvern::for_each_target(run); });
}
