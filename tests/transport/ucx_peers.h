#pragma once

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "transport/ucx.h"

extern char** environ;

namespace kvern {

constexpr const char* kToken = "a session token of the test";
constexpr std::uint64_t kGoneObject = 404;

/// One memory for pushes and pulls. Knows one token; the object kGoneObject has expired. Counts what begins and ends.
class MemoryHandler : public UcxServerHandler {
 public:
  explicit MemoryHandler(std::size_t bytes) : memory(bytes) {}

  Result<std::span<std::byte>> begin_push(const std::string& token, std::uint64_t id, std::uint64_t offset,
                                          std::size_t bytes) override {
    return begin(token, id, offset, bytes);
  }
  void pushed(const std::string&, std::uint64_t, const Status& status) override { end(status); }
  Result<std::span<const std::byte>> begin_pull(const std::string& token, std::uint64_t id, std::uint64_t offset,
                                                std::size_t bytes) override {
    return begin(token, id, offset, bytes);
  }
  void pulled(const std::string&, std::uint64_t, const Status& status) override { end(status); }

  template <typename Condition>
  void wait(Condition condition) {
    std::unique_lock lock(mutex);
    changed.wait(lock, condition);
  }
  bool idle() {
    std::lock_guard lock(mutex);
    return begun == ended;
  }
  std::size_t count_begun() { return locked(begun); }
  std::size_t count_ended() { return locked(ended); }
  std::size_t count_failed() { return locked(failed); }

  std::vector<std::byte> memory;
  std::mutex mutex;
  std::condition_variable changed;
  // For conditions of wait():
  std::size_t begun = 0;
  std::size_t ended = 0;
  std::size_t failed = 0;

 private:
  std::size_t locked(const std::size_t& count) {
    std::lock_guard lock(mutex);
    return count;
  }
  Result<std::span<std::byte>> begin(const std::string& token, std::uint64_t id, std::uint64_t offset,
                                     std::size_t bytes) {
    if (token != kToken) return failure(Code::kRefused, "no such session");
    if (id == kGoneObject) return failure(Code::kExpired, "it has expired");
    if (offset > memory.size() || bytes > memory.size() - offset) return failure(Code::kInvalid, "out of range");
    std::lock_guard lock(mutex);
    ++begun;
    changed.notify_all();
    return std::span(memory).subspan(offset, bytes);
  }
  void end(const Status& status) {
    std::lock_guard lock(mutex);
    ++ended;
    if (!status) ++failed;
    changed.notify_all();
  }
};

inline UcxServerConfig server_config() {
  UcxServerConfig config;
  config.listen_address = "127.0.0.1";
  config.devices = "lo";
  return config;
}

inline UcxClientConfig client_config(std::uint16_t port, std::size_t staging_bytes = 32U << 20) {
  UcxClientConfig config;
  config.host = "127.0.0.1";
  config.port = port;
  config.session_token = kToken;
  config.staging_bytes = staging_bytes;
  config.devices = "lo";
  return config;
}

/// This program again in another process, in one of the roles of ucx_test.cc. Killed when the test leaves it.
class Peer {
 public:
  explicit Peer(const std::vector<std::string>& arguments) {
    int in[2];
    int out[2];
    if (::pipe2(in, O_CLOEXEC) != 0 || ::pipe2(out, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    // The child reads its port from standard output, where UCX would warn of variables that it does not know.
    ::setenv("UCX_WARN_UNUSED_ENV_VARS", "n", 0);
    ::setenv("UCX_LOG_FILE", "stderr", 0);
    std::vector<std::string> words{"/proc/self/exe"};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (auto& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    const int error = ::posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    ::close(in[0]);
    ::close(out[1]);
    in_ = in[1];
    out_ = out[0];
    if (error != 0) throw std::runtime_error("posix_spawn");
  }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;
  ~Peer() {
    signal(SIGKILL);
    if (pid_ > 0) wait();
    ::close(in_);
    ::close(out_);
  }

  void signal(int number) const {
    if (pid_ > 0) ::kill(pid_, number);
  }
  /// The exit status as of waitpid().
  int wait() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }
  std::string read_line() const {
    std::string line;
    for (char c = 0; ::read(out_, &c, 1) == 1 && c != '\n';) line.push_back(c);
    return line;
  }

 private:
  pid_t pid_ = -1;
  int in_ = -1;
  int out_ = -1;
};

}  // namespace kvern
