#include "store/redis_connection.h"

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <utility>

namespace kvern {
namespace {

constexpr std::int64_t kFirstRetryNs = 100'000'000;
constexpr std::int64_t kLastRetryNs = 2'000'000'000;  // a node that is back is used again within two seconds
constexpr std::size_t kMaxParts = 256;                // of one send; the system allows 1,024

std::int64_t retry_after(int failures) { return std::min(kFirstRetryNs << std::min(failures - 1, 16), kLastRetryNs); }

constexpr std::size_t kWakeBytes = std::size_t{256} << 10;  // waking up costs as much as copying about so much

constexpr std::string_view kBodyEnd = "\r\n";

std::size_t size_of(const RedisRequest& request) {
  const std::size_t body = request.body.empty() ? 0 : bytes_of(request.body) + kBodyEnd.size();
  return request.head.size() + body;
}

/// Adds the parts of the request from `skip` bytes on, as far as they fit.
void add_parts(const RedisRequest& request, std::size_t skip, std::array<iovec, kMaxParts>& parts, std::size_t& count) {
  const auto add = [&](const void* data, std::size_t bytes) {
    const std::size_t skipped = std::min(skip, bytes);
    skip -= skipped;
    if (skipped == bytes || count == kMaxParts) return;
    parts[count++] = {const_cast<char*>(static_cast<const char*>(data)) + skipped, bytes - skipped};
  };
  add(request.head.data(), request.head.size());
  if (request.body.empty()) return;
  for (const auto& part : request.body) add(part.data(), part.size());
  add(kBodyEnd.data(), kBodyEnd.size());
}

}  // namespace

RedisConnection::RedisConnection(EventLoop& loop, Executor& resolver, const RedisConnectionSettings& settings,
                                 RedisEndpoint endpoint, std::function<void()> on_failure)
    : loop_(loop),
      resolver_(resolver),
      settings_(settings),
      endpoint_(std::move(endpoint)),
      on_failure_(std::move(on_failure)) {}

RedisConnection::~RedisConnection() {
  *alive_ = false;
  disconnect();
  end(std::exchange(queue_, {}), unavailable("is not used any more"));
}

Status RedisConnection::unavailable(const std::string& what) const {
  return {Code::kUnavailable, "Redis node " + endpoint_.to_string() + " " + what};
}

void RedisConnection::submit(std::shared_ptr<RedisBatch> batch) {
  if (failing() && state_ != State::kReady) {
    if (!batch->abandoned) batch->done(failure(last_error_));
    return;
  }
  arm_deadline(batch->deadline_ns);
  queue_.push_back(std::move(batch));
  if (state_ == State::kDown) connect();
  flush_later();
}

void RedisConnection::flush_later() {
  if (flushing_) return;
  flushing_ = true;
  loop_.later([this, alive = alive_] {
    if (!*alive) return;
    flushing_ = false;
    flush();
  });
}

void RedisConnection::connect() {
  state_ = State::kResolving;
  timer_ = loop_.at(loop_.now_ns() + settings_.connect_timeout_ns, [this] {
    timer_.reset();
    fail(unavailable("took too long to connect"));
  });
  if (const auto address = resolve(endpoint_.host, endpoint_.port, true)) return connect_to(address);
  const bool submitted = resolver_.submit([this, alive = alive_, &loop = loop_, endpoint = endpoint_] {
    auto address = resolve(endpoint.host, endpoint.port, false);
    static_cast<void>(loop.post([this, alive, address = std::move(address)] {
      if (*alive && state_ == State::kResolving) connect_to(address);
    }));
  });
  if (!submitted) fail(unavailable("cannot be looked up: too many names are being looked up"));
}

void RedisConnection::connect_to(const Result<SocketAddress>& address) {
  if (!address) return fail(unavailable(address.error().message()));
  auto socket = StreamSocket::connect(*address, settings_.tls, endpoint_.host);
  if (!socket) return fail(unavailable("cannot be reached: " + socket.error().message()));
  socket_ = std::move(*socket);
  state_ = State::kConnecting;
  events_ = EPOLLOUT;
  watch_ = loop_.watch(socket_.fd(), events_, [this](std::uint32_t events) { on_ready(events); });
}

void RedisConnection::want(std::uint32_t events) {
  if (events == events_) return;
  events_ = events;
  loop_.rewatch(*watch_, events);
}

void RedisConnection::on_ready(std::uint32_t events) {
  if (state_ == State::kConnecting) {
    const auto connected = socket_.finish_connect();
    if (!connected) return fail(unavailable("cannot be reached: " + connected.error().message()));
    want(socket_.wants_write() ? EPOLLIN | EPOLLOUT : EPOLLIN);
    if (*connected) greet();
    return;
  }
  if ((events & ~static_cast<std::uint32_t>(EPOLLOUT)) != 0) receive();
  if (state_ != State::kDown && (events & EPOLLOUT) != 0) flush();
}

// Shows who we are, and finds out whether somebody answers at all: a stopped process accepts connections, too.
void RedisConnection::greet() {
  state_ = State::kGreeting;
  const auto requests = std::make_shared<std::vector<RedisRequest>>();
  if (!settings_.password.empty()) {
    requests->push_back(settings_.user.empty() ? redis_command({"AUTH", settings_.password})
                                               : redis_command({"AUTH", settings_.user, settings_.password}));
  }
  requests->push_back(redis_command({"PING"}));
  auto batch = std::make_shared<RedisBatch>();
  for (const auto& request : *requests) batch->requests.push_back(&request);
  batch->hold = requests;
  batch->deadline_ns = loop_.now_ns() + settings_.connect_timeout_ns;
  batch->done = [this](const Result<std::vector<RespValue>>& replies) {
    if (!replies) return;  // the connection is failing already
    for (const auto& reply : *replies) {
      if (reply.is_error()) return fail(unavailable("does not take us: " + reply.text));
    }
    state_ = State::kReady;
    failures_ = 0;
    loop_.cancel(*std::exchange(timer_, std::nullopt));
    flush_later();
  };
  queue_.push_front(std::move(batch));
  flush();
}

void RedisConnection::flush() {
  if (state_ != State::kGreeting && state_ != State::kReady) return;
  const auto limit = [&] { return state_ == State::kGreeting ? 1 : queue_.size(); };
  while (sent_batches_ < limit()) {
    const bool unsent = sent_requests_ == 0 && sent_bytes_ == 0 && !socket_.must_send_again();
    if (unsent && queue_[sent_batches_]->abandoned) {
      queue_.erase(queue_.begin() + static_cast<std::ptrdiff_t>(sent_batches_));
      continue;
    }
    std::array<iovec, kMaxParts> parts;
    std::size_t count = 0;
    std::size_t request = sent_requests_;
    std::size_t skip = sent_bytes_;
    for (std::size_t i = sent_batches_; i < limit() && count < kMaxParts; ++i, request = 0) {
      if (i > sent_batches_ && queue_[i]->abandoned) break;
      for (; request < queue_[i]->requests.size() && count < kMaxParts; ++request, skip = 0) {
        add_parts(*queue_[i]->requests[request], skip, parts, count);
      }
    }
    const auto sent = socket_.send(std::span(parts).first(count));
    if (sent.progress == StreamSocket::Progress::kWouldBlock) break;
    if (sent.progress != StreamSocket::Progress::kMoved) return fail(unavailable("cut the connection"));
    consume(sent.bytes);
  }
  want(sent_batches_ < limit() || socket_.wants_write() ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

/// Moves on by what was sent.
void RedisConnection::consume(std::size_t bytes) {
  sent_bytes_ += bytes;
  while (sent_batches_ < queue_.size()) {
    const auto& batch = *queue_[sent_batches_];
    const std::size_t of_request = size_of(*batch.requests[sent_requests_]);
    if (sent_bytes_ < of_request) return;
    sent_bytes_ -= of_request;
    if (++sent_requests_ < batch.requests.size()) continue;
    sent_requests_ = 0;
    ++sent_batches_;
  }
}

void RedisConnection::receive() {
  while (true) {
    if (!deliver()) return;
    const bool waited_for = !queue_.empty() && !queue_.front()->abandoned;
    const auto into =
        waited_for ? queue_.front()->requests[queue_.front()->replies.size()]->into : std::span<std::byte>();
    const auto received = socket_.receive(reader_.room(into));
    switch (received.progress) {
      case StreamSocket::Progress::kMoved:
        reader_.received(received.bytes);
        break;
      case StreamSocket::Progress::kWouldBlock:
        if (socket_.wants_write()) want(EPOLLIN | EPOLLOUT);
        socket_.wake_at(std::clamp<std::size_t>(reader_.expected_in_place(into), 1, kWakeBytes));
        return;
      case StreamSocket::Progress::kClosed:
        if (queue_.empty()) return disconnect();  // servers close what has been idle for long
        [[fallthrough]];
      case StreamSocket::Progress::kFailed:
        return fail(unavailable("cut the connection"));
    }
  }
}

/// Hands on the replies that are there. False: the connection is down.
bool RedisConnection::deliver() {
  while (true) {
    const auto batch = queue_.empty() ? nullptr : queue_.front();
    const auto into =
        batch && !batch->abandoned ? batch->requests[batch->replies.size()]->into : std::span<std::byte>();
    auto reply = reader_.next(into);
    if (!reply) {
      fail(unavailable("is no Redis server: " + reply.error().message()));
      return false;
    }
    if (!*reply) return true;
    const bool asked = batch && (sent_batches_ > 0 || batch->replies.size() < sent_requests_);
    if (!asked) {
      // Errors that nobody asked for say why the server is about to hang up ("max number of clients reached").
      fail(unavailable((*reply)->is_error() ? "answers " + (*reply)->text : "answers what nobody asked"));
      return false;
    }
    batch->replies.push_back(std::move(**reply));
    if (batch->replies.size() < batch->requests.size()) continue;
    queue_.pop_front();
    --sent_batches_;
    if (!batch->abandoned) batch->done(std::move(batch->replies));
    if (state_ == State::kDown) return false;
  }
}

void RedisConnection::arm_deadline() {
  if (queue_.empty()) return;
  const auto first = std::ranges::min_element(queue_, {}, [](const auto& batch) { return batch->deadline_ns; });
  arm_deadline((*first)->deadline_ns);
}

void RedisConnection::arm_deadline(std::int64_t deadline_ns) {
  if (deadline_timer_ && armed_ns_ <= deadline_ns) return;
  if (deadline_timer_) loop_.cancel(*deadline_timer_);
  armed_ns_ = deadline_ns;
  deadline_timer_ = loop_.at(deadline_ns, [this] {
    deadline_timer_.reset();
    const std::int64_t now = loop_.now_ns();
    const bool late = std::ranges::any_of(queue_, [&](const auto& batch) { return batch->deadline_ns <= now; });
    if (late) return fail(unavailable("did not answer in time"));
    arm_deadline();
  });
}

void RedisConnection::disconnect() {
  if (watch_) loop_.unwatch(*std::exchange(watch_, std::nullopt));
  if (timer_) loop_.cancel(*std::exchange(timer_, std::nullopt));
  if (deadline_timer_) loop_.cancel(*std::exchange(deadline_timer_, std::nullopt));
  socket_ = StreamSocket();
  reader_ = RespReader();
  sent_batches_ = sent_requests_ = sent_bytes_ = 0;
  state_ = State::kDown;
}

void RedisConnection::fail(const Status& why) {
  disconnect();
  ++failures_;
  last_error_ = why;
  timer_ = loop_.at(loop_.now_ns() + retry_after(failures_), [this] {
    timer_.reset();
    connect();
  });
  end(std::exchange(queue_, {}), why);
  on_failure_();
}

void RedisConnection::end(const std::deque<std::shared_ptr<RedisBatch>>& batches, const Status& why) {
  for (const auto& batch : batches) {
    if (!batch->abandoned) batch->done(failure(why));
  }
}

}  // namespace kvern
