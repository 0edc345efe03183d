#include "kernels/demote.h"

#include <string>

namespace kvern {

Result<std::span<const std::byte>> demote_section(const PlaneForm& form, const PlaneShape& plane,
                                                  std::span<const std::byte> section) {
  if (form.base_spec().empty()) {
    return failure(Code::kRefused, std::string(form.spec()) + " has no base to demote to; encode it again");
  }
  if (section.size() != form.max_bytes(plane)) {
    return failure(Code::kCorrupt, std::string(form.spec()) + " section has " + std::to_string(section.size()) +
                                       " bytes, not " + std::to_string(form.max_bytes(plane)));
  }
  return section.first(form.base_bytes(plane));
}

}  // namespace kvern
