#include "service/compact_manifests.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <utility>

#include "base/keys.h"
#include "service/log.h"
#include "transport/compact_handle.h"
#include "transport/shared_memory.h"

namespace kvern {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "kvcmani1";
constexpr std::string_view kSuffix = ".kvc";
constexpr std::string_view kUnfinished = ".tmp";
// A manifest has some hundred bytes; its longest text is the reason of a failure.
constexpr std::uintmax_t kMaxFileBytes = 64U << 10;

std::string with_checksum(const wire::CompactManifest& manifest) {
  const std::string payload = manifest.SerializeAsString();
  const std::uint64_t checksum = checksum64(payload.data(), payload.size());
  std::string bytes(kMagic);
  bytes.append(reinterpret_cast<const char*>(&checksum), sizeof checksum);
  return bytes + payload;
}

std::optional<wire::CompactManifest> read(const fs::path& path) {
  std::error_code error;
  const auto bytes_there = fs::file_size(path, error);
  constexpr std::size_t kHeader = kMagic.size() + sizeof(std::uint64_t);
  if (error || bytes_there < kHeader || bytes_there > kMaxFileBytes) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() != bytes_there || !bytes.starts_with(kMagic)) return std::nullopt;
  std::uint64_t checksum = 0;
  std::memcpy(&checksum, bytes.data() + kMagic.size(), sizeof checksum);
  wire::CompactManifest manifest;
  if (checksum64(bytes.data() + kHeader, bytes.size() - kHeader) != checksum ||
      !manifest.ParseFromArray(bytes.data() + kHeader, static_cast<int>(bytes.size() - kHeader))) {
    return std::nullopt;
  }
  const auto handle = CompactHandle::parse(manifest.report().handle());
  const bool good = handle && path.filename() == handle->digits + std::string(kSuffix) &&
                    manifest.report().namespace_id().size() == sizeof(NamespaceId::bytes) &&
                    manifest.hash_bytes() >= CompactHandle::kMinHashBytes &&
                    manifest.hash_bytes() <= CompactHandle::kMaxHashBytes && manifest.block_tokens() > 0 &&
                    manifest.chunk_tokens() >= manifest.block_tokens();
  return good ? std::optional(std::move(manifest)) : std::nullopt;
}

Status system_error(const fs::path& path) {
  return {Code::kInternal, "cannot write " + path.string() + ": " + std::strerror(errno)};
}

}  // namespace

CompactManifests::CompactManifests(fs::path folder) : folder_(std::move(folder)) {
  std::error_code error;
  fs::create_directories(folder_, error);
  if (!error) fs::permissions(folder_, fs::perms(0700), error);
  if (error) {
    throw std::runtime_error("cannot make the folder of compact caches " + folder_.string() + ": " + error.message());
  }
}

CompactManifests::~CompactManifests() {
  std::error_code ignored;
  fs::remove(folder_, ignored);
}

std::vector<wire::CompactManifest> CompactManifests::load() const {
  std::vector<wire::CompactManifest> manifests;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder_, error)) {
    const fs::path& path = entry.path();
    if (path.extension() != kSuffix && path.extension() != kUnfinished) continue;
    auto manifest = path.extension() == kSuffix ? read(path) : std::nullopt;
    if (manifest) {
      manifests.push_back(std::move(*manifest));
      continue;
    }
    log_warn("a damaged manifest of a compact cache is removed", {{"file", path.string()}});
    fs::remove(path, error);
  }
  return manifests;
}

Status CompactManifests::write(const std::string& digits, const wire::CompactManifest& manifest) const {
  const fs::path path = folder_ / (digits + std::string(kSuffix));
  const fs::path unfinished = folder_ / (digits + std::string(kUnfinished));
  const std::string bytes = with_checksum(manifest);
  const UniqueFd file(::open(unfinished.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!file) return system_error(unfinished);
  for (std::size_t written = 0; written < bytes.size();) {
    const ssize_t now = ::write(file.get(), bytes.data() + written, bytes.size() - written);
    if (now < 0 && errno == EINTR) continue;
    if (now <= 0) return system_error(unfinished);
    written += static_cast<std::size_t>(now);
  }
  if (::fdatasync(file.get()) != 0 || ::rename(unfinished.c_str(), path.c_str()) != 0) return system_error(path);
  const UniqueFd folder(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  return folder && ::fsync(folder.get()) == 0 ? Status::ok() : system_error(folder_);
}

void CompactManifests::remove(const std::string& digits) const {
  std::error_code error;
  fs::remove(folder_ / (digits + std::string(kSuffix)), error);
  if (error) log_warn("the manifest of a compact cache cannot be removed", {{"why", error.message()}});
}

}  // namespace kvern
