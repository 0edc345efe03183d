#pragma once

#include <sys/socket.h>
#include <ucp/api/ucp.h>

#include <chrono>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "transport/event_fd.h"

namespace kvern::ucx {

/// "1.13.1", or kRefused when the library is older than the headers that this was built with.
Result<std::string> version();

/// A payload of at least this size is announced first and then goes straight into its place (rendezvous); smaller ones
/// are left to UCX.
constexpr std::size_t kRendezvousBytes = 64U << 10;

/// A UCX context and its worker, both of one thread: the one that makes it and calls step().
class Worker {
 public:
  /// transports, devices: as UCX_TLS and UCX_NET_DEVICES; empty: the environment's, else all without shared memory.
  /// Throws std::runtime_error with a sentence.
  Worker(const std::string& transports, const std::string& devices);
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker();

  ucp_worker_h get() const { return worker_; }
  /// Messages without a handler are dropped.
  void set_handler(unsigned message_id, ucp_am_recv_callback_t handler, void* argument);
  /// Makes progress. When there was nothing to do for a short while it sleeps before that, until UCX has news, wake is
  /// signalled (it drains it) or the time is over; negative: without end.
  void step(const EventFd& wake, std::chrono::milliseconds longest_sleep);

 private:
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::chrono::steady_clock::time_point spin_until_{};
};

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
  ucs_sock_addr_t ucx() const { return {reinterpret_cast<const sockaddr*>(&storage), length}; }
};
/// Numeric or by name.
Result<SocketAddress> resolve(const std::string& host, std::uint16_t port);

/// "ucx/rdma", "ucx/tcp", or the transport's own name after "ucx/". Only after the first message came back.
std::string lanes_of(ucp_ep_h endpoint);

}  // namespace kvern::ucx
