#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
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

// Up to this size a frame that is too large is still read and answered; ZeroMQ cuts the connection above it.
constexpr std::int64_t kMaxFrameBytes = static_cast<std::int64_t>(kMaxMessageBytes) + (64 << 10);
// Per connection; times kMaxFrameBytes bounds the memory that one peer can fill.
constexpr int kReceiveHighWaterMark = 64;
constexpr int kSendHighWaterMark = 1024;
constexpr int kHandshakeTimeoutMs = 5000;
constexpr int kHeartbeatIntervalMs = 2000;
constexpr int kHeartbeatTimeoutMs = 10000;
constexpr int kListenBacklog = 128;
// Messages taken from one socket before the others get their turn.
constexpr int kBurst = 64;
// Any name will do; with it ZeroMQ asks our ZAP handler about CURVE peers.
constexpr const char* kZapDomain = "kvern";

/// Where replies wait for the server's thread. Outlives the server as long as somebody may still answer.
class Outbox {
 public:
  struct Reply {
    bool local = false;
    std::string identity;  ///< ZeroMQ's name of the connection
    std::string frame;
  };

  explicit Outbox(std::size_t capacity) : capacity_(capacity) {}

  void push(Reply reply) {
    {
      std::lock_guard lock(mutex_);
      if (closed_) return;
      if (replies_.size() >= capacity_) {
        count_dropped();
        return;
      }
      replies_.push_back(std::move(reply));
    }
    wake_.signal();
  }
  std::deque<Reply> take() {
    std::lock_guard lock(mutex_);
    return std::exchange(replies_, {});
  }
  void close() {
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
      replies_.clear();
    }
    wake_.signal();
  }
  bool closed() const {
    std::lock_guard lock(mutex_);
    return closed_;
  }
  const EventFd& wake() const { return wake_; }
  void count_dropped() { dropped_.fetch_add(1, std::memory_order_relaxed); }
  std::uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }

 private:
  const std::size_t capacity_;
  EventFd wake_;
  mutable std::mutex mutex_;
  std::deque<Reply> replies_;
  bool closed_ = false;
  std::atomic<std::uint64_t> dropped_{0};
};

/// A listening Unix socket file. It is made here and not by ZeroMQ, which would bind with the permissions of the umask
/// and take the file away from a daemon that is alive.
class UnixListener {
 public:
  UnixListener(const std::string& path, unsigned mode) : path_(path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) fail("the path has more than 107 characters");
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    remove_stale(address);
    fd_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd_ < 0) fail(std::strerror(errno));
    // The mode set before bind() is an upper bound for the file's from its first moment; the umask only narrows it.
    if (::fchmod(fd_, mode) != 0 || ::bind(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      const int error = errno;
      ::close(fd_);
      fail(std::strerror(error));
    }
    struct stat file {};
    if (::chmod(path.c_str(), mode) != 0 || ::listen(fd_, kListenBacklog) != 0 || ::stat(path.c_str(), &file) != 0) {
      const int error = errno;
      ::close(fd_);
      ::unlink(path.c_str());
      fail(std::strerror(error));
    }
    inode_ = file.st_ino;
  }
  UnixListener(const UnixListener&) = delete;
  UnixListener& operator=(const UnixListener&) = delete;
  ~UnixListener() {
    struct stat file {};
    if (::stat(path_.c_str(), &file) == 0 && file.st_ino == inode_) ::unlink(path_.c_str());
    if (fd_ >= 0) ::close(fd_);
  }

  int fd() const { return fd_; }
  /// ZeroMQ closes the descriptor from here on.
  void release() { fd_ = -1; }

 private:
  [[noreturn]] void fail(const std::string& reason) const {
    throw std::runtime_error("cannot listen on ipc://" + path_ + ": " + reason);
  }

  void remove_stale(const sockaddr_un& address) const {
    struct stat file {};
    if (::lstat(path_.c_str(), &file) != 0) return;
    if (!S_ISSOCK(file.st_mode)) fail("the file exists and is no socket; remove it or choose another path");
    const int probe = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe < 0) fail(std::strerror(errno));
    const bool connected = ::connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    const int error = errno;
    ::close(probe);
    if (connected || error == EAGAIN) fail("another process listens there; stop it or choose another path");
    if (error != ECONNREFUSED && error != ENOENT) fail(std::strerror(error));
    ::unlink(path_.c_str());
  }

  const std::string path_;
  int fd_ = -1;
  ino_t inode_ = 0;
};

void set_common_options(zmq::socket_t& socket) {
  socket.set(zmq::sockopt::linger, 0);
  socket.set(zmq::sockopt::maxmsgsize, kMaxFrameBytes);
  socket.set(zmq::sockopt::rcvhwm, kReceiveHighWaterMark);
  socket.set(zmq::sockopt::sndhwm, kSendHighWaterMark);
  socket.set(zmq::sockopt::handshake_ivl, kHandshakeTimeoutMs);
  socket.set(zmq::sockopt::heartbeat_ivl, kHeartbeatIntervalMs);
  socket.set(zmq::sockopt::heartbeat_timeout, kHeartbeatTimeoutMs);
  // A reply to a peer that is gone or does not read is an error here, and not a silent loss.
  socket.set(zmq::sockopt::router_mandatory, true);
}

/// What answer_zap() said about the connection that the part came from; empty where ZAP was not asked.
std::string user_id(zmq::message_t& part) {
  const char* const id = zmq_msg_gets(part.handle(), "User-Id");
  return id == nullptr ? std::string() : std::string(id);
}

}  // namespace

Status ControlServerConfig::validate() const {
  if (unix_path.empty() && tcp_endpoint.empty()) {
    return {Code::kInvalid, "the control plane has neither a Unix socket nor a TCP endpoint"};
  }
  if (max_queued_replies == 0) return {Code::kInvalid, "max_queued_replies is 0: no answer could ever be sent"};
  if (tcp_endpoint.empty()) return Status::ok();
  if (!tcp_endpoint.starts_with("tcp://")) {
    return {Code::kInvalid, "'" + tcp_endpoint + "' is no TCP endpoint: write it like tcp://0.0.0.0:7070"};
  }
  if (!server_keys && !insecure) {
    return {Code::kRefused, "TCP endpoint " + tcp_endpoint +
                                " without keys: make some with `kvernctl keygen`, or write insecure = true if every "
                                "host of that network may read and change the store"};
  }
  if (server_keys && (!is_curve_key(server_keys->public_key) || !is_curve_key(server_keys->secret_key))) {
    return {Code::kInvalid, "the server's CURVE keys are not valid: 40 characters each, as `kvernctl keygen` prints"};
  }
  for (const std::string& key : allowed_client_keys) {
    if (!is_curve_key(key)) {
      return {Code::kInvalid, "'" + key + "' among the allowed client keys is no CURVE public key of 40 characters"};
    }
  }
  return Status::ok();
}

/// The sockets are used by the thread alone once it runs; the outbox is all that others touch.
struct ControlServer::State {
  State(const ControlServerConfig& server_config, ControlHandler& control_handler);

  void run();

  const ControlServerConfig config;
  ControlHandler& handler;
  const std::shared_ptr<Outbox> outbox;
  std::optional<UnixListener> listener;  ///< after the context in destruction: the file goes when nobody listens
  zmq::context_t context{1};
  zmq::socket_t zap;
  zmq::socket_t local;
  zmq::socket_t remote;
  std::string tcp_endpoint;
  std::atomic<std::uint64_t> turns{0};
  std::thread thread;

 private:
  void bind_local();
  void bind_remote();
  void answer_zap();
  void receive(bool from_local);
  void dispatch(const ControlPeer& peer, std::string identity, const zmq::message_t& frame);
  void refuse(const ControlPeer& peer, std::string identity, std::uint64_t sequence, const Status& why);
  void send_replies();
};

ControlServer::State::State(const ControlServerConfig& server_config, ControlHandler& control_handler)
    : config(server_config),
      handler(control_handler),
      outbox(std::make_shared<Outbox>(server_config.max_queued_replies)) {
  if (const Status valid = config.validate(); !valid) throw std::runtime_error(valid.message());
  if (!config.unix_path.empty()) bind_local();
  if (!config.tcp_endpoint.empty()) bind_remote();
}

void ControlServer::State::bind_local() {
  listener.emplace(config.unix_path, config.unix_mode);
  local = zmq::socket_t(context, zmq::socket_type::router);
  set_common_options(local);
  const int fd = listener->fd();
  if (zmq_setsockopt(local.handle(), ZMQ_USE_FD, &fd, sizeof fd) != 0 ||
      zmq_bind(local.handle(), ("ipc://" + config.unix_path).c_str()) != 0) {
    throw std::runtime_error("cannot listen on ipc://" + config.unix_path + ": " + zmq_strerror(zmq_errno()));
  }
  listener->release();
}

void ControlServer::State::bind_remote() {
  if (config.server_keys) {
    zap = zmq::socket_t(context, zmq::socket_type::rep);
    zap.set(zmq::sockopt::linger, 0);
    zap.bind("inproc://zeromq.zap.01");  // before the first CURVE peer can connect
  }
  remote = zmq::socket_t(context, zmq::socket_type::router);
  set_common_options(remote);
  remote.set(zmq::sockopt::ipv6, true);
  if (config.server_keys) {
    remote.set(zmq::sockopt::curve_server, true);
    remote.set(zmq::sockopt::curve_secretkey, config.server_keys->secret_key);
    remote.set(zmq::sockopt::zap_domain, kZapDomain);
  }
  try {
    remote.bind(config.tcp_endpoint);
  } catch (const zmq::error_t& error) {
    throw std::runtime_error("cannot listen on " + config.tcp_endpoint + ": " + error.what());
  }
  tcp_endpoint = remote.get(zmq::sockopt::last_endpoint);
}

void ControlServer::State::run() {
  while (!outbox->closed()) {
    zmq_pollitem_t items[4] = {{nullptr, outbox->wake().fd(), ZMQ_POLLIN, 0}};
    int count = 1;
    for (zmq::socket_t* socket : {&zap, &local, &remote}) {
      if (*socket) items[count++] = {socket->handle(), 0, ZMQ_POLLIN, 0};
    }
    zmq_poll(items, count, -1);
    outbox->wake().drain();
    turns.fetch_add(1, std::memory_order_relaxed);
    try {
      send_replies();
      if (zap) answer_zap();
      if (local) receive(true);
      if (remote) receive(false);
    } catch (const zmq::error_t& error) {
      if (error.num() != EINTR) throw;  // no other error is possible on sockets that only this thread uses
    }
  }
  zap.close();
  local.close();
  remote.close();
}

/// RFC 27: [version][request id][domain][address][identity][mechanism][credentials]. Comes from libzmq alone.
void ControlServer::State::answer_zap() {
  while (true) {
    std::vector<std::string> parts;
    bool more = true;
    while (more) {
      zmq::message_t part;
      if (!zap.recv(part, zmq::recv_flags::dontwait)) return;
      more = part.more();
      parts.push_back(part.to_string());
    }
    const bool curve = parts.size() == 7 && parts[5] == "CURVE" && parts[6].size() == 32;
    const std::string key = curve ? to_z85(parts[6]) : std::string();
    const bool admitted = curve && std::find(config.allowed_client_keys.begin(), config.allowed_client_keys.end(),
                                             key) != config.allowed_client_keys.end();
    const std::string answer[] = {"1.0",
                                  parts.size() > 1 ? parts[1] : std::string(),
                                  admitted ? "200" : "400",
                                  admitted ? "" : "this public key is not among the allowed client keys",
                                  admitted ? key : std::string(),  // becomes the connection's User-Id
                                  ""};
    for (std::size_t i = 0; i < std::size(answer); ++i) {
      zap.send(zmq::buffer(answer[i]), i + 1 < std::size(answer) ? zmq::send_flags::sndmore : zmq::send_flags::none);
    }
  }
}

void ControlServer::State::receive(bool from_local) {
  zmq::socket_t& socket = from_local ? local : remote;
  for (int taken = 0; taken < kBurst; ++taken) {
    zmq::message_t identity;
    if (!socket.recv(identity, zmq::recv_flags::dontwait)) return;
    // The rest of the message is there: ZeroMQ delivers all parts or none.
    zmq::message_t frame;
    int parts = 0;
    for (bool more = identity.more(); more; ++parts) {
      zmq::message_t part;
      if (!socket.recv(part)) break;
      more = part.more();
      if (parts == 0) frame = std::move(part);
    }
    ControlPeer peer;
    peer.local = from_local;
    peer.public_key = user_id(frame);
    if (!from_local && config.server_keys && peer.public_key.empty()) {
      refuse(peer, identity.to_string(), 0, {Code::kRefused, "the connection is not authenticated"});
    } else if (parts == 1) {
      dispatch(peer, identity.to_string(), frame);
    } else {
      refuse(peer, identity.to_string(), 0,
             {Code::kInvalid, "a control message has one part, not " + std::to_string(parts)});
    }
  }
}

void ControlServer::State::dispatch(const ControlPeer& peer, std::string identity, const zmq::message_t& frame) {
  if (frame.size() > kMaxMessageBytes) {
    refuse(peer, std::move(identity), 0,
           {Code::kInvalid, "a control message of " + std::to_string(frame.size()) + " bytes; at most " +
                                std::to_string(kMaxMessageBytes) + " are allowed"});
    return;
  }
  wire::ControlRequest request;
  if (!request.ParseFromArray(frame.data(), static_cast<int>(frame.size()))) {
    refuse(peer, std::move(identity), 0, {Code::kInvalid, "the bytes are no ControlRequest"});
    return;
  }
  const std::uint64_t sequence = request.sequence();
  if (request.body_case() == wire::ControlRequest::BODY_NOT_SET) {
    refuse(peer, std::move(identity), sequence,
           {Code::kInvalid, "the ControlRequest has no body that this version knows"});
    return;
  }
  handler.handle(
      peer, std::move(request),
      [outbox = outbox, local = peer.local, identity = std::move(identity), sequence](wire::ControlReply reply) {
        reply.set_sequence(sequence);
        outbox->push({local, identity, reply.SerializeAsString()});
      });
}

void ControlServer::State::refuse(const ControlPeer& peer, std::string identity, std::uint64_t sequence,
                                  const Status& why) {
  handler.malformed(peer, why);
  wire::ControlReply reply;
  reply.set_sequence(sequence);
  set_status(why, reply.mutable_status());
  outbox->push({peer.local, std::move(identity), reply.SerializeAsString()});
}

void ControlServer::State::send_replies() {
  for (const Outbox::Reply& reply : outbox->take()) {
    zmq::socket_t& socket = reply.local ? local : remote;
    try {
      if (socket.send(zmq::buffer(reply.identity), zmq::send_flags::sndmore | zmq::send_flags::dontwait) &&
          socket.send(zmq::buffer(reply.frame), zmq::send_flags::dontwait)) {
        continue;
      }
    } catch (const zmq::error_t& error) {
      if (error.num() != EHOSTUNREACH) throw;  // the peer is gone
    }
    outbox->count_dropped();
  }
}

ControlServer::ControlServer(const ControlServerConfig& config, ControlHandler& handler)
    : state_(std::make_shared<State>(config, handler)) {
  state_->thread = start_service_thread("kvern-control", [state = state_.get()] { state->run(); });
}

ControlServer::~ControlServer() { close(); }

void ControlServer::close() {
  state_->outbox->close();
  if (state_->thread.joinable()) state_->thread.join();
}

std::string ControlServer::tcp_endpoint() const { return state_->tcp_endpoint; }

void ControlServer::prod() { state_->outbox->wake().signal(); }
std::uint64_t ControlServer::turns() const { return state_->turns.load(std::memory_order_relaxed); }
std::uint64_t ControlServer::dropped_replies() const { return state_->outbox->dropped(); }

}  // namespace kvern
