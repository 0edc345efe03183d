#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kernels/plane_form.h"

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

/// Makes the form of a step; defined as make_<name>_form() in kernels/form_<name>.cc.
using MakeForm = Result<std::shared_ptr<const PlaneForm>>(const CodecStep& step);

}  // namespace kvern
