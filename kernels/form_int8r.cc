#include "kernels/form_quantised.h"

namespace kvern {

/// int4 and a residual of four more bits per element, which can be dropped.
Result<std::shared_ptr<const PlaneForm>> make_int8r_form(const CodecStep& step) {
  return make_quantised_form(step, quantise::Kind::kInt8Residual);
}

}  // namespace kvern
