#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/container.h"

namespace kvern {

/// What a step down a ladder made of one container.
struct Transcoded {
  std::size_t bytes = 0;
  /// Relative L2 error of the attention output over the new form against that over the old one, on some layers and
  /// heads; 0 for lossless codecs. The chunk's own keys stand in for queries, which the store does not have.
  double error = 0;
};

/// Makes weaker forms of containers: what lies within the old form is copied (ContainerReader::write_base()), all else
/// is decoded and encoded. Keeps its memory from one container to the next. Not thread-safe.
class Transcoder {
 public:
  /// Into out, of at least container_max_bytes(). Every section of from is verified on the way. kRefused when the codec
  /// does not take the shape.
  Result<Transcoded> run(const ContainerReader& from, const Codec& to, std::uint32_t lossy_generations,
                         std::span<std::byte> out);

 private:
  std::vector<std::byte> canonical_;
};

}  // namespace kvern
