// Rings and admission between real processes, some of which die or misbehave.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "tests/transport/test_daemon.h"

namespace kvern {
namespace {

using ::testing::StartsWith;
using testing::TestClient;
using testing::TestDaemon;

/// A child process with pipes on its standard input and output. Killed and reaped at the end.
class Process {
 public:
  explicit Process(std::vector<std::string> arguments) {
    int in[2];
    int out[2];
    EXPECT_EQ(::pipe2(in, O_CLOEXEC), 0);
    EXPECT_EQ(::pipe2(out, O_CLOEXEC), 0);
    input_ = UniqueFd(in[1]);
    output_ = UniqueFd(out[0]);
    const UniqueFd child_input(in[0]);
    const UniqueFd child_output(out[1]);
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
    ::posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    std::vector<char*> argv;
    for (auto& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    EXPECT_EQ(::posix_spawnp(&pid_, argv[0], &actions, nullptr, argv.data(), environ), 0);
    ::posix_spawn_file_actions_destroy(&actions);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    if (pid_ <= 0) return;
    signal(SIGKILL);
    wait();
  }

  pid_t pid() const { return pid_; }
  void signal(int number) const { ::kill(pid_, number); }
  /// Exit code, or 128 + the signal that ended it.
  int wait() {
    int status = 0;
    ::waitpid(std::exchange(pid_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  std::string read_line() const {
    std::string line;
    char byte = 0;
    while (::read(output_.get(), &byte, 1) == 1 && byte != '\n') line.push_back(byte);
    return line;
  }
  void write_byte() const { EXPECT_EQ(::write(input_.get(), "\n", 1), 1); }
  void close_input() { input_ = UniqueFd(); }

 private:
  pid_t pid_ = -1;
  UniqueFd input_;
  UniqueFd output_;
};

class Processes : public ::testing::Test {
 protected:
  Processes() {
    std::string pattern = "/tmp/kvern-processes-XXXXXX";
    directory_ = ::mkdtemp(pattern.data());
    path_ = directory_ + "/admission.sock";
  }
  ~Processes() override { std::filesystem::remove_all(directory_); }

  std::vector<std::string> peer(const std::string& role, int argument = 0) const {
    return {KVERN_PEER_PROCESS, role, path_, std::to_string(argument)};
  }

  std::string directory_;
  std::string path_;
};

TEST_F(Processes, TalkAndPartInPeace) {
  TestDaemon daemon(path_);
  Process first(peer("ping", 2000));
  Process second(peer("ping", 2000));
  EXPECT_EQ(first.wait(), 0);
  EXPECT_EQ(second.wait(), 0);
  EXPECT_TRUE(daemon.wait_for_closed(2));
  EXPECT_EQ(daemon.errors(), 0u);
}

TEST_F(Processes, ClientKilledWhilePushingLeavesNothingTorn) {
  TestDaemon daemon(path_);
  for (std::size_t round = 1; round <= 20; ++round) {
    Process client(peer("push"));
    ASSERT_EQ(client.read_line(), "ready");
    ASSERT_TRUE(daemon.wait_for_handled(daemon.last_session(), 3 * round));
    client.signal(SIGKILL);
    EXPECT_EQ(client.wait(), 128 + SIGKILL);
    ASSERT_TRUE(daemon.wait_for_closed(round));
  }
  EXPECT_EQ(daemon.torn(), 0u);
  EXPECT_EQ(daemon.errors(), 0u);
}

TEST_F(Processes, EndOfAClientIsNoticedThoughItsChildHoldsTheConnection) {
  TestDaemon daemon(path_);
  Process client(peer("hold"));
  ASSERT_EQ(client.read_line(), "ready");
  const auto peers = daemon.take_peers();
  ASSERT_EQ(peers.size(), 1u);
  EXPECT_EQ(peers[0].pid, client.pid());
  ASSERT_TRUE(peers[0].pidfd);
  EXPECT_EQ(daemon.closed_connections(), 0u);
  client.signal(SIGKILL);
  EXPECT_TRUE(daemon.wait_for_closed(1));
  pollfd ended{.fd = peers[0].pidfd.get(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(::poll(&ended, 1, 0), 1);
  client.wait();
  client.close_input();  // ends the child
}

TEST_F(Processes, NoiseInOneSegmentDisturbsNobodyElse) {
  TestDaemon daemon(path_);
  auto good = TestClient::connect(path_);
  ASSERT_TRUE(good) << good.error().to_string();
  for (int seed = 1; seed <= 5; ++seed) {
    Process bad(peer("scribble", seed));
    for (int i = 0; i < 200; ++i) {
      const Status status = good->echo("undisturbed");
      ASSERT_TRUE(status.is_ok()) << status.to_string();
    }
    EXPECT_EQ(bad.wait(), 0);
    ASSERT_TRUE(daemon.wait_for_closed(static_cast<std::size_t>(seed)));
  }
  EXPECT_LE(daemon.errors(), 5u);
  EXPECT_TRUE(good->echo("and at the end").is_ok());
}

TEST_F(Processes, StoppedClientGoesOnWhereItWas) {
  TestDaemon daemon(path_);
  auto other = TestClient::connect(path_);
  ASSERT_TRUE(other);
  const std::uint64_t first = daemon.last_session();
  Process client(peer("ping", 20000));
  ASSERT_TRUE(daemon.wait_for_handled(daemon.last_session_after(first), 100));
  client.signal(SIGSTOP);
  for (int i = 0; i < 500; ++i) ASSERT_TRUE(other->echo("meanwhile").is_ok());
  client.signal(SIGCONT);
  EXPECT_EQ(client.wait(), 0);
  EXPECT_EQ(daemon.errors(), 0u);
}

TEST_F(Processes, WaitsEndWhenTheDaemonIsKilled) {
  Process daemon(peer("daemon"));
  ASSERT_EQ(daemon.read_line(), "ready");
  auto client = TestClient::connect(path_);
  ASSERT_TRUE(client) << client.error().to_string();
  ASSERT_TRUE(client->echo("alive").is_ok());
  std::thread watcher([&] {  // as the owner of a session does
    pollfd connection{.fd = client->session.connection.get(), .events = POLLIN, .revents = 0};
    ::poll(&connection, 1, -1);
    client->channel->close();
  });
  std::vector<std::thread> callers;
  std::vector<Code> codes(4, Code::kOk);
  for (Code& code : codes) {
    callers.emplace_back([&] {
      wire::HotRequest request;
      request.mutable_fetch();  // never answered
      wire::HotReply reply;
      code = client->channel->call(request, &reply, std::chrono::hours(1)).code();
    });
  }
  ASSERT_TRUE(client->echo("the others are under way").is_ok());
  daemon.signal(SIGKILL);
  for (auto& caller : callers) caller.join();
  watcher.join();
  EXPECT_THAT(codes, ::testing::Each(Code::kUnavailable));
  EXPECT_FALSE(client->channel->alive());
  daemon.wait();
  EXPECT_EQ(TestClient::connect(path_).error().code(), Code::kUnavailable);
  Process next(peer("daemon"));  // over the socket file that the killed one left
  ASSERT_EQ(next.read_line(), "ready");
  auto again = TestClient::connect(path_);
  ASSERT_TRUE(again) << again.error().to_string();
  EXPECT_TRUE(again->echo("back").is_ok());
}

TEST_F(Processes, PeerOutsideThePidNamespaceOfTheDaemonIsServed) {
  std::vector<std::string> command = {"unshare", "--pid", "--fork", "--kill-child"};
  for (const auto& part : peer("daemon")) command.push_back(part);
  Process daemon(command);
  if (daemon.read_line() != "ready") GTEST_SKIP() << "no permission to make a PID namespace";
  auto client = TestClient::connect(path_);
  ASSERT_TRUE(client) << client.error().to_string();
  EXPECT_TRUE(client->echo("from outside").is_ok());
  daemon.write_byte();
  EXPECT_THAT(daemon.read_line(), StartsWith("pid 0 "));
  daemon.close_input();
  EXPECT_EQ(daemon.wait(), 0);
}

}  // namespace
}  // namespace kvern
