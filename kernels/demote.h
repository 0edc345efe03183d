#pragma once

#include <cstddef>
#include <span>

#include "base/status.h"
#include "kernels/plane_form.h"

namespace kvern {

/// Demotion without encoding anything again: the section of form.base_spec() that an encoded section of the form begins
/// with, as a view into it. Of int8r that is the int4 of the same group and scheme; the caller stores the view under
/// that spec, with a checksum of its own. Neither reads nor verifies the bytes. kRefused for forms without a base,
/// kCorrupt when the section does not have the form's size.
Result<std::span<const std::byte>> demote_section(const PlaneForm& form, const PlaneShape& plane,
                                                  std::span<const std::byte> section);

}  // namespace kvern
