#include <unistd.h>

#include <chrono>
#include <utility>

#include "connector/endpoint.h"
#include "kernels/container.h"
#include "kvernctl/commands.h"
#include "transport/wire.h"

namespace kvern {

ClientConfig DaemonAddress::client_config(const std::string& name) const {
  ClientConfig config;
  config.address = address;
  config.server_key_file = server_key_file;
  config.client_key_file = client_key_file;
  config.insecure = insecure;
  config.client_name = name;
  config.connect_timeout_ms = timeout_ms;
  return config;
}

Result<ToolSession> ToolSession::open(const DaemonAddress& address) {
  auto control_config = control_client_config(address.client_config("kvernctl"));
  if (!control_config) return failure(control_config.error());
  ToolSession session;
  session.timeout_ms_ = address.timeout_ms;
  session.control_ = std::make_shared<ControlClient>(*control_config);

  wire::ControlRequest request;
  auto* hello = request.mutable_hello();
  hello->mutable_versions()->set_protocol(kProtocolVersion);
  hello->mutable_versions()->set_container(kContainerVersion);
  hello->set_role(wire::ROLE_TOOL);
  hello->set_client_name("kvernctl:" + std::to_string(getpid()));
  wire::ControlReply reply;
  const Status status = session.call(request, &reply);
  if (status.code() == Code::kUnavailable) {
    return failure(Code::kUnavailable, "no daemon answers at " + address.address + " within " +
                                           std::to_string(address.timeout_ms) +
                                           " ms: is kvernd running, and is this its socket ([server] socket)?");
  }
  if (!status) return failure(status);
  session.welcome_ = reply.welcome();
  return session;
}

Status ToolSession::call(wire::ControlRequest& request, wire::ControlReply* reply) {
  request.set_session_token(welcome_.session_token());
  const Status sent = control_->call(request, reply, std::chrono::milliseconds(timeout_ms_));
  return sent ? to_status(reply->status()) : sent;
}

}  // namespace kvern
