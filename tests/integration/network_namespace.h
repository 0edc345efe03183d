#pragma once

#include <unistd.h>

#include <string>
#include <vector>

#include "tests/integration/child_process.h"

namespace kvern::testing {

/// Another host: a network namespace that a pair of virtual devices joins to this one. Needs root. Goes with its owner.
class NetworkNamespace {
 public:
  NetworkNamespace() {
    ready_ = ip({"netns", "add", name_}) &&
             ip({"link", "add", device_, "type", "veth", "peer", "name", "eth0", "netns", name_}) &&
             ip({"addr", "add", network_ + ".1/30", "dev", device_}) && ip({"link", "set", device_, "up"}) &&
             ip({"-n", name_, "addr", "add", address() + "/30", "dev", "eth0"}) && connect();
  }
  NetworkNamespace(const NetworkNamespace&) = delete;
  NetworkNamespace& operator=(const NetworkNamespace&) = delete;
  ~NetworkNamespace() {
    ip({"link", "del", device_});
    ip({"netns", "del", name_});
  }
  bool ready() const { return ready_; }
  std::string address() const { return network_ + ".2"; }

  /// From here on packets vanish, and nobody is told.
  bool cut() const { return ip({"-n", name_, "link", "set", "eth0", "down"}); }
  bool connect() const { return ip({"-n", name_, "link", "set", "eth0", "up"}); }

  /// The command as one that runs there.
  std::vector<std::string> inside(std::vector<std::string> command) const {
    command.insert(command.begin(), {IP_PATH, "netns", "exec", name_});
    return command;
  }

 private:
  static bool ip(std::vector<std::string> words) {
    words.insert(words.begin(), IP_PATH);
    return ChildProcess(std::move(words)).wait() == 0;
  }

  const std::string number_ = std::to_string(::getpid() % 60000);
  const std::string name_ = "kvern-test-" + number_;
  const std::string device_ = "kvt" + number_;
  // 198.18.0.0/15 is for tests of networks.
  const std::string network_ = "198.18." + std::to_string(::getpid() % 250);
  bool ready_ = false;
};

}  // namespace kvern::testing
