#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/integration/child_process.h"
#include "tests/integration/local_client.h"

namespace kvern::testing {

/// Cases that start and end a daemon (KVERND_PATH) as they like, in folders that go with the case.
class DaemonTest : public ::testing::Test {
 protected:
  /// What this daemon is told beside its socket and folder, in every start.
  virtual std::vector<std::string> settings() const = 0;

  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "kvern-it-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    run_dir_ = "/dev/shm/" + folder_.filename().string();
  }
  void TearDown() override {
    daemon_.reset();
    std::filesystem::remove_all(folder_);
    std::filesystem::remove_all(run_dir_);
  }

  std::string socket() const { return (folder_ / "k.sock").string(); }

  std::vector<std::string> command(std::vector<std::string> more = {}) const {
    std::vector<std::string> words = {KVERND_PATH, "--server.socket=" + socket(),
                                      "--server.run_dir=" + run_dir_.string(), "--pipeline.ring_spin_us=0",
                                      "--metrics.listen="};
    for (auto& word : settings()) words.push_back(std::move(word));
    for (auto& word : more) words.push_back(std::move(word));
    return words;
  }
  void start(std::vector<std::string> more = {}) {
    const auto started = std::chrono::steady_clock::now();
    daemon_.emplace(command(std::move(more)));
    ASSERT_TRUE(daemon_->says("is ready")) << daemon_->text();
    const auto took = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - started);
    std::cout << "kvernd was ready after " << took.count() << " ms\n";
  }
  std::unique_ptr<LocalClient> connect(const std::string& name = "test") {
    auto client = LocalClient::connect(socket(), name);
    if (!client) ADD_FAILURE() << client.error().to_string() << "\n" << daemon_->text();
    return client ? std::move(*client) : nullptr;
  }
  /// The daemon's report of itself; null, and the case has failed, when it does not answer.
  static nlohmann::json status(LocalClient& client) {
    wire::ControlRequest request;
    request.mutable_status();
    wire::ControlReply reply;
    if (const Status asked = client.control(request, &reply); !asked) {
      ADD_FAILURE() << asked.to_string();
      return {};
    }
    return nlohmann::json::parse(reply.status_report().json());
  }

  std::filesystem::path folder_;
  std::filesystem::path run_dir_;
  std::optional<ChildProcess> daemon_;
};

}  // namespace kvern::testing
