#include <condition_variable>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <zmq.hpp>

#include "transport/control.h"
#include "transport/curve.h"
#include "transport/event_fd.h"
#include "transport/service_thread.h"

namespace kvern {
namespace {

// A daemon host that vanished without a word is noticed within this time, and ZeroMQ connects anew.
constexpr int kHeartbeatIntervalMs = 2000;
constexpr int kHeartbeatTimeoutMs = 10000;
constexpr int kReconnectMs = 50;
constexpr int kReconnectMaxMs = 2000;
// Answers may be larger than requests (snapshots); more than this is a defect of the peer.
constexpr std::int64_t kMaxReplyBytes = 64LL << 20;
// Unsent requests wait in our own map, where a time-out can still take them back: ZeroMQ gets few at a time.
constexpr int kHighWaterMark = 64;

struct Waiter {
  std::string frame;  ///< until it is sent
  wire::ControlReply reply;
  bool done = false;
  std::condition_variable wake;
};

}  // namespace

/// The thread owns the socket. mutex guards the rest; a Waiter lives on the stack of its caller, who takes it out of
/// the map before he leaves.
struct ControlClient::State {
  explicit State(const ControlClientConfig& client_config) : config(client_config) {}

  const ControlClientConfig config;
  zmq::context_t context{1};
  zmq::socket_t socket{context, zmq::socket_type::dealer};
  EventFd wake;

  std::mutex mutex;
  std::uint64_t last_sequence = 0;
  std::uint64_t last_sent = 0;
  std::map<std::uint64_t, Waiter*> waiting;
  bool closed = false;

  std::thread thread;

  void connect();
  void run();
  bool send_waiting();
  void receive();
};

void ControlClient::State::connect() {
  socket.set(zmq::sockopt::linger, 0);
  // A request goes only to a connection that stands: nothing is delivered late to a daemon that came back.
  socket.set(zmq::sockopt::immediate, true);
  socket.set(zmq::sockopt::sndhwm, kHighWaterMark);
  socket.set(zmq::sockopt::rcvhwm, kHighWaterMark);
  socket.set(zmq::sockopt::maxmsgsize, kMaxReplyBytes);
  socket.set(zmq::sockopt::heartbeat_ivl, kHeartbeatIntervalMs);
  socket.set(zmq::sockopt::heartbeat_timeout, kHeartbeatTimeoutMs);
  socket.set(zmq::sockopt::reconnect_ivl, kReconnectMs);
  socket.set(zmq::sockopt::reconnect_ivl_max, kReconnectMaxMs);
  socket.set(zmq::sockopt::ipv6, true);
  if (!config.server_key.empty()) {
    if (!is_curve_key(config.server_key)) {
      throw std::runtime_error("server_key is no CURVE public key: 40 characters as `kvernctl keygen` prints them");
    }
    if (!config.client_keys || !is_curve_key(config.client_keys->public_key) ||
        !is_curve_key(config.client_keys->secret_key)) {
      throw std::runtime_error("a server key is set, but no valid client key pair: run `kvernctl keygen`");
    }
    socket.set(zmq::sockopt::curve_serverkey, config.server_key);
    socket.set(zmq::sockopt::curve_publickey, config.client_keys->public_key);
    socket.set(zmq::sockopt::curve_secretkey, config.client_keys->secret_key);
  }
  try {
    socket.connect(config.endpoint);
  } catch (const zmq::error_t& error) {
    throw std::runtime_error("cannot connect to '" + config.endpoint + "': " + error.what());
  }
}

void ControlClient::State::run() {
  bool blocked = false;
  while (true) {
    zmq_pollitem_t items[] = {
        {socket.handle(), 0, static_cast<short>(blocked ? ZMQ_POLLIN | ZMQ_POLLOUT : ZMQ_POLLIN), 0},
        {nullptr, wake.fd(), ZMQ_POLLIN, 0}};
    zmq_poll(items, 2, -1);
    wake.drain();
    {
      std::lock_guard lock(mutex);
      if (closed) break;
    }
    try {
      receive();
      blocked = !send_waiting();
    } catch (const zmq::error_t& error) {
      if (error.num() != EINTR) throw;  // no other error is possible on a socket that only this thread uses
    }
  }
  socket.close();
}

/// False when the connection takes no more at the moment.
bool ControlClient::State::send_waiting() {
  std::unique_lock lock(mutex);
  for (auto next = waiting.upper_bound(last_sent); next != waiting.end(); next = waiting.upper_bound(last_sent)) {
    const std::uint64_t sequence = next->first;
    Waiter* const waiter = next->second;
    if (!socket.send(zmq::buffer(waiter->frame), zmq::send_flags::dontwait)) return false;
    waiter->frame = {};
    last_sent = sequence;
  }
  return true;
}

void ControlClient::State::receive() {
  zmq::message_t frame;
  while (socket.recv(frame, zmq::recv_flags::dontwait)) {
    wire::ControlReply reply;
    if (frame.more() || !reply.ParseFromArray(frame.data(), static_cast<int>(frame.size()))) continue;
    std::lock_guard lock(mutex);
    const auto found = waiting.find(reply.sequence());
    if (found == waiting.end() || found->first > last_sent) continue;
    found->second->reply.Swap(&reply);
    found->second->done = true;
    found->second->wake.notify_one();
  }
}

ControlClient::ControlClient(const ControlClientConfig& config) : state_(std::make_shared<State>(config)) {
  state_->connect();
  state_->thread = start_service_thread("kvern-control", [state = state_.get()] { state->run(); });
}

ControlClient::~ControlClient() {
  close();
  state_->thread.join();
}

Status ControlClient::call(wire::ControlRequest& request, wire::ControlReply* reply,
                           std::chrono::milliseconds timeout) {
  State& state = *state_;
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  Waiter waiter;
  std::unique_lock lock(state.mutex);
  if (state.closed) return {Code::kUnavailable, "the control connection is closed"};
  request.set_sequence(state.last_sequence + 1);
  if (const std::size_t bytes = request.ByteSizeLong(); bytes > kMaxMessageBytes) {
    return {Code::kInvalid, "a request of " + std::to_string(bytes) + " bytes; at most " +
                                std::to_string(kMaxMessageBytes) + " are allowed: send it in parts"};
  }
  waiter.frame = request.SerializeAsString();
  const std::uint64_t sequence = ++state.last_sequence;
  state.waiting.emplace(sequence, &waiter);
  state.wake.signal();
  waiter.wake.wait_until(lock, deadline, [&] { return waiter.done || state.closed; });
  state.waiting.erase(sequence);
  if (waiter.done) {
    reply->Swap(&waiter.reply);
    return Status::ok();
  }
  if (state.closed) return {Code::kUnavailable, "the control connection was closed"};
  return {Code::kUnavailable,
          "no answer from " + state.config.endpoint + " within " + std::to_string(timeout.count()) +
              " ms: is kvernd running there" +
              (state.config.server_key.empty() ? "?" : ", and is this client's public key among its allowed ones?")};
}

void ControlClient::close() {
  std::lock_guard lock(state_->mutex);
  state_->closed = true;
  for (const auto& [sequence, waiter] : state_->waiting) waiter->wake.notify_one();
  state_->wake.signal();
}

}  // namespace kvern
