#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/status.h"
#include "transport/wire.h"

namespace kvern {

/// What is known of compact caches, in one small file each, so that it survives the daemon. A file is replaced whole:
/// after a crash there is the old one or the new one. Not for several threads at the same handle.
class CompactManifests {
 public:
  /// Makes the folder (0700: whoever reads a handle can use it). Throws std::runtime_error when it cannot.
  explicit CompactManifests(std::filesystem::path folder);
  /// Removes the folder when nothing is in it.
  ~CompactManifests();
  CompactManifests(const CompactManifests&) = delete;
  CompactManifests& operator=(const CompactManifests&) = delete;

  /// All that are whole; files that are damaged, or left half written, are removed with a warning.
  std::vector<wire::CompactManifest> load() const;
  /// digits: of the handle, they name the file.
  Status write(const std::string& digits, const wire::CompactManifest& manifest) const;
  void remove(const std::string& digits) const;

 private:
  const std::filesystem::path folder_;
};

}  // namespace kvern
