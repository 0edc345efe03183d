#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "store/ladder.h"

namespace kvern {

/// How the chunks of one namespace are to be kept.
struct StorageTerms {
  std::optional<Ladder> ladder;   ///< nullopt: they stay as they were stored
  std::string rotation;           ///< of the namespace, for rungs that turn keys back; see make_codec()
  double max_relative_error = 1;  ///< weaker forms are neither made nor served

  bool is_default() const { return !ladder && max_relative_error >= 1; }
};

}  // namespace kvern
