#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/integration/child_process.h"
#include "tests/integration/temporary_folder.h"

namespace kvern::testing {

inline std::uint16_t free_port() {
  const UniqueFd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) return 0;
  ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &length);
  return ntohs(address.sin_port);
}

/// A real redis-server on the loopback device that keeps nothing on disk.
class RedisServer {
 public:
  explicit RedisServer(std::vector<std::string> options = {}, std::uint16_t port = free_port()) : port_(port) {
    std::vector<std::string> command{
        REDIS_SERVER_PATH, "--bind", "127.0.0.1",    "--port", std::to_string(port_), "--dir", folder_.path(),
        "--save",          "",       "--appendonly", "no"};
    command.insert(command.end(), options.begin(), options.end());
    process_ = std::make_unique<ChildProcess>(std::move(command));
    ready_ = process_->says("Ready to accept connections");
  }
  bool ready() const { return ready_; }
  std::uint16_t port() const { return port_; }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  ChildProcess& process() { return *process_; }

  /// What redis-cli prints.
  std::string cli(std::vector<std::string> words) const {
    std::vector<std::string> command{REDIS_CLI_PATH, "-h", "127.0.0.1", "-p", std::to_string(port_)};
    command.insert(command.end(), words.begin(), words.end());
    ChildProcess child(std::move(command));
    child.wait();
    return child.text();
  }

 private:
  TemporaryFolder folder_;
  const std::uint16_t port_;
  std::unique_ptr<ChildProcess> process_;
  bool ready_ = false;
};

/// Masters, each with so many replicas.
class RedisClusterServers {
 public:
  explicit RedisClusterServers(std::size_t masters, std::size_t replicas_each = 0) {
    for (std::size_t i = 0; i < masters * (1 + replicas_each); ++i) {
      servers_.push_back(std::make_unique<RedisServer>(
          std::vector<std::string>{"--cluster-enabled", "yes", "--cluster-port", std::to_string(free_port()),
                                   "--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0"}));
    }
    std::vector<std::string> command{REDIS_CLI_PATH, "--cluster", "create"};
    for (const auto& server : servers_) command.push_back(server->address());
    command.insert(command.end(), {"--cluster-replicas", std::to_string(replicas_each), "--cluster-yes"});
    ChildProcess create(std::move(command));
    ready_ = create.wait() == 0 && create.text().find("All 16384 slots covered") != std::string::npos;
    text_ = create.text();
    for (std::size_t i = 0; i < servers_.size() && ready_; ++i) ready_ = agrees(*servers_[i], masters * replicas_each);
  }
  bool ready() const { return ready_; }
  const std::string& text() const { return text_; }
  RedisServer& server(std::size_t i) { return *servers_[i]; }
  std::size_t size() const { return servers_.size(); }
  /// Of the server that listens there.
  RedisServer* at(std::uint16_t port) {
    for (const auto& server : servers_) {
      if (server->port() == port) return server.get();
    }
    return nullptr;
  }

 private:
  // Each node has to learn by itself that all slots are served, and who is whose replica.
  static bool agrees(const RedisServer& server, std::size_t replicas) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (std::chrono::steady_clock::now() < deadline) {
      const std::string nodes = server.cli({"CLUSTER", "NODES"});
      std::size_t seen = 0;
      for (auto at = nodes.find("slave "); at != std::string::npos; at = nodes.find("slave ", at + 1)) ++seen;
      const bool linked = server.cli({"INFO", "replication"}).find("master_link_status:down") == std::string::npos;
      const bool ok = server.cli({"CLUSTER", "INFO"}).find("cluster_state:ok") != std::string::npos;
      if (ok && linked && seen == replicas) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }

  std::vector<std::unique_ptr<RedisServer>> servers_;
  bool ready_ = false;
  std::string text_;
};

}  // namespace kvern::testing
