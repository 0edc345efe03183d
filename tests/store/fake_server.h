#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace kvern::testing {

/// One accepted connection. All calls block, and fail once the server stops.
class FakeConnection {
 public:
  explicit FakeConnection(int fd) : fd_(fd) {
    const int on = 1;
    ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  FakeConnection(const FakeConnection&) = delete;
  FakeConnection& operator=(const FakeConnection&) = delete;
  ~FakeConnection() { ::close(fd_); }

  std::optional<std::string> read_exact(std::size_t bytes) {
    while (buffer_.size() < bytes) {
      if (!fill()) return std::nullopt;
    }
    std::string text = buffer_.substr(0, bytes);
    buffer_.erase(0, bytes);
    return text;
  }
  /// Without its CRLF.
  std::optional<std::string> read_line() {
    std::size_t end = 0;
    while ((end = buffer_.find("\r\n")) == std::string::npos) {
      if (!fill()) return std::nullopt;
    }
    std::string line = buffer_.substr(0, end);
    buffer_.erase(0, end + 2);
    return line;
  }
  void send(std::string_view text) const {
    while (!text.empty()) {
      const ssize_t sent = ::send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
      if (sent <= 0) return;
      text.remove_prefix(static_cast<std::size_t>(sent));
    }
  }
  /// Says nothing until the other side, or the server, ends it.
  void stall() {
    while (fill()) {
    }
  }
  void shut_down() const { ::shutdown(fd_, SHUT_RDWR); }

 private:
  bool fill() {
    char bytes[16384];
    const ssize_t received = ::recv(fd_, bytes, sizeof bytes, 0);
    if (received <= 0) return false;
    buffer_.append(bytes, static_cast<std::size_t>(received));
    return true;
  }

  const int fd_;
  std::string buffer_;
};

/// A TCP server on the loopback device that does what a test wants it to, a thread for each connection.
class FakeServer {
 public:
  using Handler = std::function<void(FakeConnection&)>;

  explicit FakeServer(Handler handler) : handler_(std::move(handler)) {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    if (::bind(listener_, reinterpret_cast<sockaddr*>(&address), length) != 0 || ::listen(listener_, 64) != 0) {
      throw std::system_error(errno, std::generic_category(), "no port for a server");
    }
    ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length);
    port_ = ntohs(address.sin_port);
    acceptor_ = std::thread([this] { accept(); });
  }
  FakeServer(const FakeServer&) = delete;
  FakeServer& operator=(const FakeServer&) = delete;
  ~FakeServer() {
    ::shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    ::close(listener_);
    {
      std::lock_guard lock(mutex_);
      for (auto& each : connections_) each.shut_down();
    }
    for (auto& thread : threads_) thread.join();
  }

  std::uint16_t port() const { return port_; }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }

 private:
  void accept() {
    while (true) {
      const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) return;
      std::lock_guard lock(mutex_);
      FakeConnection& connection = connections_.emplace_back(fd);
      threads_.emplace_back([this, &connection] {
        handler_(connection);
        connection.shut_down();
      });
    }
  }

  const Handler handler_;
  int listener_ = -1;
  std::uint16_t port_ = 0;
  std::mutex mutex_;
  std::list<FakeConnection> connections_;  ///< kept until the end, so that no descriptor is used twice
  std::vector<std::thread> threads_;
  std::thread acceptor_;
};

/// Speaks RESP: greets, knows CLUSTER SLOTS, and leaves the rest to the test.
class FakeRedis {
 public:
  using Command = std::vector<std::string>;
  /// What to send; nullopt: cut the connection.
  using Answer = std::function<std::optional<std::string>(const Command&)>;

  explicit FakeRedis(Answer answer) : answer_(std::move(answer)), server_([this](FakeConnection& c) { serve(c); }) {}

  std::uint16_t port() const { return server_.port(); }
  std::string address() const { return server_.address(); }
  std::size_t count(const std::string& name) const {
    std::lock_guard lock(mutex_);
    std::size_t found = 0;
    for (const auto& command : seen_) found += command.front() == name ? 1U : 0U;
    return found;
  }
  std::vector<Command> seen() const {
    std::lock_guard lock(mutex_);
    return seen_;
  }

  static std::optional<Command> read_command(FakeConnection& connection) {
    const auto count = connection.read_line();
    if (!count || count->empty() || count->front() != '*') return std::nullopt;
    Command command;
    for (int i = std::stoi(count->substr(1)); i > 0; --i) {
      const auto length = connection.read_line();
      if (!length) return std::nullopt;
      auto argument = connection.read_exact(std::stoul(length->substr(1)) + 2);
      if (!argument) return std::nullopt;
      argument->resize(argument->size() - 2);
      command.push_back(std::move(*argument));
    }
    return command;
  }
  static std::string bulk(std::string_view text) {
    return "$" + std::to_string(text.size()) + "\r\n" + std::string(text) + "\r\n";
  }

 private:
  void serve(FakeConnection& connection) {
    while (auto command = read_command(connection)) {
      {
        std::lock_guard lock(mutex_);
        seen_.push_back(*command);
      }
      std::optional<std::string> answer = answer_(*command);
      if (!answer) return;
      if (answer->empty()) {
        if (command->front() == "PING") {
          answer = "+PONG\r\n";
        } else if (command->front() == "CLUSTER") {
          answer = "*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n" + bulk("127.0.0.1") + ":" + std::to_string(port()) + "\r\n";
        } else {
          answer = "$-1\r\n";
        }
      }
      if (*answer == kStall) return connection.stall();
      connection.send(*answer);
    }
  }

  const Answer answer_;
  mutable std::mutex mutex_;
  std::vector<Command> seen_;

 public:
  /// An answer that never comes.
  static constexpr std::string_view kStall = "stall";

 private:
  FakeServer server_;
};

/// Speaks HTTP/1.1 and leaves the answers to the test.
class FakeHttp {
 public:
  struct Request {
    std::string line;  ///< "GET /bucket/key HTTP/1.1"
    std::vector<std::string> headers;
    std::string body;
    std::string header(std::string_view name) const {
      for (const auto& header : headers) {
        if (header.size() > name.size() && header.starts_with(name) && header[name.size()] == ':') {
          return header.substr(name.size() + 2);
        }
      }
      return {};
    }
  };
  /// Everything to send; a text that is not a whole answer cuts the connection after it.
  struct Answer {
    std::string text;
    bool cut = false;
    bool stall = false;
  };

  explicit FakeHttp(std::function<Answer(const Request&)> answer)
      : answer_(std::move(answer)), server_([this](FakeConnection& c) { serve(c); }) {}

  std::uint16_t port() const { return server_.port(); }
  std::vector<Request> seen() const {
    std::lock_guard lock(mutex_);
    return seen_;
  }
  static std::string respond(const std::string& status, std::string_view body = "", const std::string& headers = "") {
    return "HTTP/1.1 " + status + "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n" + headers + "\r\n" +
           std::string(body);
  }

 private:
  void serve(FakeConnection& connection) {
    while (auto line = connection.read_line()) {
      Request request{.line = std::move(*line), .headers = {}, .body = {}};
      while (auto header = connection.read_line()) {
        if (header->empty()) break;
        request.headers.push_back(std::move(*header));
      }
      if (const auto length = request.header("Content-Length"); !length.empty()) {
        auto body = connection.read_exact(std::stoul(length));
        if (!body) return;
        request.body = std::move(*body);
      }
      {
        std::lock_guard lock(mutex_);
        seen_.push_back(request);
      }
      const Answer answer = answer_(request);
      if (answer.stall) return connection.stall();
      connection.send(answer.text);
      if (answer.cut) return;
    }
  }

  const std::function<Answer(const Request&)> answer_;
  mutable std::mutex mutex_;
  std::vector<Request> seen_;
  FakeServer server_;
};

}  // namespace kvern::testing
