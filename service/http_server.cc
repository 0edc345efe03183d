#include "service/http_server.h"

#include <civetweb.h>

#include <mutex>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace kvern {
namespace {

// One scraper, and one more that asks while the first is slow.
constexpr const char* kThreads = "2";
constexpr const char* kRequestTimeoutMs = "5000";
constexpr const char* kQueuedConnections = "20";

const char* reason_of(int status) { return status == 200 ? "OK" : status == 404 ? "Not Found" : "Service Unavailable"; }

std::string listening_ports(std::string listen) {
  if (listen.starts_with("*:")) listen.replace(0, 1, "0.0.0.0");
  return listen;
}

}  // namespace

struct HttpServer::State {
  Pages pages;
  std::string problem;  ///< what the library said last
  mg_context* context = nullptr;

  static int serve(mg_connection* connection, void* data) {
    const auto& state = *static_cast<State*>(data);
    const mg_request_info* request = mg_get_request_info(connection);
    const auto page = state.pages.find(std::string_view(request->local_uri));
    const HttpAnswer answer =
        page == state.pages.end() ? HttpAnswer{.status = 404, .body = "not found\n"} : page->second();
    const bool head_only = std::string_view(request->request_method) == "HEAD";
    mg_printf(connection,
              "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\nCache-Control: no-store\r\n\r\n",
              answer.status, reason_of(answer.status), answer.content_type.c_str(), answer.body.size());
    if (!head_only) mg_write(connection, answer.body.data(), answer.body.size());
    return answer.status;
  }

  static int note(const mg_connection* connection, const char* message) {
    auto* state = static_cast<State*>(mg_get_user_data(mg_get_context(connection)));
    if (state != nullptr && state->context == nullptr) state->problem = message;
    return 1;
  }
};

HttpServer::HttpServer(const std::string& listen, Pages pages) : state_(std::make_unique<State>()) {
  static std::once_flag once;
  std::call_once(once, [] { mg_init_library(MG_FEATURES_DEFAULT); });
  state_->pages = std::move(pages);
  const std::string ports = listening_ports(listen);
  const char* options[] = {"listening_ports",
                           ports.c_str(),
                           "num_threads",
                           kThreads,
                           "request_timeout_ms",
                           kRequestTimeoutMs,
                           "connection_queue",
                           kQueuedConnections,
                           "enable_keep_alive",
                           "yes",
                           "keep_alive_timeout_ms",
                           "500",
                           nullptr};
  mg_callbacks callbacks{};
  callbacks.log_message = &State::note;
  state_->context = mg_start(&callbacks, state_.get(), options);
  if (state_->context == nullptr) {
    throw std::runtime_error("cannot listen on " + listen + " ([metrics] listen)" +
                             (state_->problem.empty() ? "" : ": " + state_->problem));
  }
  mg_set_request_handler(state_->context, "**", &State::serve, state_.get());
}

HttpServer::~HttpServer() { mg_stop(state_->context); }

std::uint16_t HttpServer::port() const {
  mg_server_port ports[1] = {};
  return mg_get_server_ports(state_->context, 1, ports) == 1 ? static_cast<std::uint16_t>(ports[0].port) : 0;
}

}  // namespace kvern
