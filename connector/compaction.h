#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace kvern {

/// What is known of a compact cache before its prompt is computed; follows from the spec and the prompt's length alone.
struct CompactionTerms {
  std::string spec;              ///< canonical
  std::uint32_t slots = 0;       ///< M: tokens that every layer and head keeps
  std::uint32_t query_rows = 0;  ///< last queries of the prompt that the method reads; 0: none
};
/// kInvalid or kRefused with the reason, see CompactionPlan::make().
Result<CompactionTerms> compaction_terms(std::string_view spec, std::uint32_t prompt_tokens);

}  // namespace kvern
