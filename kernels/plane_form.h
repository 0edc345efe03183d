#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/kv_shape.h"

namespace kvern {

/// A contiguous range of tokens: [begin, end).
struct TokenRange {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
};

/// K or V of one layer and one head: rows of dim elements, one per token (or per centroid, or per kept token), without
/// gaps.
struct PlaneShape {
  DType dtype = DType::kBFloat16;
  Part part = Part::kKey;
  std::uint32_t tokens = 0;
  std::uint32_t dim = 0;

  std::size_t row_bytes() const { return std::size_t{dim} * dtype_bytes(dtype); }
  std::size_t bytes() const { return row_bytes() * tokens; }
};

/// How the numbers of a plane are written down: the step of a codec chain that quantises. Immutable, thread-safe,
/// deterministic (the same bytes from run to run and on every instruction set). Adding one is a file
/// kernels/form_<name>.cc and one line in codec_registry.cc.
class PlaneForm {
 public:
  virtual ~PlaneForm() = default;

  /// Canonical, for instance "raw" or "int8(group=64,version=1)". Part of the container header.
  virtual std::string_view spec() const = 0;
  virtual bool lossless() const = 0;
  /// True when the encoded bytes are the rows themselves.
  virtual bool verbatim() const { return false; }
  /// Refuses (kRefused) in a sentence what it cannot encode. Any number of tokens must do.
  virtual Status accepts(DType dtype, std::uint32_t dim) const = 0;

  /// Upper bound of the encoded bytes.
  virtual std::size_t max_bytes(const PlaneShape& plane) const = 0;
  /// Encodes rows (plane.bytes()) into out (at least max_bytes(), aligned to 64 bytes); returns the bytes used.
  /// kInvalid for values that the form cannot carry (NaN, infinities).
  virtual Result<std::size_t> encode(const PlaneShape& plane, std::span<const std::byte> rows,
                                     std::span<std::byte> out) const = 0;
  /// Decodes the rows of tokens, within the plane, to rows. kCorrupt, with rows in any state, when the payload (aligned
  /// to 64 bytes) does not have the right size or holds what encode() cannot have written, such as scales that are not
  /// finite. Never reads outside payload.
  virtual Status decode(const PlaneShape& plane, std::span<const std::byte> payload, TokenRange tokens,
                        std::byte* rows) const = 0;

  /// Forms in layers: the first base_bytes() of a section are the section of the form base_spec(), byte for byte, so
  /// that dropping the rest demotes it. Empty and 0 for all others. See kernels/demote.h.
  virtual std::string_view base_spec() const { return {}; }
  virtual std::size_t base_bytes(const PlaneShape&) const { return 0; }
};

}  // namespace kvern
