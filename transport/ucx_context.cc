#include "transport/ucx_context.h"

#include <netdb.h>
#include <poll.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "transport/ucx_messages.h"

namespace kvern::ucx {
namespace {

using Clock = std::chrono::steady_clock;

// A wake-up costs 25 to 100 us; within a transfer the next segment is there sooner.
constexpr std::chrono::microseconds kSpin{100};
// "^": all but these. The same host has a better way of its own, and must not take this one silently.
constexpr const char* kDefaultTransports = "^shm,self";

void modify(ucp_config_t* config, const char* name, const std::string& value) {
  if (ucp_config_modify(config, name, value.c_str()) != UCS_OK) {
    ucp_config_release(config);
    throw std::runtime_error("UCX does not take '" + value + "' as UCX_" + name);
  }
}

}  // namespace

Result<std::string> version() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release = 0;
  ucp_get_version(&major, &minor, &release);
  const std::string loaded = std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release);
  if (UCP_VERSION(major, minor) < UCP_API_VERSION) {
    return failure(Code::kRefused, "UCX " + loaded + " is loaded, but Kvern was built for " +
                                       std::to_string(UCP_API_MAJOR) + "." + std::to_string(UCP_API_MINOR) +
                                       " or later: put the right library first on the library path");
  }
  return loaded;
}

Worker::Worker(const std::string& transports, const std::string& devices) {
  if (const auto loaded = version(); !loaded) throw std::runtime_error(loaded.error().message());
  ucp_config_t* config = nullptr;
  if (ucs_status_t status = ucp_config_read(nullptr, nullptr, &config); status != UCS_OK) {
    throw std::runtime_error(std::string("UCX cannot read its configuration (UCX_* in the environment): ") +
                             ucs_status_string(status));
  }
  if (!transports.empty()) {
    modify(config, "TLS", transports);
  } else if (std::getenv("UCX_TLS") == nullptr) {
    modify(config, "TLS", kDefaultTransports);
  }
  if (!devices.empty()) modify(config, "NET_DEVICES", devices);

  ucp_params_t parameters{};
  parameters.field_mask = UCP_PARAM_FIELD_FEATURES;
  parameters.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  const ucs_status_t started = ucp_init(&parameters, config, &context_);
  ucp_config_release(config);
  if (started != UCS_OK) {
    throw std::runtime_error(std::string("UCX cannot start with transports '") +
                             (transports.empty() ? kDefaultTransports : transports) + "' and devices '" +
                             (devices.empty() ? "all" : devices) + "': " + ucs_status_string(started) +
                             "; `ucx_info -d` lists what this host has");
  }
  ucp_worker_params_t worker_parameters{};
  worker_parameters.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_parameters.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucs_status_t status = ucp_worker_create(context_, &worker_parameters, &worker_);
  if (status != UCS_OK) {
    ucp_cleanup(context_);
    throw std::runtime_error(std::string("UCX cannot make a worker: ") + ucs_status_string(status));
  }
  status = ucp_worker_get_efd(worker_, &event_fd_);
  if (status != UCS_OK) {
    ucp_worker_destroy(worker_);
    ucp_cleanup(context_);
    throw std::runtime_error(std::string("UCX gives no descriptor to wait on: ") + ucs_status_string(status));
  }
  // UCX 1.13 leaves table entries uninitialised that were never set, and jumps into them when a peer names one. From
  // the highest id down the table gets exactly this size.
  for (unsigned id = kLastMessage + 1; id-- > 0;) {
    set_handler(
        id, [](void*, const void*, std::size_t, void*, std::size_t, const ucp_am_recv_param_t*) { return UCS_OK; },
        nullptr);
  }
}

Worker::~Worker() {
  ucp_worker_destroy(worker_);
  ucp_cleanup(context_);
}

void Worker::set_handler(unsigned message_id, ucp_am_recv_callback_t handler, void* argument) {
  ucp_am_handler_param_t parameters{};
  parameters.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                          UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  parameters.id = message_id;
  parameters.flags = UCP_AM_FLAG_WHOLE_MSG;
  parameters.cb = handler;
  parameters.arg = argument;
  // Fails only for lack of memory; the message is dropped then like any unknown one.
  ucp_worker_set_am_recv_handler(worker_, &parameters);
}

void Worker::step(const EventFd& wake, std::chrono::milliseconds longest_sleep) {
  if (Clock::now() >= spin_until_ && ucp_worker_arm(worker_) == UCS_OK) {
    pollfd polled[] = {{event_fd_, POLLIN, 0}, {wake.fd(), POLLIN, 0}};
    ::poll(polled, 2, static_cast<int>(longest_sleep.count()));
    if ((polled[1].revents & POLLIN) != 0) wake.drain();
  }
  // Last, so that the caller sees what the callbacks left for him before the next sleep.
  while (ucp_worker_progress(worker_) != 0) spin_until_ = Clock::now() + kSpin;
}

Result<SocketAddress> resolve(const std::string& host, std::uint16_t port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (error != 0) return failure(Code::kUnavailable, "cannot resolve '" + host + "': " + ::gai_strerror(error));
  SocketAddress address;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  address.length = found->ai_addrlen;
  ::freeaddrinfo(found);
  return address;
}

std::string lanes_of(ucp_ep_h endpoint) {
  char* text = nullptr;
  std::size_t bytes = 0;
  FILE* const memory = ::open_memstream(&text, &bytes);
  if (memory == nullptr) return "ucx";
  ucp_ep_print_info(endpoint, memory);
  std::fclose(memory);
  const std::string info(text, bytes);
  std::free(text);
  // Lines like "lane[0]:  2:tcp/eth0.0 md[1] -> ...": UCX 1.13 has no other way to ask.
  std::string name = "ucx";
  for (std::size_t at = info.find("lane["); at != std::string::npos; at = info.find("lane[", at + 1)) {
    const std::size_t colon = info.find(':', info.find("]:", at) + 2);
    const std::size_t slash = info.find('/', colon);
    if (colon == std::string::npos || slash == std::string::npos) continue;
    const std::string transport = info.substr(colon + 1, slash - colon - 1);
    if (transport.starts_with("rc") || transport.starts_with("dc") || transport.starts_with("ud")) return "ucx/rdma";
    name = "ucx/" + transport;
  }
  return name;
}

}  // namespace kvern::ucx
