#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/keys.h"
#include "tests/integration/child_process.h"

namespace kvern::testing {

template <typename Condition>
bool eventually(Condition&& holds) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!holds()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

/// A real daemon with files of its own, which go with it.
class DaemonProcess {
 public:
  explicit DaemonProcess(std::string program, std::vector<std::string> arguments = {})
      : folder_(std::filesystem::temp_directory_path() / ("kvern-" + std::to_string(::getpid()) + "-" + next_name())),
        run_("/dev/shm/" + folder_.filename().string()),
        command_{std::move(program), "--server.socket=" + socket(), "--server.run_dir=" + run_.string(),
                 "--metrics.listen="} {
    std::filesystem::create_directories(folder_);
    command_.insert(command_.end(), arguments.begin(), arguments.end());
    start();
  }
  ~DaemonProcess() {
    kill();
    std::filesystem::remove_all(folder_);
    std::filesystem::remove_all(run_);
  }
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;
  void start() {
    process_.emplace(command_);
    EXPECT_TRUE(process_->says("is ready")) << process_->text();
  }
  void kill() { process_.reset(); }
  ChildProcess& process() { return *process_; }
  bool says(const std::string& text) { return process_->says(text); }
  const std::string& text() const { return process_->text(); }
  std::string socket() const { return (folder_ / "kvernd.sock").string(); }
  std::string address() const { return "unix://" + socket(); }
  std::filesystem::path slab() const { return run_ / "slab"; }

 private:
  static std::string next_name() {
    static int number = 0;
    return std::to_string(number++);
  }
  std::filesystem::path folder_;
  std::filesystem::path run_;
  std::vector<std::string> command_;
  std::optional<ChildProcess> process_;
};

/// Hashes of the blocks of a prompt.
inline std::vector<BlockHash> prompt(std::uint64_t seed, std::uint32_t blocks) {
  std::mt19937_64 random(seed);
  std::vector<BlockHash> hashes;
  for (std::uint32_t i = 0; i < blocks; ++i) {
    std::array<std::uint8_t, 32> bytes;
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
    hashes.emplace_back(bytes);
  }
  return hashes;
}

/// Block ids first, first + 1, …
inline std::vector<std::uint32_t> ids(std::uint32_t first, std::uint32_t count) {
  std::vector<std::uint32_t> result(count);
  std::iota(result.begin(), result.end(), first);
  return result;
}

}  // namespace kvern::testing
