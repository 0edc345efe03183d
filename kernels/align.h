#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "kernels/head_rows.h"

namespace kvern {
class Executor;
}

/// Aligned MiniCache: keys of adjacent layers point in unrelated directions, but one orthogonal matrix per pair of
/// layers, learnt once for a model, brings them together. Position-free keys of the shallower layer are multiplied with
/// it before they are merged, and with its transpose after they are restored.
namespace kvern::align {

/// What a model profile says of layers `layer` and `layer + 1`.
struct Pair {
  std::uint32_t layer = 0;
  /// Mean angle between their keys after alignment, over the calibration text.
  float whole_angle_degrees = 0;
  float blocks_angle_degrees = 0;
  /// [heads * dim][heads * dim]: for shards that hold all heads. x R, x a row over all heads.
  std::vector<float> whole;
  /// [head][dim][dim]: a matrix for each head by itself.
  std::vector<float> blocks;
};

/// A model profile, as `kvern calibrate` writes it (docs/format.md).
struct ModelProfile {
  std::string model;  ///< fingerprint of the model that it was learnt on
  std::uint32_t layers = 0;
  std::uint32_t heads = 0;  ///< KV heads of the whole model
  std::uint32_t dim = 0;
  std::vector<Pair> pairs;  ///< by rising layer; no layer is in two

  /// kCorrupt for bytes that are not a profile: cut, damaged, matrices that are not orthogonal. kRefused for a newer
  /// version. Safe on any input.
  static Result<ModelProfile> parse(std::span<const std::byte> bytes);
  /// nullptr where there is none.
  const Pair* find(std::uint32_t layer) const;
};

/// The profile of that name, "<anything>-<checksum in 8 hexadecimal digits>", so that a name always means the same
/// matrices: from memory, or from the file <name>.kvernprofile in the folder of set_profile_folder(). kNotFound, saying
/// where it was looked for; kCorrupt for a file that is not what its name says. Thread-safe.
Result<std::shared_ptr<const ModelProfile>> find_profile(const std::string& name);
/// Where find_profile() looks from now on, in the whole process; empty, and at first: in the folder that the
/// environment variable KVERN_PROFILES names. Thread-safe.
void set_profile_folder(std::string folder);
/// Makes a profile known; returns its name, which begins with prefix. bytes as for parse().
Result<std::string> add_profile(const std::string& prefix, std::span<const std::byte> bytes);

/// out = rows times matrix, in fp32: a row is the elements of all heads of one token, one head after the other; matrix
/// [n][n] with n = heads * dim, n a multiple of 16. out [head][token][dim] without gaps. Bitwise equal for every
/// executor and instruction set. kInvalid for opaque bytes and other sizes.
Status multiply_rows(const HeadRows& rows, std::span<const float> matrix, std::span<float> out, Executor* executor);

/// The transpose of [n][n], which undoes an orthogonal matrix.
std::vector<float> transposed(std::span<const float> matrix, std::uint32_t n);

}  // namespace kvern::align
