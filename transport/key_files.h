#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "transport/control.h"

namespace kvern {

/// CURVE keys on disk, as `kvernctl keygen` writes them. Lines "public = <Z85>" and, in the secret file only,
/// "secret = <Z85>"; lines that begin with '#' are remarks.
///   NAME.key  secret file, mode 0600: both lines
///   NAME.pub  public file: the first line, to hand out

/// Writes both files; kRefused when one exists already (keys are never overwritten).
Status write_key_files(const std::string& directory, const std::string& name, const CurveKeyPair& keys);
/// A secret file. kRefused when others may read it, with the chmod that mends it. A group may where the file is root's
/// and we are not: so do secrets look that Kubernetes mounts.
Result<CurveKeyPair> read_secret_key_file(const std::string& path);
/// The public key of either kind of file.
Result<std::string> read_public_key_file(const std::string& path);

/// A client that the daemon lets in: a line "name <Z85 public key>" of its allowed_clients_file, with a third word
/// "admin" for those that may ask about and flush what all tenants have.
struct AllowedClient {
  std::string name;  ///< becomes the tenant
  std::string public_key;
  bool admin = false;
};
Result<std::vector<AllowedClient>> read_allowed_clients_file(const std::string& path);

}  // namespace kvern
