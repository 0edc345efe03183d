#include "kernels/form_quantised.h"

namespace kvern {

/// Codes of 3 bits.
Result<std::shared_ptr<const PlaneForm>> make_int3_form(const CodecStep& step) {
  return make_quantised_form(step, quantise::Kind::kInt3);
}

}  // namespace kvern
