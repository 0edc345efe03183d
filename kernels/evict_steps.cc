#include <cmath>
#include <cstdint>
#include <string>

#include "kernels/codec_step.h"

/// Parameters of the steps that pick tokens. Defaults are those of the specification of each method; where the papers
/// tune a value per model, the one that measured best without tuning.
namespace kvern {
namespace {

constexpr std::uint32_t kMaxTokens = 1U << 20;
constexpr std::uint32_t kMaxWindow = 1024;
constexpr std::uint32_t kMaxLayers = 4096;

/// Reads parameter after parameter and keeps them in that order; the first failure stays.
class Canonical {
 public:
  explicit Canonical(const CodecStep& step) : step_(step), made_{.name = step.name, .parameters = {}} {}

  /// Tokens per layer and head on average, protected ones included: a number, or a share of the prompt's.
  Canonical& budget() {
    const std::string* text = step_.find("budget");
    if (text == nullptr) return put("budget", "25%");
    if (text->ends_with('%')) {
      const auto share = step_.decimal("budget", 0, 1e-4, 1);
      return share ? put("budget", decimal_text(std::round(*share * 1e8) / 1e6) + "%") : fail(share.error());
    }
    return number("budget", 0, 1, kMaxTokens);
  }
  Canonical& number(std::string_view name, std::uint32_t fallback, std::uint32_t least, std::uint32_t most) {
    const auto value = step_.number_within(name, fallback, least, most);
    return value ? put(name, std::to_string(*value)) : fail(value.error());
  }
  Canonical& decimal(std::string_view name, double fallback, double least, double most) {
    const auto value = step_.decimal(name, fallback, least, most);
    return value ? put(name, decimal_text(*value)) : fail(value.error());
  }
  Canonical& word(std::string_view name, std::string_view fallback, std::initializer_list<std::string_view> allowed) {
    const auto value = step_.word(name, fallback, allowed);
    return value ? put(name, std::string(*value)) : fail(value.error());
  }
  /// A word that is only written where it is not the fallback: a parameter that came later than the texts in use.
  Canonical& later_word(std::string_view name, std::string_view fallback,
                        std::initializer_list<std::string_view> allowed) {
    const auto value = step_.word(name, fallback, allowed);
    if (!value) return fail(value.error());
    if (*value != fallback) return put(name, std::string(*value));
    later_ = name;
    return *this;
  }
  /// How scores of neighbours are pooled.
  Canonical& pooling() {
    word("pool", "avg", {"none", "avg", "max"});
    number("kernel", 5, 1, 255);
    if (status_ && step_.number_within("kernel", 5, 1, 255).value() % 2 == 0) {
      return fail({Code::kInvalid, "codec " + step_.name + ": kernel must be odd, so that a token is its middle"});
    }
    return *this;
  }

  Result<CodecStep> finish() {
    if (!status_) return failure(status_);
    for (const auto& [name, value] : step_.parameters) {
      if (made_.find(name) == nullptr && name != later_) return unknown(name);
    }
    return std::move(made_);
  }

 private:
  tl::unexpected<Status> unknown(const std::string& name) const {
    std::string message = "codec " + step_.name + " has no parameter '";
    message.append(name).append("'; it has: ");
    for (std::size_t i = 0; i < made_.parameters.size(); ++i) {
      message.append(i == 0 ? "" : ", ").append(made_.parameters[i].first);
    }
    return failure(Code::kInvalid, std::move(message));
  }
  Canonical& put(std::string_view name, std::string value) {
    made_.parameters.emplace_back(name, std::move(value));
    return *this;
  }
  Canonical& fail(Status status) {
    if (status_) status_ = std::move(status);
    return *this;
  }

  const CodecStep& step_;
  CodecStep made_;
  std::string_view later_;  ///< a parameter that is known and not written
  Status status_ = Status::ok();
};

}  // namespace

CanonicalStep canonical_cake, canonical_windowkv, canonical_snapkv, canonical_h2o, canonical_streaming, canonical_knorm,
    canonical_keydiff;

Result<CodecStep> canonical_cake(const CodecStep& step) {
  return Canonical(step)
      .budget()
      .number("window", 32, 1, kMaxWindow)
      .decimal("gamma", 200, 0, 1e6)
      // Nearly the dispersion alone: with the published (1, 1) the first layers, whose attention hardly shifts, starve,
      // and equal layers do better at every share (docs/quality.md).
      .decimal("tau1", 2, 0.01, 100)
      .decimal("tau2", 100, 0.01, 100)
      .pooling()
      .number("floor", 0, 0, kMaxTokens)
      .later_word("allocation", "uniform", {"uniform", "cake"})
      .finish();
}

Result<CodecStep> canonical_windowkv(const CodecStep& step) {
  const auto omega = step.number_within("omega", 8, 1, kMaxWindow);
  if (!omega) return failure(omega.error());
  return Canonical(step)
      .budget()
      .number("omega", *omega, 1, kMaxWindow)
      .number("alpha", 16, 1, kMaxWindow)
      .number("top", *omega, 1, *omega)
      .number("group", 1, 1, kMaxLayers)
      .word("allocation", "uniform", {"uniform", "pyramid", "printed"})
      .decimal("lambda", 14, 1, 1000)
      .finish();
}

Result<CodecStep> canonical_snapkv(const CodecStep& step) {
  return Canonical(step)
      .budget()
      .number("window", 32, 1, kMaxWindow)
      .pooling()
      .word("allocation", "uniform", {"uniform", "pyramid", "cake", "heads"})
      .number("floor", 0, 0, kMaxTokens)
      .finish();
}

Result<CodecStep> canonical_h2o(const CodecStep& step) {
  return Canonical(step)
      .budget()
      .number("recent", 32, 1, kMaxTokens)
      .word("score", "sum", {"sum", "mean"})
      .word("allocation", "uniform", {"uniform", "pyramid", "heads"})
      .finish();
}

Result<CodecStep> canonical_streaming(const CodecStep& step) {
  return Canonical(step).budget().number("sinks", 4, 0, kMaxWindow).finish();
}

namespace {

/// Methods that look at keys alone.
Result<CodecStep> canonical_by_keys(const CodecStep& step) {
  return Canonical(step)
      .budget()
      .number("sinks", 4, 0, kMaxWindow)
      .number("recent", 32, 0, kMaxTokens)
      .word("allocation", "uniform", {"uniform", "pyramid", "heads"})
      .finish();
}

}  // namespace

Result<CodecStep> canonical_knorm(const CodecStep& step) { return canonical_by_keys(step); }
Result<CodecStep> canonical_keydiff(const CodecStep& step) { return canonical_by_keys(step); }

}  // namespace kvern
