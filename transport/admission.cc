#include "transport/admission.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "transport/event_fd.h"
#include "transport/service_thread.h"

#ifndef SO_PEERPIDFD  // Linux 6.5
#define SO_PEERPIDFD 77
#endif

namespace kvern {
namespace {

constexpr std::size_t kMaxPacketBytes = 4096;
constexpr std::size_t kDescriptors = 5;
constexpr int kBacklog = 64;
// How long no connection is accepted after the process ran out of descriptors: an attempt would fail at once again.
constexpr std::chrono::milliseconds kAcceptPause{100};

// Accepted in one round, so that a flood of connections does not keep admitted ones from being looked after.
constexpr int kAcceptBatch = 16;

std::string error_text(int error) { return std::system_category().message(error); }

[[noreturn]] void throw_error(int error, const std::string& what) {
  throw std::system_error(error, std::system_category(), what);
}

std::optional<sockaddr_un> unix_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) return std::nullopt;
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

const sockaddr* generic(const sockaddr_un& address) { return reinterpret_cast<const sockaddr*>(&address); }

UniqueFd open_socket(int flags) { return UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | flags, 0)); }

/// Sockets with a time-out return on every signal, whatever SA_RESTART says.
template <typename Call>
auto uninterrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

/// One packet with descriptors. 0 or errno.
int send_packet(int fd, const std::string& packet, const std::vector<int>& descriptors) {
  iovec part{.iov_base = const_cast<char*>(packet.data()), .iov_len = packet.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxOfferedDescriptors * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(descriptors.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size() * sizeof(int));
  }
  return uninterrupted([&] { return ::sendmsg(fd, &message, MSG_NOSIGNAL); }) < 0 ? errno : 0;
}

/// A packet and the descriptors that came with it. Bytes as recvmsg() returns them, of a packet that may be longer than
/// its buffer.
struct Packet {
  std::array<char, kMaxPacketBytes> bytes{};
  ssize_t length = 0;
  std::vector<UniqueFd> descriptors;
};
void receive_packet(int fd, Packet* packet) {
  iovec part{.iov_base = packet->bytes.data(), .iov_len = packet->bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxOfferedDescriptors * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  packet->length = uninterrupted([&] { return ::recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_TRUNC); });
  if (packet->length < 0) return;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int descriptor = -1;
      std::memcpy(&descriptor, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      packet->descriptors.emplace_back(descriptor);
    }
  }
}

/// A connected socket whose calls end after the timeout.
Result<UniqueFd> connect_to(const std::string& path, std::chrono::milliseconds timeout) {
  const auto address = unix_address(path);
  if (!address) return failure(Code::kInvalid, path + ": the path of a Unix socket must be 1 to 107 bytes long");
  UniqueFd connection = open_socket(0);
  if (!connection) return failure(Code::kInternal, "cannot create a socket: " + error_text(errno));
  const int fd = connection.get();
  // Both also bound connect(), which waits while the daemon's queue is full. Zero would mean for ever.
  const auto limit = std::max(timeout, std::chrono::milliseconds(1));
  const timeval each{.tv_sec = limit.count() / 1000, .tv_usec = limit.count() % 1000 * 1000};
  ::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &each, sizeof each);
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &each, sizeof each);
  if (uninterrupted([&] { return ::connect(fd, generic(*address), sizeof *address); }) != 0) {
    return failure(Code::kUnavailable, "no daemon answers on " + path + ": " + error_text(errno));
  }
  return connection;
}

/// Sends the request and waits for the answer to it, whose refusal comes back as the failure.
Status exchange(int fd, const std::string& path, const wire::Admit& request, const std::vector<int>& descriptors,
                wire::Admitted* answer, std::vector<UniqueFd>* received) {
  if (const int error = send_packet(fd, request.SerializeAsString(), descriptors); error != 0) {
    return {Code::kUnavailable, "the daemon on " + path + " takes no request: " + error_text(error)};
  }
  Packet packet;
  receive_packet(fd, &packet);
  if (packet.length <= 0) {
    const bool late = packet.length < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    return {Code::kUnavailable, "the daemon on " + path + (late ? " does not answer" : " closed the connection")};
  }
  if (static_cast<std::size_t>(packet.length) > packet.bytes.size() ||
      !answer->ParseFromArray(packet.bytes.data(), static_cast<int>(packet.length))) {
    return {Code::kCorrupt, "the answer of the daemon on " + path + " is no Admitted message"};
  }
  *received = std::move(packet.descriptors);
  return to_status(answer->status());
}

PeerProcess peer_of(int fd) {
  PeerProcess peer;
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0) {
    peer.pid = credentials.pid;
    peer.uid = credentials.uid;
    peer.gid = credentials.gid;
  }
  int pidfd = -1;
  length = sizeof pidfd;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &length) == 0) {
    peer.pidfd = UniqueFd(pidfd);
  } else if (peer.pid > 0) {
    // Older kernels. The number may have been taken over if the peer died since it connected; then its connection is
    // closed, too, which is noticed first.
    peer.pidfd = UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));
  }
  return peer;
}

}  // namespace

struct AdmissionServer::State {
  // What an epoll event belongs to: connection number * 2, plus one for the pidfd of its peer.
  static constexpr std::uint64_t kListenerKey = 0;
  static constexpr std::uint64_t kWakeKey = 1;

  struct Connection {
    UniqueFd fd;
    UniqueFd pidfd;
    bool admitted = false;
    std::int64_t accepted_ns = 0;
  };

  State(const std::string& path_in, unsigned mode, AdmissionHandler& handler_in, const AdmissionLimits& limits_in)
      : path(path_in), handler(handler_in), limits(limits_in), epoll(::epoll_create1(EPOLL_CLOEXEC)) {
    if (!epoll) throw_error(errno, "epoll_create1");
    listen_on_path(mode);
    if (!watch(listener.get(), EPOLLIN, kListenerKey) || !watch(wake.fd(), EPOLLIN, kWakeKey)) {
      throw_error(errno, "epoll_ctl");
    }
  }

  ~State() {
    struct stat now {};
    if (::lstat(path.c_str(), &now) == 0 && now.st_dev == bound.st_dev && now.st_ino == bound.st_ino) {
      ::unlink(path.c_str());
    }
  }

  void listen_on_path(unsigned mode) {
    const auto address = unix_address(path);
    if (!address) throw_error(ENAMETOOLONG, path + ": the path of a Unix socket must be 1 to 107 bytes long");
    // Two daemons that start at once must not both find the old file stale and remove each other's.
    const std::filesystem::path parent = std::filesystem::path(path).parent_path();
    const UniqueFd directory(::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!directory || ::flock(directory.get(), LOCK_EX) != 0) throw_error(errno, parent.string());
    remove_stale_socket(*address);
    listener = open_socket(SOCK_NONBLOCK);
    if (!listener) throw_error(errno, "socket");
    if (::bind(listener.get(), generic(*address), sizeof *address) != 0) throw_error(errno, "cannot bind " + path);
    // Nobody can connect before listen(), so that the permissions are never wider than wanted.
    if (::lstat(path.c_str(), &bound) != 0 || ::chmod(path.c_str(), static_cast<mode_t>(mode)) != 0 ||
        ::listen(listener.get(), kBacklog) != 0) {
      const int error = errno;
      ::unlink(path.c_str());
      throw_error(error, path);
    }
  }

  void remove_stale_socket(const sockaddr_un& address) const {
    struct stat info {};
    if (::lstat(path.c_str(), &info) != 0) return;
    if (!S_ISSOCK(info.st_mode)) throw_error(EEXIST, path + " exists and is no socket");
    const UniqueFd probe = open_socket(SOCK_NONBLOCK);
    if (!probe) throw_error(errno, "socket");
    if (::connect(probe.get(), generic(address), sizeof address) == 0 || errno != ECONNREFUSED) {
      throw_error(EADDRINUSE, "another process listens on " + path);
    }
    if (::unlink(path.c_str()) != 0 && errno != ENOENT) throw_error(errno, path);
  }

  bool watch(int fd, std::uint32_t events, std::uint64_t key) const {
    epoll_event event{.events = events, .data = {.u64 = key}};
    return ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &event) == 0;
  }

  void accept_while(bool accepting) {
    epoll_event event{.events = accepting ? EPOLLIN : 0U, .data = {.u64 = kListenerKey}};
    ::epoll_ctl(epoll.get(), EPOLL_CTL_MOD, listener.get(), &event);
    accept_again_ns = accepting ? 0 : now_ns() + std::chrono::nanoseconds(kAcceptPause).count();
  }

  void run() {
    while (!stopping) {
      std::array<epoll_event, 64> events{};
      const int count = ::epoll_wait(epoll.get(), events.data(), static_cast<int>(events.size()), timeout_ms());
      for (int i = 0; i < count; ++i) {
        const std::uint64_t key = events[static_cast<std::size_t>(i)].data.u64;
        if (key == kListenerKey) {
          accept_some();
        } else if (key == kWakeKey) {
          wake.drain();
        } else {
          const auto found = connections.find(key / 2);  // gone if an earlier event of this round closed it
          if (found != connections.end()) serve(found->first, found->second, key % 2 == 1);
        }
      }
      disconnect_requested();
      drop_silent();
      if (accept_again_ns != 0 && now_ns() >= accept_again_ns) accept_while(true);
    }
  }

  /// Until the next thing that is due without an event. Connections are numbered in the order of their time-outs.
  int timeout_ms() const {
    std::int64_t due_ns = accept_again_ns;
    if (!silent.empty()) {
      const std::int64_t first_ns = silent_deadline_ns(connections.at(silent.front()));
      due_ns = due_ns == 0 ? first_ns : std::min(due_ns, first_ns);
    }
    if (due_ns == 0) return -1;
    constexpr std::int64_t kNanosecondsPerMillisecond = 1'000'000;
    const std::int64_t left_ns = std::max<std::int64_t>(due_ns - now_ns(), 0);
    return static_cast<int>(left_ns / kNanosecondsPerMillisecond + 1);
  }

  std::int64_t silent_deadline_ns(const Connection& connection) const {
    return connection.accepted_ns + std::chrono::nanoseconds(limits.first_packet_timeout).count();
  }

  void accept_some() {
    for (int i = 0; i < kAcceptBatch; ++i) {
      UniqueFd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (!fd) {
        if (errno == ECONNABORTED || errno == EINTR) continue;
        if (errno != EAGAIN) accept_while(false);
        return;
      }
      if (!silent.empty() && silent.size() >= limits.max_silent) close_connection(silent.front());
      const std::uint64_t id = ++last_id;
      if (!watch(fd.get(), EPOLLIN | EPOLLRDHUP, id * 2)) continue;
      connections.emplace(id, Connection{.fd = std::move(fd), .pidfd = {}, .accepted_ns = now_ns()});
      silent.push_back(id);
    }
  }

  void serve(std::uint64_t id, Connection& connection, bool process_ended) {
    if (connection.admitted || process_ended) {
      // An admitted peer has nothing more to say: end of file, the end of its process, or a breach of the protocol.
      if (connection.admitted) handler.closed(id);
      close_connection(id);
      return;
    }
    wire::Admitted answer;
    std::vector<int> descriptors;
    admit(id, connection, &answer, &descriptors);
    const bool accepted = to_status(answer.status()).is_ok() && !descriptors.empty();
    const int error = send_packet(connection.fd.get(), answer.SerializeAsString(), descriptors);
    if (accepted && error != 0) handler.closed(id);
    if (!accepted || error != 0) {
      close_connection(id);
      return;
    }
    connection.admitted = true;
    silent.erase(std::find(silent.begin(), silent.end(), id));
    ++admitted_count;
    if (connection.pidfd) watch(connection.pidfd.get(), EPOLLIN, id * 2 + 1);
  }

  void admit(std::uint64_t id, Connection& connection, wire::Admitted* answer, std::vector<int>* descriptors) {
    Packet packet;
    receive_packet(connection.fd.get(), &packet);
    wire::Admit request;
    if (packet.length <= 0 || static_cast<std::size_t>(packet.length) > packet.bytes.size() ||
        !request.ParseFromArray(packet.bytes.data(), static_cast<int>(packet.length))) {
      set_status(Status(Code::kInvalid, "the packet is no Admit message"), answer->mutable_status());
      return;
    }
    if (request.offered() > 0) {
      const bool complete = request.offered() == packet.descriptors.size();
      set_status(complete ? handler.offer(request, std::move(packet.descriptors))
                          : Status(Code::kInvalid, "the packet does not bring the descriptors that it names"),
                 answer->mutable_status());
      return;
    }
    if (admitted_count >= limits.max_connections) {
      set_status(Status(Code::kBusy, "the daemon has " + std::to_string(admitted_count) + " local sessions already"),
                 answer->mutable_status());
      return;
    }
    PeerProcess peer = peer_of(connection.fd.get());
    if (peer.pidfd) connection.pidfd = UniqueFd(::fcntl(peer.pidfd.get(), F_DUPFD_CLOEXEC, 0));
    handler.admit(id, request, std::move(peer), answer, descriptors);
    if (to_status(answer->status()).is_ok() && descriptors->size() != kDescriptors) {
      handler.closed(id);
      answer->Clear();
      set_status(Status(Code::kInternal, "the session has no descriptors"), answer->mutable_status());
    }
    if (!to_status(answer->status()).is_ok()) descriptors->clear();
  }

  void close_connection(std::uint64_t id) {
    const auto found = connections.find(id);
    if (found == connections.end()) return;
    if (found->second.admitted) {
      --admitted_count;
    } else {
      silent.erase(std::find(silent.begin(), silent.end(), id));
    }
    // A duplicate of the pidfd may live in the handler, so that closing it here would not end the watch.
    if (found->second.pidfd) ::epoll_ctl(epoll.get(), EPOLL_CTL_DEL, found->second.pidfd.get(), nullptr);
    connections.erase(found);
  }

  void disconnect_requested() {
    std::vector<std::uint64_t> requested;
    {
      const std::lock_guard lock(mutex);
      requested.swap(to_disconnect);
    }
    for (const std::uint64_t id : requested) close_connection(id);
  }

  void drop_silent() {
    while (!silent.empty() && now_ns() >= silent_deadline_ns(connections.at(silent.front()))) {
      close_connection(silent.front());
    }
  }

  static std::int64_t now_ns() { return Clock::system().now_ns(); }

  const std::string path;
  AdmissionHandler& handler;
  const AdmissionLimits limits;
  const UniqueFd epoll;
  const EventFd wake;
  UniqueFd listener;
  struct stat bound {};  // the socket file
  std::atomic<bool> stopping = false;

  // The thread's own.
  std::map<std::uint64_t, Connection> connections;
  std::vector<std::uint64_t> silent;  // not admitted yet, oldest first
  std::size_t admitted_count = 0;
  std::uint64_t last_id = 0;
  std::int64_t accept_again_ns = 0;  // 0: accepting

  std::mutex mutex;
  std::vector<std::uint64_t> to_disconnect;  // by mutex

  std::thread thread;
};

AdmissionServer::AdmissionServer(const std::string& path, unsigned mode, AdmissionHandler& handler,
                                 const AdmissionLimits& limits)
    : state_(std::make_unique<State>(path, mode, handler, limits)) {
  state_->thread = start_service_thread("kvern-admission", [state = state_.get()] { state->run(); });
}

AdmissionServer::~AdmissionServer() {
  state_->stopping = true;
  state_->wake.signal();
  state_->thread.join();
}

void AdmissionServer::disconnect(std::uint64_t connection) {
  {
    const std::lock_guard lock(state_->mutex);
    state_->to_disconnect.push_back(connection);
  }
  state_->wake.signal();
}

Result<AdmittedSession> request_admission(const std::string& path, const std::string& session_token,
                                          std::chrono::milliseconds timeout) {
  auto connection = connect_to(path, timeout);
  if (!connection) return failure(connection.error());
  AdmittedSession session;
  session.connection = std::move(*connection);
  wire::Admit request;
  request.set_session_token(session_token);
  std::vector<UniqueFd> received;
  if (Status status = exchange(session.connection.get(), path, request, {}, &session.answer, &received); !status) {
    return failure(status);
  }
  if (received.size() != kDescriptors) {
    return failure(Code::kCorrupt, "the daemon on " + path + " sent " + std::to_string(received.size()) +
                                       " descriptors instead of " + std::to_string(kDescriptors) +
                                       " (is the limit of open files, ulimit -n, reached?)");
  }
  session.slab = std::move(received[0]);
  session.index = std::move(received[1]);
  session.segment = std::move(received[2]);
  session.staging = std::move(received[3]);
  session.doorbell = std::move(received[4]);
  session.daemon = peer_of(session.connection.get()).pidfd;
  return session;
}

Status offer_descriptors(const std::string& path, const std::string& session_token, const std::vector<int>& descriptors,
                         std::chrono::milliseconds timeout) {
  if (descriptors.empty() || descriptors.size() > kMaxOfferedDescriptors) {
    return {Code::kRefused, "1 to " + std::to_string(kMaxOfferedDescriptors) + " descriptors can be offered, not " +
                                std::to_string(descriptors.size())};
  }
  const auto connection = connect_to(path, timeout);
  if (!connection) return connection.error();
  wire::Admit request;
  request.set_session_token(session_token);
  request.set_offered(static_cast<std::uint32_t>(descriptors.size()));
  wire::Admitted answer;
  std::vector<UniqueFd> received;
  return exchange(connection->get(), path, request, descriptors, &answer, &received);
}

}  // namespace kvern
