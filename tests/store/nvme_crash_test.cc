#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/base/crash_rounds.h"
#include "tests/store/nvme_crash.h"
#include "tests/store/nvme_oracle.h"

extern char** environ;

namespace kvern {
namespace {

using testing::crash_log;
using testing::crash_rounds;
using testing::NvmeObject;
using testing::NvmeOracle;
using testing::open_tier;
using testing::TempFolder;

/// Runs the victim, and kills it some microseconds after it has said so many lines. Returns all that it said.
std::string run_and_kill(const std::vector<std::string>& command, std::size_t lines, std::uint64_t microseconds,
                         int& status) {
  int ends[2] = {-1, -1};
  EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  std::vector<char*> arguments;
  for (const auto& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  pid_t victim = -1;
  EXPECT_EQ(::posix_spawn(&victim, arguments[0], &actions, nullptr, arguments.data(), environ), 0);
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  std::string said;
  char buffer[4096];
  bool killed = false;
  while (true) {
    const ssize_t bytes = ::read(ends[0], buffer, sizeof buffer);
    if (bytes <= 0) break;
    said.append(buffer, static_cast<std::size_t>(bytes));
    if (killed || static_cast<std::size_t>(std::ranges::count(said, '\n')) < lines) continue;
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
    ::kill(victim, SIGKILL);
    killed = true;
  }
  ::close(ends[0]);
  ::waitpid(victim, &status, 0);
  return said;
}

/// A line that was not finished was not acted on.
void tell(NvmeOracle& oracle, const std::string& said) {
  std::istringstream lines(said.substr(0, said.rfind('\n') + 1));
  std::vector<std::uint64_t> operations;
  std::string line;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    char what = 0;
    words >> what;
    if (what == 'o') {
      operations.clear();
      continue;
    }
    if (what == 'k') {
      std::size_t number = 0;
      words >> number;
      ASSERT_LT(number, operations.size());
      oracle.ended_well(operations[number]);
      continue;
    }
    std::uint64_t prompt = 0;
    std::uint32_t pages = 0;
    unsigned namespace_number = 0;
    words >> prompt >> pages >> namespace_number;
    const NvmeObject object{.prompt = prompt,
                            .blocks = 3,
                            .pages = pages,
                            .namespace_number = static_cast<std::uint8_t>(namespace_number),
                            .version = pages};
    operations.push_back(what == 'w'   ? oracle.begin_write(object)
                         : what == 'e' ? oracle.begin_erase(object)
                                       : oracle.begin_erase_namespace(object.namespace_number));
  }
}

class NvmeCrashTest : public ::testing::TestWithParam<BlockIoKind> {};

INSTANTIATE_TEST_SUITE_P(Io, NvmeCrashTest, ::testing::Values(BlockIoKind::kUring, BlockIoKind::kThreads),
                         [](const auto& each) { return each.param == BlockIoKind::kUring ? "Uring" : "Threads"; });

TEST_P(NvmeCrashTest, WhatWasAcknowledgedOutlivesKillAtAnyMoment) {
  const TempFolder folder;
  const NvmeConfig config = crash_log(folder.file("log"), GetParam());
  NvmeOracle oracle(NvmeOracle::kept_bytes(config, testing::kCrashMostPages * kTierAlignment));
  const std::uint64_t seed = std::random_device()();
  std::mt19937_64 random(seed);
  for (int round = 0; round < crash_rounds(40); ++round) {
    const std::string context = "seed " + std::to_string(seed) + ", round " + std::to_string(round);
    int status = 0;
    const std::string said =
        run_and_kill({VICTIM_PATH, config.files[0].path, GetParam() == BlockIoKind::kThreads ? "threads" : "io_uring",
                      std::to_string(random())},
                     1 + random() % 1000, random() % 3000, status);
    ASSERT_TRUE(WIFSIGNALED(status)) << context << ": it ended by itself with " << WEXITSTATUS(status);
    tell(oracle, said);
    const auto tier = open_tier(config);
    ASSERT_EQ(tier->recovery(testing::kPatienceNs)->status.to_string(), "ok") << context;
    ASSERT_TRUE(oracle.agrees_with(*tier)) << context;
  }
}

}  // namespace
}  // namespace kvern
