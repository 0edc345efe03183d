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

namespace kvern {

/// One step of a codec spec as it was written: a name and the parameters in parentheses.
struct CodecStep {
  std::string name;
  std::vector<std::pair<std::string, std::string>> parameters;

  /// kInvalid, naming those that there are, when a parameter is not one of known.
  Status check_names(std::initializer_list<std::string_view> known) const;
  /// The parameter as a whole number, or fallback where it is not given. kInvalid when it is none of allowed.
  Result<std::uint32_t> number(std::string_view parameter, std::uint32_t fallback,
                               std::initializer_list<std::uint32_t> allowed) const;
};

/// Makes the codec of a step; defined as make_<name>_codec() in kernels/codec_<name>.cc.
using MakeCodec = Result<std::shared_ptr<const Codec>>(const CodecStep& step);

}  // namespace kvern
