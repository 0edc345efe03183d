#include "kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/cpu/rope.h"

namespace kvern::rope {
namespace {

constexpr double kMaxPositions = 1U << 26;
constexpr double kMaxTheta = 1e12;
constexpr double kMaxFactor = 1e6;

// In extended precision and rounded once, so that the last bit does not depend on the mathematical library.
double power(double base, double exponent) {
  return static_cast<double>(std::pow(static_cast<long double>(base), static_cast<long double>(exponent)));
}

/// The pair that turns `turns` times over the original length.
double pair_of(const Parameters& p, double turns) {
  return p.rotary_dim * std::log(p.original_positions / (turns * 2 * std::numbers::pi)) / (2 * std::log(p.theta));
}

void scale_llama3(const Parameters& p, std::vector<double>& frequencies) {
  for (double& frequency : frequencies) {
    const double turns = p.original_positions * frequency / (2 * std::numbers::pi);
    if (turns > p.high_frequency) continue;
    double smooth = 0;
    if (turns >= p.low_frequency && p.high_frequency > p.low_frequency) {
      smooth = (turns - p.low_frequency) / (p.high_frequency - p.low_frequency);
    }
    frequency = (1 - smooth) * (frequency / p.factor) + smooth * frequency;
  }
}

void scale_yarn(const Parameters& p, std::vector<double>& frequencies) {
  double low = pair_of(p, p.beta_fast);
  double high = pair_of(p, p.beta_slow);
  if (p.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, p.rotary_dim - 1.0);
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    const double kept = 1 - ramp;
    frequencies[i] = frequencies[i] / p.factor * (1 - kept) + frequencies[i] * kept;
  }
}

tl::unexpected<Status> depends_on_length(const std::string& step, std::string_view scaling) {
  return failure(Code::kInvalid, step + ": keys under " + std::string(scaling) +
                                     " scaling turn by frequencies that change with the length of the prompt; leave " +
                                     step + " out");
}

template <typename Cosines>
Turns fill(std::size_t pairs, std::size_t rows, Cosines of) {
  Turns turns;
  turns.rows = static_cast<std::uint32_t>(rows);
  turns.pairs = static_cast<std::uint32_t>(pairs);
  turns.cosines.resize(rows * pairs);
  turns.sines.resize(rows * pairs);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t pair = 0; pair < pairs; ++pair) {
      const CosineSine by = of(row, pair);
      turns.cosines[row * pairs + pair] = by.cosine;
      turns.sines[row * pairs + pair] = by.sine;
    }
  }
  return turns;
}

}  // namespace

Result<Parameters> Parameters::from(const CodecStep& step) {
  const Status names = step.check_names(
      {"style", "theta", "dim", "scaling", "factor", "original", "low", "high", "fast", "slow", "truncate"});
  if (!names) return failure(names);
  const auto scaling =
      step.word("scaling", "none", {"none", "linear", "llama3", "yarn", "dynamic", "longrope", "mrope"});
  if (!scaling) return failure(scaling.error());
  if (*scaling == "dynamic" || *scaling == "longrope") return depends_on_length(step.name, *scaling);
  if (*scaling == "mrope") {
    return failure(
        Code::kInvalid,
        step.name + ": keys under mrope turn by positions of image parts, not of tokens; leave " + step.name + " out");
  }
  Parameters p;
  p.scaling = *scaling == "linear"   ? Scaling::kLinear
              : *scaling == "llama3" ? Scaling::kLlama3
              : *scaling == "yarn"   ? Scaling::kYarn
                                     : Scaling::kNone;
  const auto style = step.word("style", "neox", {"neox", "interleaved"});
  if (!style) return failure(style.error());
  p.style = *style == "neox" ? Style::kNeox : Style::kInterleaved;
  const auto dim = step.number_within("dim", 0, 2, kMaxDim);
  if (!dim) return failure(dim.error());
  p.rotary_dim = *dim;
  if (p.rotary_dim == 0 || p.rotary_dim % 2 != 0) {
    return failure(Code::kInvalid, step.name + ": dim must say how many elements of a key are turned, an even number");
  }
  struct Field {
    std::string_view name;
    double Parameters::*member;
    double least;
    double most;
  };
  for (const Field& field :
       {Field{"theta", &Parameters::theta, 1.5, kMaxTheta}, Field{"factor", &Parameters::factor, 1e-3, kMaxFactor},
        Field{"original", &Parameters::original_positions, 1, kMaxPositions},
        Field{"low", &Parameters::low_frequency, 1e-3, kMaxFactor},
        Field{"high", &Parameters::high_frequency, 1e-3, kMaxFactor},
        Field{"fast", &Parameters::beta_fast, 1e-3, kMaxFactor},
        Field{"slow", &Parameters::beta_slow, 1e-3, kMaxFactor}}) {
    const auto value = step.decimal(field.name, p.*field.member, field.least, field.most);
    if (!value) return failure(value.error());
    p.*field.member = *value;
  }
  const auto truncate = step.flag("truncate", true);
  if (!truncate) return failure(truncate.error());
  p.truncate = *truncate;
  if ((p.scaling == Scaling::kLlama3 || p.scaling == Scaling::kYarn) && p.original_positions == 0) {
    return failure(Code::kInvalid,
                   step.name + ": " + std::string(*scaling) + " scaling needs original, the length of first training");
  }
  return p;
}

Result<Parameters> Parameters::parse(std::string_view text) {
  const auto step = CodecStep::parse("unrotate(" + std::string(text) + ")");
  if (!step) return failure(step.error());
  return from(*step);
}

std::string Parameters::to_string() const {
  std::string text = std::string("style=") + (style == Style::kNeox ? "neox" : "interleaved") +
                     ",theta=" + decimal_text(theta) + ",dim=" + std::to_string(rotary_dim);
  if (scaling == Scaling::kNone) return text;
  const auto add = [&](const char* name, double value) { text.append(name).append(decimal_text(value)); };
  text += scaling == Scaling::kLinear   ? ",scaling=linear"
          : scaling == Scaling::kLlama3 ? ",scaling=llama3"
                                        : ",scaling=yarn";
  add(",factor=", factor);
  if (scaling == Scaling::kLinear) return text;
  add(",original=", original_positions);
  if (scaling == Scaling::kLlama3) {
    add(",low=", low_frequency);
    add(",high=", high_frequency);
    return text;
  }
  add(",fast=", beta_fast);
  add(",slow=", beta_slow);
  return text + ",truncate=" + (truncate ? "true" : "false");
}

std::vector<double> Parameters::inverse_frequencies() const {
  std::vector<double> frequencies(rotary_dim / 2);
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = power(theta, -2.0 * static_cast<double>(i) / rotary_dim);
  }
  switch (scaling) {
    case Scaling::kNone:
      break;
    case Scaling::kLinear:
      for (double& frequency : frequencies) frequency /= factor;
      break;
    case Scaling::kLlama3:
      scale_llama3(*this, frequencies);
      break;
    case Scaling::kYarn:
      scale_yarn(*this, frequencies);
      break;
  }
  return frequencies;
}

Turns Turns::at(std::span<const double> inverse_frequencies, std::span<const std::int64_t> positions) {
  return fill(inverse_frequencies.size(), positions.size(), [&](std::size_t row, std::size_t pair) {
    return cosine_sine(static_cast<double>(positions[row]) * inverse_frequencies[pair]);
  });
}

Turns Turns::from(std::span<const double> inverse_frequencies, std::int64_t first, std::uint32_t count) {
  return fill(inverse_frequencies.size(), count, [&](std::size_t row, std::size_t pair) {
    return cosine_sine(static_cast<double>(first + static_cast<std::int64_t>(row)) * inverse_frequencies[pair]);
  });
}

Turns Turns::at_fp32_angles(std::span<const double> inverse_frequencies, std::span<const std::int64_t> positions) {
  return fill(inverse_frequencies.size(), positions.size(), [&](std::size_t row, std::size_t pair) {
    const float angle = static_cast<float>(positions[row]) * static_cast<float>(inverse_frequencies[pair]);
    return cosine_sine(static_cast<double>(angle));
  });
}

Status check_turns(const HeadRows& rows, TurnsView turns, DType out_dtype) {
  if (rows.dim > kMaxDim || turns.pairs > rows.dim / 2 || (turns.rows != 1 && turns.rows != rows.tokens)) {
    return {Code::kInvalid, "rows of " + std::to_string(rows.dim) + " elements and " + std::to_string(rows.tokens) +
                                " tokens cannot be turned in " + std::to_string(turns.pairs) + " pairs by " +
                                std::to_string(turns.rows) + " turns"};
  }
  if (rows.dtype == DType::kOpaqueBytes || out_dtype == DType::kOpaqueBytes) {
    return {Code::kInvalid, "opaque bytes cannot be turned"};
  }
  return Status::ok();
}

Status rotate(const HeadRows& rows, TurnsView turns, Style style, Direction direction, DType out_dtype, std::byte* out,
              Executor* executor) {
  if (Status status = check_turns(rows, turns, out_dtype); !status) return status;
  const RowTurn turn{turns.cosines, turns.sines, turns.pairs, style, direction};
  const std::size_t out_head_bytes = std::size_t{rows.tokens} * rows.dim * dtype_bytes(out_dtype);
  parallel_for(executor, rows.heads, [&](std::size_t head) {
    rotate_head(rows.row(head, 0), rows.token_stride_bytes, rows.dtype, rows.tokens, rows.dim, turn,
                turns.rows == 1 ? 0 : turns.pairs, out_dtype, out + head * out_head_bytes);
  });
  return Status::ok();
}

}  // namespace kvern::rope
