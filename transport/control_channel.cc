#include <atomic>
#include <utility>

#include "transport/control.h"

namespace kvern {
namespace {

class ControlChannel final : public Channel {
 public:
  ControlChannel(std::shared_ptr<ControlClient> client, std::string session_token)
      : client_(std::move(client)), session_token_(std::move(session_token)) {}

  bool alive() const override { return alive_.load(std::memory_order_relaxed); }

  void close() override {
    alive_.store(false, std::memory_order_relaxed);
    client_->close();
  }

 protected:
  Status do_call(wire::HotRequest& request, wire::HotReply* reply, std::chrono::milliseconds timeout) override {
    if (!alive()) return {Code::kUnavailable, "the session's connection is closed: register again"};
    request.set_id(next_id_.fetch_add(1, std::memory_order_relaxed));
    wire::ControlRequest envelope;
    envelope.set_session_token(session_token_);
    envelope.mutable_hot()->Swap(&request);
    wire::ControlReply answer;
    const Status sent = client_->call(envelope, &answer, timeout);
    envelope.mutable_hot()->Swap(&request);
    if (!sent) return sent;
    if (const Status status = to_status(answer.status()); !status) {
      if (status.code() == Code::kExpired) alive_.store(false, std::memory_order_relaxed);
      return status;
    }
    if (!answer.has_hot()) return {Code::kInvalid, "the daemon answered a hot message with another kind of message"};
    reply->Swap(answer.mutable_hot());
    return Status::ok();
  }

 private:
  const std::shared_ptr<ControlClient> client_;
  const std::string session_token_;
  std::atomic<std::uint64_t> next_id_{1};
  std::atomic<bool> alive_{true};
};

}  // namespace

std::unique_ptr<Channel> make_control_channel(std::shared_ptr<ControlClient> client, std::string session_token) {
  return std::make_unique<ControlChannel>(std::move(client), std::move(session_token));
}

}  // namespace kvern
