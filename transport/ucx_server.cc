#include "transport/ucx_server.h"

#include <arpa/inet.h>

#include <atomic>
#include <cstring>
#include <future>
#include <unordered_map>
#include <vector>

#include "transport/service_thread.h"
#include "transport/ucx_context.h"
#include "transport/ucx_messages.h"

namespace kvern::ucx {
namespace {

using Clock = std::chrono::steady_clock;

// A client has one operation per call under way; more than this from one peer is a flood.
constexpr std::size_t kMaxOperationsPerConnection = 1024;
// How often stalled peers are looked for while something is under way.
constexpr std::chrono::milliseconds kStallCheck{250};
// A closed connection ends its operations at once; UCX is given this long before its worker is destroyed regardless.
constexpr std::chrono::seconds kShutdownPatience{5};
constexpr std::chrono::milliseconds kForever{-1};

/// All members but port_ and stopping_ belong to the thread.
class Server final : public UcxListener {
 public:
  Server(const UcxServerConfig& config, UcxServerHandler& handler) : config_(config), handler_(handler) {}

  ~Server() override {
    stopping_.store(true);
    wake_.signal();
    if (thread_.joinable()) thread_.join();
  }

  Status start() {
    std::promise<Status> ready;
    auto started = ready.get_future();
    thread_ = start_service_thread("kvern-ucx", [this, &ready] { run(ready); });
    return started.get();
  }

  std::uint16_t port() const override { return port_; }

 private:
  struct Connection;

  /// One push, pull or answer that UCX has in its hands.
  struct Operation {
    enum class Kind { kAnswer, kPush, kPull };
    Server* server;
    Connection* connection;
    Kind kind;
    RequestHeader request;
    AnswerHeader answer;
    std::string text;
    Status result;
  };

  struct Connection {
    Server* server;
    ucp_ep_h endpoint = nullptr;
    std::unordered_map<Operation*, std::unique_ptr<Operation>> active;
    Clock::time_point last_end{};  ///< of an operation, or the beginning of the only one
    bool failing = false;
    Status why;
    bool closing = false;
    bool closed = false;
    /// Pushes and pulls that ended with the connection. They are reported when the endpoint is closed: only then can
    /// no late packet touch their memory any more.
    std::vector<std::unique_ptr<Operation>> ended;
  };

  void run(std::promise<Status>& ready) {
    try {
      listen();
    } catch (const std::exception& error) {
      worker_.reset();
      ready.set_value({Code::kUnavailable, error.what()});
      return;
    }
    ready.set_value(Status::ok());
    while (!stopping_.load(std::memory_order_relaxed)) {
      accept_waiting();
      close_failing();
      worker_->step(wake_, operations_ + failing_ == 0 ? kForever : kStallCheck);
      find_stalled();
    }
    shut_down();
  }

  void listen() {
    worker_ = std::make_unique<Worker>(config_.transports, config_.devices);
    worker_->set_handler(kHello, &on_request<kHello>, this);
    worker_->set_handler(kPush, &on_request<kPush>, this);
    worker_->set_handler(kPull, &on_request<kPull>, this);
    const auto address = resolve(config_.listen_address, config_.port);
    if (!address) throw std::runtime_error(address.error().message());
    ucp_listener_params_t parameters{};
    parameters.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
    parameters.sockaddr = address->ucx();
    parameters.conn_handler.cb = [](ucp_conn_request_h request, void* self) {
      static_cast<Server*>(self)->waiting_.push_back(request);
    };
    parameters.conn_handler.arg = this;
    const std::string where = config_.listen_address + ":" + std::to_string(config_.port);
    if (ucs_status_t status = ucp_listener_create(worker_->get(), &parameters, &listener_); status != UCS_OK) {
      throw std::runtime_error("UCX cannot listen on " + where + ": " + ucs_status_string(status) +
                               (status == UCS_ERR_BUSY ? ": another process has the port" : ""));
    }
    ucp_listener_attr_t attributes{};
    attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
    if (ucp_listener_query(listener_, &attributes) == UCS_OK) {
      const auto* any = &attributes.sockaddr;
      port_ = ntohs(any->ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6*>(any)->sin6_port
                                               : reinterpret_cast<const sockaddr_in*>(any)->sin_port);
    }
  }

  void accept_waiting() {
    for (ucp_conn_request_h request : std::exchange(waiting_, {})) {
      auto connection = std::make_unique<Connection>();
      connection->server = this;
      ucp_ep_params_t parameters{};
      parameters.field_mask =
          UCP_EP_PARAM_FIELD_CONN_REQUEST | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
      parameters.conn_request = request;
      parameters.err_mode = UCP_ERR_HANDLING_MODE_PEER;
      parameters.err_handler.cb = [](void* argument, ucp_ep_h, ucs_status_t status) {
        auto* const lost = static_cast<Connection*>(argument);
        lost->server->fail(*lost, {Code::kUnavailable, std::string("the peer is gone: ") + ucs_status_string(status)});
      };
      parameters.err_handler.arg = connection.get();
      if (ucp_ep_create(worker_->get(), &parameters, &connection->endpoint) != UCS_OK) continue;  // it went meanwhile
      connections_.emplace(connection->endpoint, std::move(connection));
    }
  }

  void fail(Connection& connection, Status why) {
    if (connection.failing) return;
    connection.failing = true;
    connection.why = std::move(why);
    ++failing_;
  }

  /// Closes failed connections and forgets those that are closed. Nothing here runs inside a callback of UCX.
  void close_failing() {
    if (failing_ == 0) return;
    for (auto at = connections_.begin(); at != connections_.end();) {
      Connection& connection = *at->second;
      if (connection.failing && !connection.closing) close(connection);
      if (connection.closed && connection.active.empty()) {
        for (const auto& operation : connection.ended) report(*operation);
        at = connections_.erase(at);
        --failing_;
      } else {
        ++at;
      }
    }
  }

  void close(Connection& connection) {
    connection.closing = true;
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    parameters.flags = UCP_EP_CLOSE_FLAG_FORCE;
    parameters.user_data = &connection;
    parameters.cb.send = [](void* request, ucs_status_t, void* argument) {
      static_cast<Connection*>(argument)->closed = true;
      ucp_request_free(request);
    };
    const ucs_status_ptr_t request = ucp_ep_close_nbx(connection.endpoint, &parameters);
    if (!UCS_PTR_IS_PTR(request)) connection.closed = true;
  }

  void find_stalled() {
    const auto now = Clock::now();
    if (operations_ == 0 || now < next_stall_check_) return;
    next_stall_check_ = now + kStallCheck;
    for (auto& [endpoint, connection] : connections_) {
      if (!connection->active.empty() && now - connection->last_end > config_.stall_timeout) {
        fail(*connection, {Code::kUnavailable,
                           "the peer took no data for " + std::to_string(config_.stall_timeout.count()) + " ms"});
      }
    }
  }

  void shut_down() {
    for (ucp_conn_request_h request : waiting_) ucp_listener_reject(listener_, request);
    ucp_listener_destroy(listener_);
    for (auto& [endpoint, connection] : connections_) fail(*connection, {Code::kUnavailable, "the daemon stops"});
    const auto deadline = Clock::now() + kShutdownPatience;
    while (!connections_.empty() && Clock::now() < deadline) {
      close_failing();
      worker_->step(wake_, std::chrono::milliseconds(1));
    }
    worker_.reset();
    // What UCX did not hand back is not touched any more now that its worker is gone.
    for (auto& [endpoint, connection] : connections_) {
      for (auto& [key, operation] : connection->active) {
        operation->result = connection->why;
        connection->ended.push_back(std::move(operation));
      }
      for (const auto& operation : connection->ended) report(*operation);
    }
  }

  // -------------------------------------------------------------- messages

  template <MessageId kId>
  static ucs_status_t on_request(void* self, const void* header, std::size_t header_bytes, void* data,
                                 std::size_t bytes, const ucp_am_recv_param_t* parameters) {
    auto* const server = static_cast<Server*>(self);
    // Without a connection of ours to answer on the message is dropped.
    if ((parameters->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) == 0) return UCS_OK;
    const auto found = server->connections_.find(parameters->reply_ep);
    if (found == server->connections_.end() || found->second->failing) return UCS_OK;
    Connection& connection = *found->second;
    if (connection.active.size() >= kMaxOperationsPerConnection) {
      server->fail(connection, {Code::kRefused, "the peer has too many operations under way"});
      return UCS_OK;
    }
    RequestHeader request;
    if (!parse(header, header_bytes, &request)) {
      server->answer(connection, request,
                     {Code::kRefused, "the header is not of version " + std::to_string(kDataPlaneVersion) +
                                          " of the UCX data plane: run the same Kvern on both hosts"});
      return UCS_OK;
    }
    if constexpr (kId == kHello) {
      server->answer(connection, request, Status::ok());
    } else if constexpr (kId == kPush) {
      const bool announced = (parameters->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
      return server->push(connection, request, data, bytes, announced);
    } else {
      server->pull(connection, request);
    }
    return UCS_OK;
  }

  ucs_status_t push(Connection& connection, const RequestHeader& request, void* data, std::size_t bytes,
                    bool announced) {
    if (bytes != request.bytes || bytes == 0 || bytes > config_.max_pull_bytes) {
      answer(connection, request, {Code::kInvalid, "the payload has not the size that its header names"});
      return UCS_OK;
    }
    const auto place = handler_.begin_push(request.session_token(), request.object_id, request.offset, bytes);
    if (!place) {
      answer(connection, request, place.error());
      return UCS_OK;
    }
    if (place->size() != bytes) {
      end_push(connection, request, {Code::kInternal, "the reservation has another size"});
      return UCS_OK;
    }
    if (!announced) {
      std::memcpy(place->data(), data, bytes);
      end_push(connection, request, Status::ok());
      return UCS_OK;
    }
    Operation* const operation = begin(connection, Operation::Kind::kPush, request);
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    parameters.memory_type = UCS_MEMORY_TYPE_HOST;
    parameters.user_data = operation;
    parameters.cb.recv_am = [](void* request_handle, ucs_status_t status, std::size_t, void* argument) {
      ucp_request_free(request_handle);
      end(static_cast<Operation*>(argument), status);
    };
    started(operation, ucp_am_recv_data_nbx(worker_->get(), data, place->data(), bytes, &parameters));
    return UCS_INPROGRESS;
  }

  void pull(Connection& connection, const RequestHeader& request) {
    if (request.bytes == 0 || request.bytes > config_.max_pull_bytes) {
      answer(connection, request,
             {Code::kInvalid, "a pull of " + std::to_string(request.bytes) + " bytes; at most " +
                                  std::to_string(config_.max_pull_bytes) + " are allowed"});
      return;
    }
    const auto source = handler_.begin_pull(request.session_token(), request.object_id, request.offset, request.bytes);
    if (!source) {
      answer(connection, request, source.error());
      return;
    }
    if (source->size() != request.bytes) {
      const Status wrong{Code::kInternal, "the lease has another size"};
      handler_.pulled(request.session_token(), request.object_id, wrong);
      answer(connection, request, wrong);
      return;
    }
    Operation* const operation = begin(connection, Operation::Kind::kPull, request);
    operation->answer.bytes = source->size();
    send(operation, kData, source->data(), source->size());
  }

  void end_push(Connection& connection, const RequestHeader& request, const Status& status) {
    handler_.pushed(request.session_token(), request.object_id, status);
    answer(connection, request, status);
  }

  void answer(Connection& connection, const RequestHeader& request, const Status& status) {
    Operation* const operation = begin(connection, Operation::Kind::kAnswer, request);
    operation->answer.code = static_cast<std::uint32_t>(status.code());
    operation->text = status.message().substr(0, kMaxTextBytes);
    operation->answer.bytes = operation->text.size();
    send(operation, kAnswer, operation->text.data(), operation->text.size());
  }

  // -------------------------------------------------------------- operations

  Operation* begin(Connection& connection, Operation::Kind kind, const RequestHeader& request) {
    auto owned = std::make_unique<Operation>();
    Operation* const operation = owned.get();
    operation->server = this;
    operation->connection = &connection;
    operation->kind = kind;
    operation->request = request;
    operation->answer.request_id = request.request_id;
    if (connection.active.empty()) connection.last_end = Clock::now();
    connection.active.emplace(operation, std::move(owned));
    ++operations_;
    return operation;
  }

  void send(Operation* operation, MessageId id, const void* payload, std::size_t bytes) {
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS |
                              UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    parameters.flags = 0;
    if (bytes >= kRendezvousBytes) parameters.flags = UCP_AM_SEND_FLAG_RNDV;
    parameters.memory_type = UCS_MEMORY_TYPE_HOST;
    parameters.user_data = operation;
    parameters.cb.send = [](void* request, ucs_status_t status, void* argument) {
      ucp_request_free(request);
      end(static_cast<Operation*>(argument), status);
    };
    started(operation, ucp_am_send_nbx(operation->connection->endpoint, id, &operation->answer,
                                       sizeof operation->answer, payload, bytes, &parameters));
  }

  /// UCX calls back only what it did not finish at once.
  static void started(Operation* operation, ucs_status_ptr_t request) {
    if (!UCS_PTR_IS_PTR(request)) end(operation, UCS_PTR_STATUS(request));
  }

  static void end(Operation* raw, ucs_status_t status) {
    Connection& connection = *raw->connection;
    Server& server = *raw->server;
    std::unique_ptr<Operation> operation = std::move(connection.active.extract(raw).mapped());
    --server.operations_;
    connection.last_end = Clock::now();
    if (status != UCS_OK) {
      server.fail(connection, {Code::kUnavailable, std::string("transfer failed: ") + ucs_status_string(status)});
      operation->result = connection.why;
      connection.ended.push_back(std::move(operation));
      return;
    }
    server.report(*operation);
    if (operation->kind == Operation::Kind::kPush && !connection.failing) {
      server.answer(connection, operation->request, Status::ok());
    }
  }

  void report(const Operation& operation) {
    const RequestHeader& request = operation.request;
    if (operation.kind == Operation::Kind::kPush) {
      handler_.pushed(request.session_token(), request.object_id, operation.result);
    } else if (operation.kind == Operation::Kind::kPull) {
      handler_.pulled(request.session_token(), request.object_id, operation.result);
    }
  }

  const UcxServerConfig config_;
  UcxServerHandler& handler_;
  std::atomic<bool> stopping_{false};
  EventFd wake_;
  std::uint16_t port_ = 0;

  std::unique_ptr<Worker> worker_;
  ucp_listener_h listener_ = nullptr;
  std::vector<ucp_conn_request_h> waiting_;
  std::unordered_map<ucp_ep_h, std::unique_ptr<Connection>> connections_;
  std::size_t failing_ = 0;
  std::size_t operations_ = 0;
  Clock::time_point next_stall_check_{};
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<UcxListener>> listen(const UcxServerConfig& config, UcxServerHandler& handler) {
  auto server = std::make_unique<Server>(config, handler);
  if (Status started = server->start(); !started) return failure(std::move(started));
  return server;
}

}  // namespace kvern::ucx
