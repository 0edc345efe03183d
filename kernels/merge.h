#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/plane_form.h"

namespace kvern {
class Executor;
}

/// MiniCache (arXiv 2405.14366): two adjacent layers share one direction per token and KV head, and keep their own
/// vector lengths. x is the row of the shallower layer, y that of the deeper one; K and V are merged separately. RoPE
/// turns both rows alike, so that it does not matter whether it was applied, as long as both layers share its base.
namespace kvern::merge {

/// Which tokens keep both original rows because their directions differ most.
enum class Retention {
  kTopK,   ///< a fixed share of the tokens, those with the largest angles
  kRange,  ///< tokens in the uppermost share of the range of angles; their number varies
};

struct Options {
  /// t: where the shared direction lies on the arc, 0 at x, 1 at y. The paper's value.
  float weight = 0.6F;
  Retention rule = Retention::kTopK;
  /// gamma, from 0 to 1. 1 keeps every token as it is under kTopK.
  double retain = 0.05;

  Status validate() const;
};

/// Tokens whose angle [rad] is larger are forced: ux + uy leaves no direction. Vectors that are zero (shorter than
/// 2^-45), not finite or longer than a float can say have the angle pi, so that they are forced as well.
constexpr float kForcedAngle = 3.1405926F;  // pi - 1e-3
constexpr bool is_forced(float angle) { return angle > kForcedAngle; }

/// Where the parts of merged layers go, each [head][token] without gaps, owned by the caller.
struct MergedRows {
  std::byte* directions = nullptr;  ///< [head][token][dim] of direction_dtype: e, of length 1; 0 for forced tokens
  DType direction_dtype = DType::kFloat32;
  float* x_lengths = nullptr;  ///< |x|; 0 for a vector that is not finite
  float* y_lengths = nullptr;
  float* angles = nullptr;  ///< between x and y, 0 to pi
};

/// Angles [rad] between the rows of two layers, [head][token]. kInvalid for layers that differ in heads, tokens, dim or
/// dtype, for opaque bytes and for dimensions above kMaxDim.
Status measure_angles(const HeadRows& x, const HeadRows& y, std::span<float> angles, Executor* executor);

/// Merges two layers: e = (sin((1-t) Om) ux + sin(t Om) uy) / sin(Om), evaluated in the orthonormal basis of ux + uy
/// and uy - ux, which stays exact for small angles. Bitwise equal for every executor and instruction set. Errors as for
/// measure_angles().
Status merge_layers(const HeadRows& x, const HeadRows& y, float weight, const MergedRows& out, Executor* executor);

constexpr std::uint32_t kMaxDim = 256;

/// Tokens of one head that keep their originals, ascending: those of the rule and all forced ones. kTopK keeps
/// max(1, ceil(retain * tokens - 1e-6)) largest angles, equal ones by the lower token; kRange those above
/// max - retain * (max - min) over tokens that are not forced.
std::vector<std::uint32_t> retained_tokens(std::span<const float> angles, const Options& options);

/// The number that kTopK keeps.
std::uint32_t top_count(std::size_t tokens, double retain);

/// Mean angle [rad] of the tokens that are not forced, summed in order; 0 when there is none. What pairs are gated by.
float mean_angle(std::span<const float> angles);

/// Restores rows of one layer: out[head][token] = lengths[head][token] * e, in the dtype of the directions, saturating
/// at its largest finite value. Retained tokens are to be put over it by the caller.
Status restore_rows(const HeadRows& directions, std::span<const float> lengths, std::byte* out, Executor* executor);

/// Divides lengths by the length of the directions as they will be read back (quantised, rounded), so that restored
/// rows have the length of the originals. Directions of length 0 leave the lengths as they are.
Status fold_lengths(const HeadRows& directions, std::span<float> x_lengths, std::span<float> y_lengths,
                    Executor* executor);

/// The streaming form: the newest tokens of both layers stay exact, older ones are merged block by block, each with its
/// own retained tokens (which also suits group-wise quantisers).
struct StreamingOptions {
  std::uint32_t recent_tokens = 64;
  std::uint32_t block_tokens = 64;

  Status validate() const;
};

/// The block to merge next when tokens [0, merged) of `tokens` are merged already: nullopt while no whole block lies
/// before the recent tail. Call until it is nullopt.
std::optional<TokenRange> next_block(const StreamingOptions& options, std::uint32_t merged, std::uint32_t tokens);

}  // namespace kvern::merge
