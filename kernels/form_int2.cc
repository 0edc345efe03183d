#include "kernels/form_quantised.h"

namespace kvern {

/// Codes of 2 bits.
Result<std::shared_ptr<const PlaneForm>> make_int2_form(const CodecStep& step) {
  return make_quantised_form(step, quantise::Kind::kInt2);
}

}  // namespace kvern
