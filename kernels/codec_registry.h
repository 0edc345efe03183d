#pragma once

#include <span>
#include <string>
#include <string_view>
#include <variant>

#include "kernels/codec_step.h"

namespace kvern {

/// What a step of a chain does. Steps stand in this order; of kMerge and kCluster there is one at most.
enum class StepKind : std::uint8_t {
  kEvict,     ///< picks the tokens that stay
  kUnrotate,  ///< takes the position out of the keys
  kMerge,     ///< one plane for two layers
  kCluster,   ///< one row for several tokens
  kQuantise,  ///< how numbers are written down
  kEntropy,   ///< lossless
};

/// A step that there is: its name, what it does and what makes it.
struct StepEntry {
  std::string_view name;
  StepKind kind;
  std::variant<CanonicalStep*, MakeWrapper*, MakeReducer*, MakeForm*> make;
};

/// All of them, in the order of their kinds.
std::span<const StepEntry> all_steps();
/// kInvalid, naming those that there are, when there is none of this name.
Result<const StepEntry*> find_step(std::string_view name);

}  // namespace kvern
