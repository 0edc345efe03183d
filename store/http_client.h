#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "store/byte_parts.h"
#include "store/event_loop.h"

namespace kvern {

struct HttpRequest {
  std::string method;  ///< GET, HEAD, PUT, POST, DELETE
  std::string url;
  std::vector<std::string> headers;  ///< "Name: value"
  ByteParts body = {};
  std::shared_ptr<const void> hold = {};  ///< keeps the body
  /// Where the body of a successful answer goes; a longer one is an error. Other bodies become text.
  std::span<std::byte> into = {};
  std::int64_t timeout_ns = 0;  ///< of the whole exchange
};

struct HttpResponse {
  int status = 0;
  std::map<std::string, std::string> headers = {};  ///< names in lower case
  std::string text = {};                            ///< what was not received in place
  std::size_t received_in_place = 0;

  /// Empty when it is not there.
  std::string_view header(const std::string& name) const;
};

struct HttpSettings {
  std::string ca_file;  ///< PEM; empty: the system's certificates
  std::string proxy;    ///< empty: none, whatever the environment says
  std::size_t max_connections = 0;
  std::int64_t connect_timeout_ns = 0;
};

/// HTTP/1.1 by libcurl, on an event loop: connections are kept and used again. Belongs to the loop's thread.
class HttpClient {
 public:
  using Done = std::function<void(Result<HttpResponse>)>;

  /// The loop outlives the client. Throws std::runtime_error when libcurl does not start.
  HttpClient(EventLoop& loop, HttpSettings settings);
  /// Ends what is under way with kUnavailable.
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  /// Names the exchange. done is called once, not from within: an answer of any status, or kUnavailable when there was
  /// none, it was cut off, or it came too late; kRefused where the server's certificate is not to be trusted.
  std::uint64_t execute(HttpRequest request, Done done);
  /// done is not called any more, and nothing is received or sent. Nothing happens to an exchange that has ended.
  void cancel(std::uint64_t exchange);

 private:
  struct Exchange;
  struct Curl;

  void on_socket(int fd, int what);
  void on_timer(std::int64_t timeout_ms);
  void act(int fd, int events);
  void collect();

  EventLoop& loop_;
  const HttpSettings settings_;
  std::unique_ptr<Curl> curl_;
  std::unordered_map<std::uint64_t, std::unique_ptr<Exchange>> exchanges_;
  std::unordered_map<int, std::uint64_t> watches_;  ///< by descriptor
  std::uint64_t timer_ = 0;                         ///< 0: none
  std::uint64_t next_id_ = 1;
};

}  // namespace kvern
