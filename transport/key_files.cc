#include "transport/key_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "transport/shared_memory.h"

namespace kvern {
namespace {

constexpr std::size_t kZ85KeyChars = 40;

Status write_file(const std::string& path, const std::string& text, mode_t mode) {
  const UniqueFd file(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode));
  if (!file) {
    if (errno == EEXIST) return {Code::kRefused, path + " exists: keys are not overwritten, choose another --name"};
    return {Code::kInternal, "cannot create " + path + ": " + std::strerror(errno)};
  }
  if (write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    return {Code::kInternal, "cannot write " + path + ": " + std::strerror(errno)};
  }
  return Status::ok();
}

/// The value of "name = value"; empty when there is no such line.
Result<std::string> read_key(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  if (!file) {
    const int error = errno;
    const std::string what = "cannot read the key file " + path + " (" + std::strerror(error) + ")";
    return failure(Code::kNotFound, error == ENOENT ? what + ": make one with `kvernctl keygen`" : what);
  }
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string key;
    std::string equals;
    std::string value;
    if (!(words >> key >> equals >> value) || key != name || equals != "=") continue;
    if (value.size() != kZ85KeyChars) {
      return failure(Code::kInvalid, path + ": the " + name + " key has " + std::to_string(value.size()) +
                                         " characters instead of " + std::to_string(kZ85KeyChars));
    }
    return value;
  }
  return failure(Code::kInvalid, path + " has no line \"" + name + " = …\": make key files with `kvernctl keygen`");
}

}  // namespace

Status write_key_files(const std::string& directory, const std::string& name, const CurveKeyPair& keys) {
  const std::string base = directory + "/" + name;
  const std::string public_line = "public = " + keys.public_key + "\n";
  const Status secret = write_file(
      base + ".key",
      "# CURVE key pair of Kvern. Keep it secret.\n" + public_line + "secret = " + keys.secret_key + "\n", 0600);
  if (!secret) return secret;
  return write_file(base + ".pub", "# Public CURVE key of Kvern. Hand it out.\n" + public_line, 0644);
}

Result<CurveKeyPair> read_secret_key_file(const std::string& path) {
  struct stat about {};
  const bool there = stat(path.c_str(), &about) == 0;
  const mode_t others = about.st_uid == 0 && geteuid() != 0 ? 037U : 077U;
  if (there && (about.st_mode & others) != 0) {
    return failure(Code::kRefused, path + " can be read by others: chmod 600 " + path);
  }
  auto public_key = read_key(path, "public");
  if (!public_key) return failure(public_key.error());
  auto secret_key = read_key(path, "secret");
  if (!secret_key) return failure(secret_key.error());
  return CurveKeyPair{*public_key, *secret_key};
}

Result<std::string> read_public_key_file(const std::string& path) { return read_key(path, "public"); }

Result<std::vector<AllowedClient>> read_allowed_clients_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    return failure(Code::kNotFound,
                   "cannot read the allowed clients file " + path + ": it has a line \"name <public key>\" per client");
  }
  std::vector<AllowedClient> clients;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    std::istringstream words(line);
    AllowedClient client;
    if (!(words >> client.name) || client.name.front() == '#') continue;
    if (!(words >> client.public_key) || client.public_key.size() != kZ85KeyChars) {
      return failure(Code::kInvalid, path + ":" + std::to_string(number) + ": expected \"name <public key of " +
                                         std::to_string(kZ85KeyChars) + " characters>\"");
    }
    std::string right;
    if (words >> right) {
      client.admin = right == "admin";
      if (!client.admin || words >> right) {
        return failure(Code::kInvalid, path + ":" + std::to_string(number) +
                                           ": after the key there may be \"admin\", not \"" + right + "\"");
      }
    }
    clients.push_back(std::move(client));
  }
  return clients;
}

}  // namespace kvern
