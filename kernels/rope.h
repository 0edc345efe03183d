#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/parallel.h"
#include "base/status.h"
#include "kernels/codec_step.h"
#include "kernels/head_rows.h"
#include "kernels/rope_arithmetic.h"

/// Rotary position embedding (RoFormer, arXiv 2104.09864): pair i of a row at position p is turned by the angle
/// p * inverse_frequency[i]. Kvern takes the turn out of stored keys and puts it back, or turns all keys of a compact
/// cache by one constant angle, which leaves every product of a query and a key as it is when both are turned.
namespace kvern::rope {

/// Which elements of the first rotary_dim make a pair.
enum class Style : std::uint8_t {
  kNeox,         ///< i and i + rotary_dim / 2
  kInterleaved,  ///< 2i and 2i + 1
};

enum class Scaling : std::uint8_t { kNone, kLinear, kLlama3, kYarn };

/// How a model turns its keys. Factors on queries and keys alone (YaRN's attention factor) are no part of it: turning
/// commutes with them.
struct Parameters {
  Style style = Style::kNeox;
  double theta = 10000;
  std::uint32_t rotary_dim = 0;  ///< even; elements of a row beyond it are not turned
  Scaling scaling = Scaling::kNone;
  double factor = 1;
  double original_positions = 0;  ///< llama3, yarn: length that the model was first trained on
  double low_frequency = 1;       ///< llama3
  double high_frequency = 4;      ///< llama3
  double beta_fast = 32;          ///< yarn
  double beta_slow = 1;           ///< yarn
  bool truncate = true;           ///< yarn: bounds of the ramp rounded to whole pairs

  /// From the parameters of a codec step (style, theta, dim, scaling, factor, original, low, high, fast, slow,
  /// truncate). Refuses (kInvalid) rotations that depend on the length of the prompt.
  static Result<Parameters> from(const CodecStep& step);
  /// The same from what stands in the parentheses of such a step, which is how the fact `rotation` is written.
  static Result<Parameters> parse(std::string_view text);
  /// The inverse: what the scaling uses, in a fixed order, as it stands in the parentheses of a step.
  std::string to_string() const;

  /// [rotary_dim / 2], radians per position.
  std::vector<double> inverse_frequencies() const;
};

/// Borrowed turns. Without pairs it turns nothing: rows are converted only.
struct TurnsView {
  std::uint32_t rows = 1;
  std::uint32_t pairs = 0;
  const float* cosines = nullptr;
  const float* sines = nullptr;
};

/// Turns of rows: cosines and sines [rows][pairs]; angles in fp64, rounded to fp32 in the end.
struct Turns {
  std::uint32_t rows = 0;
  std::uint32_t pairs = 0;
  std::vector<float> cosines;
  std::vector<float> sines;

  /// Row i stands at positions[i].
  static Turns at(std::span<const double> inverse_frequencies, std::span<const std::int64_t> positions);
  /// Row i stands at first + i.
  static Turns from(std::span<const double> inverse_frequencies, std::int64_t first, std::uint32_t count);
  /// Inverse frequencies and angles rounded to fp32 before the cosine, as common model code does.
  static Turns at_fp32_angles(std::span<const double> inverse_frequencies, std::span<const std::int64_t> positions);

  TurnsView view(std::uint32_t first, std::uint32_t count) const {
    const std::size_t offset = std::size_t{first} * pairs;
    return {count, pairs, cosines.data() + offset, sines.data() + offset};
  }
  operator TurnsView() const { return view(0, rows); }
};

/// kInvalid, with the reason, when the turns do not fit the rows or one of the dtypes holds no numbers.
Status check_turns(const HeadRows& rows, TurnsView turns, DType out_dtype);

enum class Direction : std::uint8_t { kForward, kBack };

/// Rows up to this long: what the kernel keeps on the stack.
constexpr std::uint32_t kMaxDim = 1024;

/// Writes every row, turned, to out: [head][token][dim] of out_dtype without gaps; in place where rows is that too,
/// with the same dtype. turns has a row per token, or one for all of them (a constant shift). Arithmetic is fp32;
/// elements beyond the pairs are converted only. Values must be finite or their turns are not; fp32 values that round
/// beyond the largest of a 16-bit dtype become the largest. kInvalid when the turns do not fit the rows or dim is
/// beyond kMaxDim. Runs over heads on the executor; null: on the caller's thread.
Status rotate(const HeadRows& rows, TurnsView turns, Style style, Direction direction, DType out_dtype, std::byte* out,
              Executor* executor = nullptr);

}  // namespace kvern::rope
