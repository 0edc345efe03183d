#include "connector/endpoint.h"

#include "transport/key_files.h"

namespace kvern {

Result<ControlClientConfig> control_client_config(const ClientConfig& config) {
  constexpr std::string_view kUnix = "unix://";
  constexpr std::string_view kTcp = "tcp://";
  ControlClientConfig control;
  if (config.address.starts_with(kUnix)) {
    control.endpoint = "ipc://" + config.address.substr(kUnix.size());
    return control;
  }
  if (!config.address.starts_with(kTcp)) {
    return failure(Code::kInvalid,
                   "the address must be unix:///path/to/kvernd.sock or tcp://host:port, not '" + config.address + "'");
  }
  control.endpoint = config.address;
  if (config.insecure) return control;
  if (config.server_key_file.empty() || config.client_key_file.empty()) {
    return failure(Code::kInvalid, config.address +
                                       " needs server_key_file and client_key_file (kvernctl keygen makes them), or "
                                       "insecure = true written out on a network that you trust");
  }
  auto server_key = read_public_key_file(config.server_key_file);
  if (!server_key) return failure(server_key.error());
  auto client_keys = read_secret_key_file(config.client_key_file);
  if (!client_keys) return failure(client_keys.error());
  control.server_key = *server_key;
  control.client_keys = *client_keys;
  return control;
}

}  // namespace kvern
