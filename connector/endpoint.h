#pragma once

#include "base/status.h"
#include "connector/client.h"
#include "transport/control.h"

namespace kvern {

/// The control endpoint that an address names, with its keys read from their files: unix:///path -> ipc:///path (keys
/// are not used), tcp://host:port stays and needs both key files unless insecure is set.
Result<ControlClientConfig> control_client_config(const ClientConfig& config);

}  // namespace kvern
