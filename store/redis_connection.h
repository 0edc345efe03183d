#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/executor.h"
#include "base/status.h"
#include "store/event_loop.h"
#include "store/redis_resp.h"
#include "store/redis_slots.h"
#include "store/stream_socket.h"

namespace kvern {

/// Requests that go to one node behind one another.
struct RedisBatch {
  using Done = std::function<void(Result<std::vector<RespValue>>)>;
  std::vector<const RedisRequest*> requests;
  std::shared_ptr<const void> hold;  ///< keeps the requests and their bodies
  std::int64_t deadline_ns = 0;      ///< an answer that is later breaks the connection
  Done done;                         ///< called once: a reply per request, or kUnavailable
  /// Set by who lost interest: done is not called any more, and no request's `into` is written.
  bool abandoned = false;
  std::vector<RespValue> replies = {};
};

struct RedisConnectionSettings {
  std::string user, password;
  std::shared_ptr<TlsContext> tls;  ///< null: none
  std::int64_t connect_timeout_ns = 0;
};

/// One connection to one node: pipelines batches, and comes back by itself, with back-off, after it has failed. While
/// it is down after a failure, batches end at once, so that a dead node costs no waiting. Belongs to the loop's thread.
class RedisConnection {
 public:
  /// All outlive the connection. resolver: where names are looked up, which blocks. on_failure: told after everything
  /// that waited has ended.
  RedisConnection(EventLoop& loop, Executor& resolver, const RedisConnectionSettings& settings, RedisEndpoint endpoint,
                  std::function<void()> on_failure);
  /// Ends what waits with kUnavailable.
  ~RedisConnection();
  RedisConnection(const RedisConnection&) = delete;
  RedisConnection& operator=(const RedisConnection&) = delete;

  /// Connects when needed. Sends after what runs now, together with what else is submitted until then.
  void submit(std::shared_ptr<RedisBatch> batch);
  bool failing() const { return failures_ > 0; }
  bool idle() const { return queue_.empty(); }

 private:
  enum class State { kDown, kResolving, kConnecting, kGreeting, kReady };

  void connect();
  void connect_to(const Result<SocketAddress>& address);
  void on_ready(std::uint32_t events);
  void greet();
  void flush();
  void flush_later();
  void receive();
  bool deliver();
  void consume(std::size_t bytes);
  void want(std::uint32_t events);
  void arm_deadline();
  void arm_deadline(std::int64_t deadline_ns);
  void disconnect();
  void fail(const Status& why);
  static void end(const std::deque<std::shared_ptr<RedisBatch>>& batches, const Status& why);
  Status unavailable(const std::string& what) const;

  EventLoop& loop_;
  Executor& resolver_;
  const RedisConnectionSettings& settings_;
  const RedisEndpoint endpoint_;
  const std::function<void()> on_failure_;
  State state_ = State::kDown;
  StreamSocket socket_;
  std::optional<std::uint64_t> watch_;
  std::uint32_t events_ = 0;
  std::optional<std::uint64_t> timer_;  ///< of connecting or connecting again
  std::optional<std::uint64_t> deadline_timer_;
  std::int64_t armed_ns_ = 0;
  bool flushing_ = false;
  int failures_ = 0;  ///< in a row
  Status last_error_;
  RespReader reader_;
  std::deque<std::shared_ptr<RedisBatch>> queue_;  ///< not answered, in order
  // What of the queue is sent: all of the batches before, and of that one the requests before, and of that so many
  // bytes.
  std::size_t sent_batches_ = 0, sent_requests_ = 0, sent_bytes_ = 0;
  /// Tells what comes back late, from the resolver or `later`, whether the connection still is.
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace kvern
