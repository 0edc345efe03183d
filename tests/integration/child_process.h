#pragma once

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "transport/shared_memory.h"

extern char** environ;

namespace kvern::testing {

constexpr std::chrono::seconds kPatience{30};  ///< for things that take milliseconds on an idle machine

/// A program whose standard output and error are read here. Killed on destruction.
class ChildProcess {
 public:
  explicit ChildProcess(std::vector<std::string> command) {
    int pipe_ends[2] = {-1, -1};
    if (::pipe2(pipe_ends, O_CLOEXEC) != 0) return;
    output_ = UniqueFd(pipe_ends[0]);
    const UniqueFd writer(pipe_ends[1]);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, writer.get(), STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, writer.get(), STDERR_FILENO);
    std::vector<char*> arguments;
    for (auto& word : command) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    if (::posix_spawn(&pid_, arguments[0], &actions, nullptr, arguments.data(), environ) != 0) pid_ = -1;
    posix_spawn_file_actions_destroy(&actions);
  }
  ChildProcess(ChildProcess&& other) noexcept
      : pid_(std::exchange(other.pid_, -1)), output_(std::move(other.output_)), text_(std::move(other.text_)) {}
  ChildProcess& operator=(ChildProcess&&) = delete;
  ~ChildProcess() { kill(); }

  pid_t pid() const { return pid_; }
  void signal(int number) const { ::kill(pid_, number); }
  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
  }
  /// The exit code; nullopt when it was killed or does not end.
  std::optional<int> wait() {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (std::chrono::steady_clock::now() < deadline) {
      read_some(10);  // also keeps it from blocking on a full pipe
      int status = 0;
      if (::waitpid(pid_, &status, WNOHANG) != pid_) continue;
      pid_ = -1;
      while (read_some(0)) {
      }
      return WIFEXITED(status) ? std::optional(WEXITSTATUS(status)) : std::nullopt;
    }
    return std::nullopt;
  }
  /// Whether the text appears in what it writes.
  bool says(const std::string& text) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (text_.find(text) == std::string::npos) {
      if (std::chrono::steady_clock::now() >= deadline) return false;
      if (!read_some(100) && closed_) return false;
    }
    return true;
  }
  const std::string& text() const { return text_; }

 private:
  bool read_some(int timeout_ms) {
    pollfd entry{.fd = output_.get(), .events = POLLIN, .revents = 0};
    if (closed_ || ::poll(&entry, 1, timeout_ms) != 1) return false;
    char buffer[4096];
    const ssize_t bytes = ::read(output_.get(), buffer, sizeof buffer);
    if (bytes <= 0) {
      closed_ = true;
      return false;
    }
    text_.append(buffer, static_cast<std::size_t>(bytes));
    return true;
  }

  pid_t pid_ = -1;
  UniqueFd output_;
  std::string text_;
  bool closed_ = false;
};

}  // namespace kvern::testing
