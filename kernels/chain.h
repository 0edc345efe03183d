#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kernels/codec.h"
#include "kernels/codec_registry.h"
#include "kernels/codec_step.h"
#include "kernels/plane_form.h"

namespace kvern {

/// A codec chain: steps with all their parameters, in an order that makes sense. For instance
///
///   cake(budget=25%) | int8        picks tokens of one request, then quantises: a compact cache
///   unrotate | centroid | int4     a codec of chunks
///   raw | zstd(level=3)            lossless
///
/// A chain without a quantise step keeps its rows as they are (raw).
struct Chain {
  struct Step {
    StepKind kind;
    CodecStep step;  ///< every parameter, in a fixed order
  };

  std::vector<Step> steps;
  std::string spec;                       ///< canonical: equal specs give equal bytes
  std::uint64_t digest = 0;               ///< XXH3-64 of the spec
  std::shared_ptr<const PlaneForm> form;  ///< how rows are written down: the quantise step
  /// What follows the evict step. Null when an unrotate step knows no rotation yet.
  std::shared_ptr<const Codec> codec;

  /// Whether rows of several tokens or layers become one.
  bool merges_rows() const { return find(StepKind::kMerge) != nullptr || find(StepKind::kCluster) != nullptr; }
  const CodecStep* find(StepKind kind) const;
  /// False for a chain that picks tokens: it needs the whole prompt, often queries too, and gives a compact cache.
  bool is_chunk_codec() const { return find(StepKind::kEvict) == nullptr; }
};

/// The chain that a spec names, or a sentence (kInvalid) that says what is wrong with it. Steps and combinations of
/// which the result would be wrong are refused with the reason.
/// rotation: the parameters of an unrotate step that names none, as they stand in its parentheses: how the model turns
/// its keys is a fact of the namespace, not of the configuration. Empty: not known.
Result<Chain> parse_chain(std::string_view spec, std::string_view rotation = {});

/// The same for the codec of chunks that requests share: kInvalid for a chain that picks tokens.
Result<Chain> parse_chunk_chain(std::string_view spec, std::string_view rotation = {});

/// Tokens that a step with a budget keeps of a prompt, per layer and head on average, protected ones included.
std::uint32_t budget_tokens(const CodecStep& step, std::uint32_t prompt_tokens);

}  // namespace kvern
