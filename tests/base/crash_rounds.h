#pragma once

#include <cstdlib>

namespace kvern::testing {

/// How often a crash test kills its victim: KVERN_CRASH_ROUNDS, for a long run, or as often as is usual.
inline int crash_rounds(int usual) {
  const char* text = std::getenv("KVERN_CRASH_ROUNDS");
  return text == nullptr ? usual : std::atoi(text);
}

}  // namespace kvern::testing
