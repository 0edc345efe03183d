#include "kernels/form_quantised.h"

namespace kvern {

/// e4m3 numbers of eight bits, symmetric.
Result<std::shared_ptr<const PlaneForm>> make_fp8_form(const CodecStep& step) {
  return make_quantised_form(step, quantise::Kind::kFp8);
}

}  // namespace kvern
