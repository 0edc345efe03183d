#include "transport/wire.h"

namespace kvern {

void set_status(const Status& status, wire::StatusMessage* message) {
  message->set_code(static_cast<std::uint32_t>(status.code()));
  message->set_message(status.message());
}

Status to_status(const wire::StatusMessage& message) {
  if (message.code() > static_cast<std::uint32_t>(Code::kInternal)) {
    return Status(Code::kInternal, "unknown status code " + std::to_string(message.code()) + ": " + message.message());
  }
  const auto code = static_cast<Code>(message.code());
  return code == Code::kOk ? Status::ok() : Status(code, message.message());
}

void add_codec(std::string_view spec, std::string* of_all) {
  if (spec.empty() || spec == *of_all) return;
  *of_all = of_all->empty() ? spec : kMixedCodecs;
}

}  // namespace kvern
