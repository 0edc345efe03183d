#include "kernels/form_quantised.h"

namespace kvern {

/// Codes of 4 bits.
Result<std::shared_ptr<const PlaneForm>> make_int4_form(const CodecStep& step) {
  return make_quantised_form(step, quantise::Kind::kInt4);
}

}  // namespace kvern
