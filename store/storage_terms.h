#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "store/ladder.h"

namespace kvern {

/// How the chunks of one namespace are to be kept.
struct StorageTerms {
  std::optional<Ladder> ladder;    ///< nullopt: they stay as they were stored
  std::string rotation;            ///< of the namespace, for rungs that turn keys back; see make_codec()
  double max_relative_error = 1;   ///< weaker forms are neither made nor served
  std::string tenant = {};         ///< whose quota they count against
  std::uint64_t tenant_bytes = 0;  ///< what the tenant may hold of the DRAM tier; 0: no limit

  bool is_default() const { return !ladder && max_relative_error >= 1 && tenant_bytes == 0; }
};

}  // namespace kvern
