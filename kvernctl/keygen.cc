#include <ostream>

#include "kvernctl/commands.h"
#include "transport/key_files.h"

namespace kvern {

int run_keygen(const std::string& directory, const std::string& name, std::ostream& out) {
  const auto keys = generate_curve_keys();
  if (!keys) {
    out << keys.error().to_string() << "\n";
    return 2;
  }
  if (const Status written = write_key_files(directory, name, *keys); !written) {
    out << written.to_string() << "\n";
    return 2;
  }
  const std::string base = directory + "/" + name;
  out << "secret key  " << base << ".key  (daemon: [server] server_key_file; client: kvern.client_key_file)\n"
      << "public key  " << base << ".pub  (client: kvern.server_key_file; daemon: one line \"" << name << " "
      << keys->public_key << "\" in [server] allowed_clients_file)\n";
  return 0;
}

}  // namespace kvern
