#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kernels/codec.h"
#include "kernels/plane_form.h"

namespace kvern {

/// One step of a codec spec as it was written: a name and the parameters in parentheses.
struct CodecStep {
  std::string name;
  std::vector<std::pair<std::string, std::string>> parameters;

  /// Reads "name" or "name(parameter=value, ...)". Knows no names: those are for whoever makes the step.
  static Result<CodecStep> parse(std::string_view text);
  /// The steps of a chain, separated by "|".
  static Result<std::vector<CodecStep>> parse_all(std::string_view spec);
  /// As parse() reads it, without spaces.
  std::string to_string() const;

  /// The text of a parameter, or nullptr where it is not given.
  const std::string* find(std::string_view parameter) const;
  /// kInvalid, naming those that there are, when a parameter is not one of known.
  Status check_names(std::initializer_list<std::string_view> known) const;
  /// The parameter as a whole number, or fallback where it is not given. kInvalid when it is none of allowed.
  Result<std::uint32_t> number(std::string_view parameter, std::uint32_t fallback,
                               std::initializer_list<std::uint32_t> allowed) const;
  /// The same for every whole number in [least, most].
  Result<std::uint32_t> number_within(std::string_view parameter, std::uint32_t fallback, std::uint32_t least,
                                      std::uint32_t most) const;
  /// A finite decimal number in [least, most], or fallback. "25%" is 0.25.
  Result<double> decimal(std::string_view parameter, double fallback, double least, double most) const;
  /// One of the words in allowed, or fallback. The views are those of allowed.
  Result<std::string_view> word(std::string_view parameter, std::string_view fallback,
                                std::initializer_list<std::string_view> allowed) const;
  /// "true" or "false", or fallback.
  Result<bool> flag(std::string_view parameter, bool fallback) const;
};

/// The shortest decimal text that reads back as value: how numbers stand in canonical specs.
std::string decimal_text(double value);

/// A quantise step: make_<name>_form() in kernels/form_<name>.cc.
using MakeForm = Result<std::shared_ptr<const PlaneForm>>(const CodecStep& step);
/// A merge or cluster step: make_<name>_reducer() in kernels/codec_<name>.cc. Its codec stores the planes that are left
/// (directions, centroids, kept rows …) with inner, the form of the chain's quantise step ("raw" where there is none).
/// The codec's spec is "<canonical step> | <inner->spec()>".
using MakeReducer = Result<std::shared_ptr<const Codec>>(const CodecStep& step, std::shared_ptr<const PlaneForm> inner);
/// A step around all of the chain that follows or precedes it (unrotate, zstd): make_<name>_wrapper().
using MakeWrapper = Result<std::shared_ptr<const Codec>>(const CodecStep& step, std::shared_ptr<const Codec> inner);
/// A step that picks tokens: canonical_<name>() checks its parameters and gives them all, in a fixed order.
using CanonicalStep = Result<CodecStep>(const CodecStep& step);

}  // namespace kvern
