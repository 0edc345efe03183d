#include "transport/ucx_client.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <unordered_map>

#include "transport/buffer_pool.h"
#include "transport/service_thread.h"
#include "transport/ucx_context.h"
#include "transport/ucx_messages.h"

namespace kvern::ucx {
namespace {

using Clock = std::chrono::steady_clock;

// Loads of a few requests; what lies idle above this goes back to the system.
constexpr std::size_t kMaxIdleBytes = 256U << 20;
constexpr std::size_t kStagingAlignment = 64;
constexpr std::chrono::milliseconds kConnectTimeout{10000};
constexpr std::chrono::milliseconds kStallCheck{250};
// A closed connection ends its operations at once; UCX is given this long before its worker is destroyed regardless.
constexpr std::chrono::seconds kShutdownPatience{5};
constexpr std::chrono::milliseconds kForever{-1};

/// Callers queue operations and wait; one thread owns UCX. An Operation stays where it is until its owner has waited
/// for it. After the first error of the connection the worker is destroyed before the waiting calls are told: no late
/// packet can reach memory that they think is theirs again.
class UcxDataPlane final : public DataPlane {
 public:
  UcxDataPlane(const UcxClientConfig& config, const SocketAddress& address)
      : config_(config), address_(address), where_(config.host + ":" + std::to_string(config.port)) {}

  ~UcxDataPlane() override {
    close();
    if (thread_.joinable()) thread_.join();
  }

  Status start() {
    if (config_.session_token.size() > kMaxTokenBytes) {
      return {Code::kInvalid, "a session token has at most " + std::to_string(kMaxTokenBytes) + " bytes"};
    }
    if (config_.staging_bytes > 0) {
      staging_ = pool_->take(config_.staging_bytes);
      if (!staging_) {
        return {Code::kBusy, "no memory for " + std::to_string(config_.staging_bytes) + " bytes of staging"};
      }
    }
    thread_ = start_service_thread("kvern-ucx", [this] { run(); });
    Operation hello;
    hello.id = kHello;
    start(hello);
    await(hello);
    return hello.result;
  }

  std::string_view name() const override { return name_; }

  Result<std::span<std::byte>> staging(std::uint64_t offset, std::size_t bytes) override {
    if (offset % kStagingAlignment != 0 || offset > config_.staging_bytes || bytes > config_.staging_bytes - offset) {
      return failure(Code::kInvalid, "[" + std::to_string(offset) + ", +" + std::to_string(bytes) +
                                         ") is not inside of the " + std::to_string(config_.staging_bytes) +
                                         " bytes of staging");
    }
    return std::span<std::byte>(staging_.get() + offset, bytes);
  }

  std::unique_ptr<Transfer> start_push(std::uint64_t reservation_id, std::uint64_t offset, std::size_t bytes) override {
    const auto staged = staging(offset, bytes);
    if (!staged) return ended(staged.error());
    auto transfer = std::make_unique<UcxTransfer>(*this);
    Operation& operation = transfer->operation;
    operation.id = kPush;
    operation.header.object_id = reservation_id;
    operation.header.offset = offset;
    operation.memory = *staged;
    start(operation);
    return transfer;
  }

  std::unique_ptr<Transfer> start_pull(std::uint64_t lease_id, std::uint64_t offset, std::size_t bytes) override {
    if (bytes == 0) return ended({Code::kInvalid, "a pull of no bytes"});
    auto transfer = std::make_unique<UcxTransfer>(*this);
    transfer->buffer = pool_->take(bytes);
    if (!transfer->buffer) return ended({Code::kBusy, "no memory for a pull of " + std::to_string(bytes) + " bytes"});
    Operation& operation = transfer->operation;
    operation.id = kPull;
    operation.header.object_id = lease_id;
    operation.header.offset = offset;
    operation.memory = {transfer->buffer.get(), bytes};
    start(operation);
    return transfer;
  }

  void close() override {
    {
      std::lock_guard lock(mutex_);
      if (end_.is_ok()) end_ = {Code::kUnavailable, "the data plane is closed"};
    }
    wake_.signal();
  }

 private:
  struct Operation {
    UcxDataPlane* plane = nullptr;
    MessageId id = kHello;
    RequestHeader header;
    std::span<std::byte> memory;  ///< what a push sends or where a pull goes
    // Of the thread:
    bool sending = false;
    bool receiving = false;
    bool answered = false;
    Status result;
    // Under mutex_:
    bool done = false;  ///< from then on the thread does not touch it
    std::condition_variable wake;
  };

  class UcxTransfer final : public Transfer {
   public:
    explicit UcxTransfer(UcxDataPlane& plane) : plane_(plane) {}
    ~UcxTransfer() override { plane_.await(operation); }
    UcxTransfer(const UcxTransfer&) = delete;
    UcxTransfer& operator=(const UcxTransfer&) = delete;
    Result<PulledBytes> wait() override {
      plane_.await(operation);
      if (!operation.result) return failure(operation.result);
      return buffer ? PulledBytes(std::move(buffer), operation.memory.size()) : PulledBytes();
    }

    Operation operation;
    std::shared_ptr<std::byte[]> buffer;  ///< of a pull

   private:
    UcxDataPlane& plane_;
  };

  static std::unique_ptr<Transfer> ended(Status why) {
    return std::make_unique<EndedTransfer>(failure(std::move(why)));
  }

  void start(Operation& operation) {
    operation.plane = this;
    operation.header.bytes = operation.memory.size();
    operation.header.token_bytes = static_cast<std::uint32_t>(config_.session_token.size());
    std::memcpy(operation.header.token.data(), config_.session_token.data(), config_.session_token.size());
    const std::lock_guard lock(mutex_);
    if (!end_) {
      operation.result = end_;
      operation.done = true;
      return;
    }
    operation.header.request_id = ++last_request_id_;
    queue_.push_back(&operation);
    wake_.signal();
  }

  void await(Operation& operation) {
    std::unique_lock lock(mutex_);
    operation.wake.wait(lock, [&] { return operation.done; });
  }

  // -------------------------------------------------------------- the thread

  void run() {
    try {
      connect();
    } catch (const std::exception& error) {
      finish({Code::kUnavailable, error.what()});
      return;
    }
    while (true) {
      start_queued();
      Status end = end_status();
      if (end && !broken_) end = broken_;
      if (end && stalled()) {
        end = {Code::kUnavailable, name_.empty() ? "no answer from " + where_ + ": is the UCX listener of kvernd there?"
                                                 : "no transfer with " + where_ + " ended in time"};
      }
      if (!end) {
        finish(std::move(end));
        return;
      }
      worker_->step(wake_, active_.empty() ? kForever : kStallCheck);
    }
  }

  void connect() {
    worker_ = std::make_unique<Worker>(config_.transports, config_.devices);
    worker_->set_handler(kAnswer, &on_answer, this);
    worker_->set_handler(kData, &on_data, this);
    ucp_ep_params_t parameters{};
    parameters.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR |
                            UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    parameters.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
    parameters.sockaddr = address_.ucx();
    parameters.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    parameters.err_handler.cb = [](void* self, ucp_ep_h, ucs_status_t status) {
      static_cast<UcxDataPlane*>(self)->break_off(status);
    };
    parameters.err_handler.arg = this;
    if (ucs_status_t status = ucp_ep_create(worker_->get(), &parameters, &endpoint_); status != UCS_OK) {
      throw std::runtime_error("UCX cannot connect to " + where_ + ": " + ucs_status_string(status));
    }
  }

  Status end_status() {
    std::lock_guard lock(mutex_);
    return end_;
  }

  void break_off(ucs_status_t status) {
    if (!broken_) return;
    broken_ = {Code::kUnavailable, (name_.empty() ? "cannot reach kvernd's UCX listener at " + where_ + ": "
                                                  : "the connection to kvernd at " + where_ + " broke: ") +
                                       ucs_status_string(status)};
  }

  bool stalled() const {
    const auto patience = name_.empty() ? std::min(kConnectTimeout, config_.timeout) : config_.timeout;
    return !active_.empty() && Clock::now() - last_end_ > patience;
  }

  void start_queued() {
    std::deque<Operation*> queued;
    {
      std::lock_guard lock(mutex_);
      queued.swap(queue_);
    }
    for (Operation* operation : queued) {
      if (active_.empty()) last_end_ = Clock::now();
      active_.emplace(operation->header.request_id, operation);
      send(operation);
    }
  }

  void send(Operation* operation) {
    const std::span<const std::byte> payload = operation->id == kPush ? operation->memory : std::span<std::byte>();
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS |
                              UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    parameters.flags = UCP_AM_SEND_FLAG_REPLY;
    if (payload.size() >= kRendezvousBytes) parameters.flags |= UCP_AM_SEND_FLAG_RNDV;
    parameters.memory_type = UCS_MEMORY_TYPE_HOST;
    parameters.user_data = operation;
    parameters.cb.send = [](void* request, ucs_status_t status, void* argument) {
      ucp_request_free(request);
      auto* const sent = static_cast<Operation*>(argument);
      sent->plane->sent(sent, status);
    };
    operation->sending = true;
    const ucs_status_ptr_t request =
        ucp_am_send_nbx(endpoint_, operation->id, &operation->header, sizeof operation->header,
                        payload.empty() ? nullptr : payload.data(), payload.size(), &parameters);
    if (!UCS_PTR_IS_PTR(request)) sent(operation, UCS_PTR_STATUS(request));
  }

  void sent(Operation* operation, ucs_status_t status) {
    operation->sending = false;
    if (status != UCS_OK) {
      break_off(status);
    } else {
      complete_if_over(operation);
    }
  }

  void received(Operation* operation, ucs_status_t status) {
    operation->receiving = false;
    if (status != UCS_OK) {
      break_off(status);
    } else {
      complete_if_over(operation);
    }
  }

  void complete_if_over(Operation* operation) {
    if (operation->sending || operation->receiving || !operation->answered) return;
    active_.erase(operation->header.request_id);
    last_end_ = Clock::now();
    complete(operation);
  }

  void complete(Operation* operation) {
    std::lock_guard lock(mutex_);
    operation->done = true;
    operation->wake.notify_one();
  }

  /// The operation that an answer is for; null when there is none, or it was answered already.
  Operation* find(const void* bytes, std::size_t count, std::size_t payload, AnswerHeader* header) {
    if (!parse(bytes, count, header) || header->bytes != payload) return nullptr;
    const auto found = active_.find(header->request_id);
    return found == active_.end() || found->second->answered ? nullptr : found->second;
  }

  static ucs_status_t on_answer(void* self, const void* bytes, std::size_t count, void* data, std::size_t payload,
                                const ucp_am_recv_param_t* parameters) {
    auto* const plane = static_cast<UcxDataPlane*>(self);
    AnswerHeader header;
    Operation* const operation = plane->find(bytes, count, payload, &header);
    if (operation == nullptr || (parameters->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) return UCS_OK;
    operation->answered = true;
    const auto code = static_cast<Code>(header.code);
    if (header.code > static_cast<std::uint32_t>(Code::kInternal) || (code == Code::kOk && operation->id == kPull)) {
      operation->result = {Code::kInvalid, "kvernd at " + plane->where_ + " gave an answer that makes no sense"};
    } else if (code != Code::kOk) {
      operation->result = {code, std::string(static_cast<const char*>(data), std::min(payload, kMaxTextBytes))};
    } else if (operation->id == kHello) {
      plane->name_ = lanes_of(plane->endpoint_);
    }
    plane->complete_if_over(operation);
    return UCS_OK;
  }

  static ucs_status_t on_data(void* self, const void* bytes, std::size_t count, void* data, std::size_t payload,
                              const ucp_am_recv_param_t* parameters) {
    auto* const plane = static_cast<UcxDataPlane*>(self);
    AnswerHeader header;
    Operation* const operation = plane->find(bytes, count, payload, &header);
    if (operation == nullptr || operation->id != kPull) return UCS_OK;
    operation->answered = true;
    if (payload != operation->memory.size()) {
      operation->result = {Code::kInvalid, "kvernd at " + plane->where_ + " sent another number of bytes than asked"};
      plane->complete_if_over(operation);
      return UCS_OK;
    }
    if ((parameters->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0) {
      std::memcpy(operation->memory.data(), data, payload);
      plane->complete_if_over(operation);
      return UCS_OK;
    }
    operation->receiving = true;
    ucp_request_param_t receive{};
    receive.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    receive.memory_type = UCS_MEMORY_TYPE_HOST;
    receive.user_data = operation;
    receive.cb.recv_am = [](void* request, ucs_status_t status, std::size_t, void* argument) {
      ucp_request_free(request);
      auto* const filled = static_cast<Operation*>(argument);
      filled->plane->received(filled, status);
    };
    const ucs_status_ptr_t request =
        ucp_am_recv_data_nbx(plane->worker_->get(), data, operation->memory.data(), payload, &receive);
    if (!UCS_PTR_IS_PTR(request)) plane->received(operation, UCS_PTR_STATUS(request));
    return UCS_INPROGRESS;
  }

  /// Ends UCX, then all calls.
  void finish(Status why) {
    if (endpoint_ != nullptr) close_endpoint();
    worker_.reset();
    std::lock_guard lock(mutex_);
    end_ = std::move(why);
    for (const auto& [id, operation] : active_) queue_.push_back(operation);
    for (Operation* operation : queue_) {
      operation->result = end_;
      operation->done = true;
      operation->wake.notify_one();
    }
    queue_.clear();
  }

  void close_endpoint() {
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    parameters.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t request = ucp_ep_close_nbx(endpoint_, &parameters);
    const auto closed = [&] { return !UCS_PTR_IS_PTR(request) || ucp_request_check_status(request) != UCS_INPROGRESS; };
    const auto in_hands_of_ucx = [](const auto& entry) { return entry.second->sending || entry.second->receiving; };
    const auto deadline = Clock::now() + kShutdownPatience;
    while ((!closed() || std::any_of(active_.begin(), active_.end(), in_hands_of_ucx)) && Clock::now() < deadline) {
      worker_->step(wake_, std::chrono::milliseconds(1));
    }
    if (UCS_PTR_IS_PTR(request)) ucp_request_free(request);
  }

  const UcxClientConfig config_;
  const SocketAddress address_;
  const std::string where_;
  const std::shared_ptr<BufferPool> pool_ = BufferPool::create(kMaxIdleBytes);
  std::shared_ptr<std::byte[]> staging_;
  EventFd wake_;
  std::thread thread_;

  std::mutex mutex_;
  std::deque<Operation*> queue_;
  std::uint64_t last_request_id_ = 0;
  Status end_;  ///< not ok: no more operations

  // Of the thread; name_ is written before start() returns.
  std::unique_ptr<Worker> worker_;
  ucp_ep_h endpoint_ = nullptr;
  std::unordered_map<std::uint64_t, Operation*> active_;
  Status broken_;
  Clock::time_point last_end_{};
  std::string name_;
};

}  // namespace

Result<std::unique_ptr<DataPlane>> connect(const UcxClientConfig& config) {
  const auto address = resolve(config.host, config.port);
  if (!address) return failure(address.error());
  auto plane = std::make_unique<UcxDataPlane>(config, *address);
  if (Status started = plane->start(); !started) return failure(std::move(started));
  return plane;
}

}  // namespace kvern::ucx
