#pragma once

#include <memory>
#include <string>

#include "kernels/codec_step.h"
#include "kernels/plane_form.h"
#include "kernels/quantise_arithmetic.h"

namespace kvern {

/// The form of a step that writes groups of codes of the kind: "<name>(group=G,scheme=S,version=1)"; fp8, which is
/// symmetric, has no scheme. kInvalid for parameters that there are not.
Result<std::shared_ptr<const PlaneForm>> make_quantised_form(const CodecStep& step, quantise::Kind kind);

}  // namespace kvern
