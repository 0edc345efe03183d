#include "tests/golden_vectors/cases.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <set>

namespace kvern::golden {
namespace {

int cases_run = 0;
std::set<std::string> ways_run;

class GoldenCase : public ::testing::Test {
 public:
  GoldenCase(Vectors& vectors, const nlohmann::json& of, const Methods& methods, const ForEachWay& for_each_way)
      : vectors_(vectors), case_(of), methods_(methods), for_each_way_(for_each_way) {}

  void TestBody() override {
    ++cases_run;
    for_each_way_([&](const char* way) {
      ways_run.insert(way);
      for (const std::string& failure : run_case(vectors_, case_, methods_)) {
        ADD_FAILURE() << "on " << way << ": " << failure;
      }
    });
  }

 private:
  Vectors& vectors_;
  const nlohmann::json& case_;
  const Methods& methods_;
  const ForEachWay& for_each_way_;
};

}  // namespace

int run_cases(int argc, char** argv, const Methods& methods, bool some, const ForEachWay& for_each_way) {
  ::testing::InitGoogleTest(&argc, argv);
  const char* folder = std::getenv("KVERN_GOLDEN");
  try {
    Vectors vectors(folder != nullptr && *folder != '\0' ? folder : KVERN_GOLDEN_DIR);
    for (const nlohmann::json& of : vectors.cases()) {
      if (some && !methods.contains(of.at("method").get<std::string>())) continue;
#ifndef __clang_analyzer__  // which takes what googletest keeps for a leak
      ::testing::RegisterTest("Golden", of.at("name").get<std::string>().c_str(), nullptr, nullptr, __FILE__, __LINE__,
                              [&]() -> ::testing::Test* { return new GoldenCase(vectors, of, methods, for_each_way); });
#endif
    }
    int result = RUN_ALL_TESTS();
    std::printf("golden: %d of %zu cases run on", cases_run, vectors.cases().size());
    for (const std::string& way : ways_run) std::printf(" %s", way.c_str());
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

}  // namespace kvern::golden
