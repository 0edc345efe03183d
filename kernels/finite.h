#pragma once

#include <cstddef>
#include <span>

#include "base/dtype.h"

namespace kvern {

/// True when none of the elements is NaN or infinite. Opaque bytes are finite.
bool all_finite(DType dtype, std::span<const std::byte> elements);

}  // namespace kvern
