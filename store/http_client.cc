#include "store/http_client.h"

#include <curl/curl.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace kvern {
namespace {

constexpr std::size_t kMaxText = 4U << 20;  // a list of a thousand keys has 0.4 MB
constexpr std::size_t kMaxHeaders = 256;
constexpr long kReceiveBuffer = 512L << 10;  // libcurl's largest
constexpr long kSendBuffer = 1L << 20;       // 64 KiB by default, which costs a third of the speed on loopback

long milliseconds(std::int64_t ns) { return static_cast<long>(std::max<std::int64_t>(1, ns / 1'000'000)); }

/// Of the other side, or of what this side trusts: to ask again does not help.
bool is_distrust(CURLcode code) {
  return code == CURLE_PEER_FAILED_VERIFICATION || code == CURLE_SSL_CACERT_BADFILE || code == CURLE_SSL_CERTPROBLEM ||
         code == CURLE_SSL_ISSUER_ERROR;
}

void start_curl() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (::curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK) throw std::runtime_error("libcurl does not start");
  });
}

}  // namespace

std::string_view HttpResponse::header(const std::string& name) const {
  const auto found = headers.find(name);
  return found == headers.end() ? std::string_view() : std::string_view(found->second);
}

/// libcurl's handle and the functions that it calls.
struct HttpClient::Curl {
  CURLM* multi = nullptr;

  static int on_socket(CURL*, curl_socket_t fd, int what, void* client, void*) {
    static_cast<HttpClient*>(client)->on_socket(fd, what);
    return 0;
  }
  static int on_timer(CURLM*, long timeout_ms, void* client) {
    static_cast<HttpClient*>(client)->on_timer(timeout_ms);
    return 0;
  }
};

struct HttpClient::Exchange {
  const std::uint64_t id;
  HttpRequest request;
  Done done;
  CURL* easy = nullptr;
  curl_slist* headers = nullptr;
  std::size_t body_part = 0, body_offset = 0;
  HttpResponse response = {};
  char error[CURL_ERROR_SIZE] = {};

  Exchange(std::uint64_t name, HttpRequest what, Done told)
      : id(name), request(std::move(what)), done(std::move(told)) {}
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;
  ~Exchange() {
    ::curl_slist_free_all(headers);
    ::curl_easy_cleanup(easy);
  }

  static std::size_t on_send(char* to, std::size_t size, std::size_t count, void* self) {
    auto& exchange = *static_cast<Exchange*>(self);
    const std::size_t room = size * count;
    std::size_t filled = 0;
    while (filled < room && exchange.body_part < exchange.request.body.size()) {
      const auto part = exchange.request.body[exchange.body_part].subspan(exchange.body_offset);
      const std::size_t bytes = std::min(room - filled, part.size());
      std::memcpy(to + filled, part.data(), bytes);
      filled += bytes;
      exchange.body_offset += bytes;
      if (bytes < part.size()) break;
      ++exchange.body_part;
      exchange.body_offset = 0;
    }
    return filled;
  }

  /// Back to the start, when a kept connection turns out to be dead.
  static int on_seek(void* self, curl_off_t offset, int origin) {
    if (offset != 0 || origin != SEEK_SET) return CURL_SEEKFUNC_CANTSEEK;
    auto& exchange = *static_cast<Exchange*>(self);
    exchange.body_part = exchange.body_offset = 0;
    return CURL_SEEKFUNC_OK;
  }

  static std::size_t on_header(char* data, std::size_t size, std::size_t count, void* self) {
    auto& response = static_cast<Exchange*>(self)->response;
    const std::string_view line(data, size * count);
    if (line.starts_with("HTTP/")) {  // of an interim answer (100 Continue), or of the real one
      response.headers.clear();
      return line.size();
    }
    const std::size_t colon = line.find(':');
    if (colon == std::string_view::npos || response.headers.size() == kMaxHeaders) return line.size();
    std::string name(line.substr(0, colon));
    std::ranges::transform(name, name.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    std::string_view value = line.substr(colon + 1);
    while (!value.empty() && std::isspace(static_cast<unsigned char>(value.front())) != 0) value.remove_prefix(1);
    while (!value.empty() && std::isspace(static_cast<unsigned char>(value.back())) != 0) value.remove_suffix(1);
    response.headers[std::move(name)] = value;
    return line.size();
  }

  static std::size_t on_receive(char* data, std::size_t size, std::size_t count, void* self) {
    auto& exchange = *static_cast<Exchange*>(self);
    HttpResponse& response = exchange.response;
    const std::size_t bytes = size * count;
    long status = 0;
    ::curl_easy_getinfo(exchange.easy, CURLINFO_RESPONSE_CODE, &status);
    constexpr std::size_t kRefused = 0;  // ends the exchange with CURLE_WRITE_ERROR
    if (status / 100 == 2 && !exchange.request.into.empty()) {
      const auto room = exchange.request.into.subspan(response.received_in_place);
      if (bytes > room.size()) return kRefused;
      std::memcpy(room.data(), data, bytes);
      response.received_in_place += bytes;
      return bytes;
    }
    if (bytes > kMaxText - response.text.size()) return kRefused;
    response.text.append(data, bytes);
    return bytes;
  }
};

HttpClient::HttpClient(EventLoop& loop, HttpSettings settings) : loop_(loop), settings_(std::move(settings)) {
  start_curl();
  curl_ = std::make_unique<Curl>();
  curl_->multi = ::curl_multi_init();
  if (curl_->multi == nullptr) throw std::runtime_error("libcurl gives no handle");
  const auto connections = static_cast<long>(settings_.max_connections);
  ::curl_multi_setopt(curl_->multi, CURLMOPT_SOCKETFUNCTION, &Curl::on_socket);
  ::curl_multi_setopt(curl_->multi, CURLMOPT_SOCKETDATA, this);
  ::curl_multi_setopt(curl_->multi, CURLMOPT_TIMERFUNCTION, &Curl::on_timer);
  ::curl_multi_setopt(curl_->multi, CURLMOPT_TIMERDATA, this);
  ::curl_multi_setopt(curl_->multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, connections);
  ::curl_multi_setopt(curl_->multi, CURLMOPT_MAXCONNECTS, connections);
}

HttpClient::~HttpClient() {
  auto exchanges = std::exchange(exchanges_, {});
  for (const auto& [id, exchange] : exchanges) ::curl_multi_remove_handle(curl_->multi, exchange->easy);
  ::curl_multi_cleanup(curl_->multi);
  if (timer_ != 0) loop_.cancel(timer_);
  for (const auto& [fd, watch] : watches_) loop_.unwatch(watch);
  for (const auto& [id, exchange] : exchanges) exchange->done(failure(Code::kUnavailable, "the tier is closing"));
}

std::uint64_t HttpClient::execute(HttpRequest request, Done done) {
  const std::uint64_t id = next_id_++;
  auto exchange = std::make_unique<Exchange>(id, std::move(request), std::move(done));
  CURL* easy = exchange->easy = ::curl_easy_init();
  if (easy == nullptr) throw std::bad_alloc();
  for (const auto& header : exchange->request.headers) {
    exchange->headers = ::curl_slist_append(exchange->headers, header.c_str());
  }
  exchange->headers = ::curl_slist_append(exchange->headers, "Expect:");  // the round trip costs more than it saves
  const auto& asked = exchange->request;
  ::curl_easy_setopt(easy, CURLOPT_PRIVATE, exchange.get());
  ::curl_easy_setopt(easy, CURLOPT_URL, asked.url.c_str());
  ::curl_easy_setopt(easy, CURLOPT_PATH_AS_IS, 1L);
  ::curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
  ::curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_1_1));
  ::curl_easy_setopt(easy, CURLOPT_PROXY, settings_.proxy.c_str());
  ::curl_easy_setopt(easy, CURLOPT_SSLVERSION, static_cast<long>(CURL_SSLVERSION_TLSv1_2));
  if (!settings_.ca_file.empty()) ::curl_easy_setopt(easy, CURLOPT_CAINFO, settings_.ca_file.c_str());
  ::curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
  ::curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
  ::curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, milliseconds(settings_.connect_timeout_ns));
  ::curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, milliseconds(asked.timeout_ns));
  ::curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, kReceiveBuffer);
  ::curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, exchange->error);
  ::curl_easy_setopt(easy, CURLOPT_HTTPHEADER, exchange->headers);
  ::curl_easy_setopt(easy, CURLOPT_HEADERFUNCTION, &Exchange::on_header);
  ::curl_easy_setopt(easy, CURLOPT_HEADERDATA, exchange.get());
  ::curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, &Exchange::on_receive);
  ::curl_easy_setopt(easy, CURLOPT_WRITEDATA, exchange.get());
  if (asked.method == "HEAD") {
    ::curl_easy_setopt(easy, CURLOPT_NOBODY, 1L);
  } else if (asked.method == "PUT" || asked.method == "POST") {
    ::curl_easy_setopt(easy, CURLOPT_UPLOAD, 1L);
    ::curl_easy_setopt(easy, CURLOPT_UPLOAD_BUFFERSIZE, kSendBuffer);
    ::curl_easy_setopt(easy, CURLOPT_INFILESIZE_LARGE, static_cast<curl_off_t>(bytes_of(asked.body)));
    ::curl_easy_setopt(easy, CURLOPT_READFUNCTION, &Exchange::on_send);
    ::curl_easy_setopt(easy, CURLOPT_READDATA, exchange.get());
    ::curl_easy_setopt(easy, CURLOPT_SEEKFUNCTION, &Exchange::on_seek);
    ::curl_easy_setopt(easy, CURLOPT_SEEKDATA, exchange.get());
    if (asked.method == "POST") ::curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, "POST");
  } else if (asked.method != "GET") {
    ::curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, asked.method.c_str());
  }
  exchanges_.emplace(id, std::move(exchange));
  ::curl_multi_add_handle(curl_->multi, easy);
  return id;
}

void HttpClient::cancel(std::uint64_t exchange) {
  const auto found = exchanges_.find(exchange);
  if (found == exchanges_.end()) return;
  ::curl_multi_remove_handle(curl_->multi, found->second->easy);
  exchanges_.erase(found);
}

void HttpClient::on_socket(int fd, int what) {
  const auto watch = watches_.find(fd);
  if (what == CURL_POLL_REMOVE) {
    if (watch == watches_.end()) return;
    loop_.unwatch(watch->second);
    watches_.erase(watch);
    return;
  }
  const std::uint32_t events = ((what & CURL_POLL_IN) != 0 ? static_cast<std::uint32_t>(EPOLLIN) : 0U) |
                               ((what & CURL_POLL_OUT) != 0 ? static_cast<std::uint32_t>(EPOLLOUT) : 0U);
  if (watch != watches_.end()) return loop_.rewatch(watch->second, events);
  watches_.emplace(fd, loop_.watch(fd, events, [this, fd](std::uint32_t ready) {
    int action = 0;
    if ((ready & EPOLLIN) != 0) action |= CURL_CSELECT_IN;
    if ((ready & EPOLLOUT) != 0) action |= CURL_CSELECT_OUT;
    if ((ready & (EPOLLERR | EPOLLHUP)) != 0) action |= CURL_CSELECT_ERR;
    act(fd, action);
  }));
}

void HttpClient::on_timer(std::int64_t timeout_ms) {
  if (timer_ != 0) loop_.cancel(std::exchange(timer_, 0));
  if (timeout_ms < 0) return;
  timer_ = loop_.at(loop_.now_ns() + std::max<std::int64_t>(timeout_ms, 0) * 1'000'000, [this] {
    timer_ = 0;
    act(CURL_SOCKET_TIMEOUT, 0);
  });
}

void HttpClient::act(int fd, int events) {
  int running = 0;
  ::curl_multi_socket_action(curl_->multi, fd, events, &running);
  collect();
}

void HttpClient::collect() {
  int left = 0;
  while (const CURLMsg* message = ::curl_multi_info_read(curl_->multi, &left)) {
    if (message->msg != CURLMSG_DONE) continue;
    const CURLcode code = message->data.result;
    char* private_data = nullptr;
    long status = 0;
    ::curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &private_data);
    ::curl_easy_getinfo(message->easy_handle, CURLINFO_RESPONSE_CODE, &status);
    ::curl_multi_remove_handle(curl_->multi, message->easy_handle);
    auto ended = exchanges_.extract(reinterpret_cast<Exchange*>(private_data)->id);
    auto& exchange = *ended.mapped();
    exchange.response.status = static_cast<int>(status);
    if (code == CURLE_OK) {
      exchange.done(std::move(exchange.response));
    } else {
      const std::string why = exchange.error[0] != '\0' ? exchange.error : ::curl_easy_strerror(code);
      exchange.done(failure(is_distrust(code) ? Code::kRefused : Code::kUnavailable, why));
    }
  }
}

}  // namespace kvern
