#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

namespace kvern {

struct HttpAnswer {
  int status = 200;
  std::string content_type = "text/plain; charset=utf-8";
  std::string body;
};

/// A few pages for machines (metrics, health), on two threads of its own. Everything else is 404.
class HttpServer {
 public:
  /// By path. Called on the server's threads.
  using Pages = std::map<std::string, std::function<HttpAnswer()>, std::less<>>;

  /// listen: "host:port"; "*" for all addresses, port 0 for one that the system chooses. Throws std::runtime_error when
  /// it cannot listen there.
  HttpServer(const std::string& listen, Pages pages);
  ~HttpServer();
  std::uint16_t port() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvern
