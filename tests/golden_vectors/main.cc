// Golden vectors: one test per case of the manifest in the folder that KVERN_GOLDEN names (default: tests/golden), each
// on every instruction set that this machine has. No case at all, or a method that is not known, is a failure.

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <set>

#include "tests/golden_vectors/methods.h"
#include "tests/golden_vectors/vectors.h"
#include "tests/kernels/targets.h"

namespace kvern::golden {
namespace {

int cases_run = 0;
std::set<std::string> targets_run;

Methods all_methods() {
  Methods methods;
  // Holds what other cases refer to.
  methods["inputs_only"] = [](CaseRun&) {};
  add_evict_methods(methods);
  add_merge_methods(methods);
  add_cluster_methods(methods);
  add_quantise_methods(methods);
  add_rotate_methods(methods);
  return methods;
}

class GoldenCase : public ::testing::Test {
 public:
  GoldenCase(Vectors& vectors, const nlohmann::json& of, const Methods& methods)
      : vectors_(vectors), case_(of), methods_(methods) {}

  void TestBody() override {
    ++cases_run;
    for_each_target([&](const char* target) {
      targets_run.insert(target);
      for (const std::string& failure : run_case(vectors_, case_, methods_)) {
        ADD_FAILURE() << "on " << target << ": " << failure;
      }
    });
  }

 private:
  Vectors& vectors_;
  const nlohmann::json& case_;
  const Methods& methods_;
};

}  // namespace
}  // namespace kvern::golden

int main(int argc, char** argv) {
  using namespace kvern::golden;
  ::testing::InitGoogleTest(&argc, argv);
  const char* folder = std::getenv("KVERN_GOLDEN");
  try {
    Vectors vectors(folder != nullptr && *folder != '\0' ? folder : KVERN_GOLDEN_DIR);
    const Methods methods = all_methods();
    for (const nlohmann::json& of : vectors.cases()) {
      // NOLINTNEXTLINE(clang-analyzer-cplusplus.NewDeleteLeaks): googletest keeps it
      ::testing::RegisterTest("Golden", of.at("name").get<std::string>().c_str(), nullptr, nullptr, __FILE__, __LINE__,
                              [&]() -> ::testing::Test* { return new GoldenCase(vectors, of, methods); });
    }
    int result = RUN_ALL_TESTS();
    std::printf("golden: %d of %zu cases run on", cases_run, vectors.cases().size());
    for (const std::string& target : targets_run) std::printf(" %s", target.c_str());
    std::printf("\n");
    if (cases_run == 0) {
      std::fprintf(stderr, "golden: no case was run; is KVERN_GOLDEN right, or a filter too narrow?\n");
      result = 1;
    }
    return result;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "golden: %s\n", error.what());
    return 1;
  }
}
