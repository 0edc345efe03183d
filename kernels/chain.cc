#include "kernels/chain.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/keys.h"
#include "kernels/plane_codec.h"

namespace kvern {
namespace {

using Entries = std::vector<const StepEntry*>;

bool reduces(StepKind kind) { return kind == StepKind::kMerge || kind == StepKind::kCluster; }

/// Why a step of this kind comes before all of the later kinds.
std::string_view why_before(StepKind first, StepKind second) {
  switch (first) {
    case StepKind::kEvict:
      return "tokens are picked from rows as the model made them";
    case StepKind::kUnrotate:
      return reduces(second) ? "a row that stands for several has no one position to turn back to"
                             : "rounded keys cannot be turned without rounding again";
    case StepKind::kMerge:
    case StepKind::kCluster:
      return "rows that are rounded already would be rounded again after merging, and the errors add up";
    case StepKind::kQuantise:
    case StepKind::kEntropy:
      break;
  }
  return "compressed bytes are no numbers any more";
}

Status check_order(const StepEntry& before, const StepEntry& after) {
  const std::string first(before.name);
  const std::string second(after.name);
  if (reduces(before.kind) && reduces(after.kind)) {
    if (before.kind != after.kind) {
      return {Code::kInvalid, first + " and " + second +
                                  " do not go together: tokens cluster differently in each layer, so a merged pair of "
                                  "layers would blend different tokens"};
    }
    return {Code::kInvalid,
            "a chain merges once, not with " + first + " and " + second + ": errors of keys add up in the exponent"};
  }
  if (before.kind == after.kind) {
    constexpr std::string_view kWhat[] = {"picks tokens", "takes positions out", "", "", "quantises", "compresses"};
    return {Code::kInvalid, "a chain " + std::string(kWhat[static_cast<std::size_t>(before.kind)]) +
                                " once, not with " + first + " and " + second};
  }
  if (before.kind > after.kind) {
    return {Code::kInvalid,
            second + " comes before " + first + ": " + std::string(why_before(after.kind, before.kind))};
  }
  // windowkv gives all heads of a layer the same tokens, but not all layers: sharing between layers is not made.
  const bool layers_agree = before.name == "streaming";
  if (before.kind == StepKind::kEvict && after.kind == StepKind::kMerge && !layers_agree) {
    return {Code::kInvalid, second + " cannot follow " + first +
                                ": layers and heads keep different tokens, and merging layers would blend them; pick "
                                "tokens with streaming"};
  }
  return Status::ok();
}

Status check_orders(const Entries& entries) {
  for (std::size_t i = 0; i < entries.size(); ++i) {
    for (std::size_t j = i + 1; j < entries.size(); ++j) {
      if (Status status = check_order(*entries[i], *entries[j]); !status) return status;
    }
  }
  return Status::ok();
}

/// The step of a kind, or nullptr.
const CodecStep* step_of(const std::vector<CodecStep>& steps, const Entries& entries, StepKind kind) {
  const auto found = std::ranges::find(entries, kind, &StepEntry::kind);
  return found == entries.end() ? nullptr : &steps[static_cast<std::size_t>(found - entries.begin())];
}

template <typename Maker>
Maker* maker_of(const Entries& entries, StepKind kind) {
  return std::get<Maker*>((*std::ranges::find(entries, kind, &StepEntry::kind))->make);
}

}  // namespace

const CodecStep* Chain::find(StepKind kind) const {
  const auto found = std::ranges::find(steps, kind, &Step::kind);
  return found == steps.end() ? nullptr : &found->step;
}

Result<Chain> parse_chain(std::string_view spec, std::string_view rotation) {
  auto steps = CodecStep::parse_all(spec);
  if (!steps) return failure(steps.error());
  Entries entries;
  for (const CodecStep& step : *steps) {
    const auto entry = find_step(step.name);
    if (!entry) return failure(entry.error());
    entries.push_back(*entry);
  }
  if (Status status = check_orders(entries); !status) return failure(status);

  Chain chain;
  // From the inside out: the form, what keeps its planes, what stands around all that.
  const CodecStep* quantise = step_of(*steps, entries, StepKind::kQuantise);
  const CodecStep raw{.name = "raw", .parameters = {}};
  auto form = quantise == nullptr ? std::get<MakeForm*>((*find_step(raw.name))->make)(raw)
                                  : maker_of<MakeForm>(entries, StepKind::kQuantise)(*quantise);
  if (!form) return failure(form.error());
  chain.form = std::move(*form);
  chain.codec = std::make_shared<PlaneCodec>(chain.form);
  for (const StepKind kind : {StepKind::kMerge, StepKind::kCluster}) {
    const CodecStep* step = step_of(*steps, entries, kind);
    if (step == nullptr) continue;
    auto codec = maker_of<MakeReducer>(entries, kind)(*step, chain.form);
    if (!codec) return failure(codec.error());
    chain.codec = std::move(*codec);
  }
  std::string prefix;
  if (const CodecStep* written = step_of(*steps, entries, StepKind::kUnrotate); written != nullptr) {
    if (chain.form->lossless() && chain.codec->lossless()) {
      return failure(Code::kInvalid,
                     "unrotate changes keys by a rounding and saves nothing by itself; quantise after it");
    }
    CodecStep step = *written;
    if (step.parameters.empty() && !rotation.empty()) {
      auto known = CodecStep::parse(step.name + "(" + std::string(rotation) + ")");
      if (!known) return failure(known.error());
      step = std::move(*known);
    }
    if (step.parameters.empty()) {
      prefix = step.name + " | ";
    } else {
      auto codec = maker_of<MakeWrapper>(entries, StepKind::kUnrotate)(step, chain.codec);
      if (!codec) return failure(codec.error());
      chain.codec = std::move(*codec);
    }
  }
  if (const CodecStep* step = step_of(*steps, entries, StepKind::kEntropy); step != nullptr) {
    auto codec = maker_of<MakeWrapper>(entries, StepKind::kEntropy)(*step, chain.codec);
    if (!codec) return failure(codec.error());
    chain.codec = std::move(*codec);
  }
  chain.spec = prefix + std::string(chain.codec->spec());
  if (!prefix.empty()) chain.codec = nullptr;
  if (const CodecStep* step = step_of(*steps, entries, StepKind::kEvict); step != nullptr) {
    const auto canonical = maker_of<CanonicalStep>(entries, StepKind::kEvict)(*step);
    if (!canonical) return failure(canonical.error());
    chain.spec = canonical->to_string() + " | " + chain.spec;
  }
  auto canonical = CodecStep::parse_all(chain.spec);
  if (!canonical) return failure(canonical.error());
  for (CodecStep& step : *canonical) {
    const StepKind kind = (*find_step(step.name))->kind;
    chain.steps.push_back({kind, std::move(step)});
  }
  chain.digest = checksum64(chain.spec.data(), chain.spec.size());
  return chain;
}

Result<Chain> parse_chunk_chain(std::string_view spec, std::string_view rotation) {
  auto chain = parse_chain(spec, rotation);
  if (!chain) return chain;
  const CodecStep* evict = chain->find(StepKind::kEvict);
  if (evict == nullptr) return chain;
  return failure(Code::kInvalid, evict->name +
                                     " picks tokens of a whole prompt: it makes compact caches and cannot store chunks "
                                     "that other requests share");
}

std::uint32_t budget_tokens(const CodecStep& step, std::uint32_t prompt_tokens) {
  const std::string& text = *step.find("budget");
  if (text.ends_with('%')) {
    const double share = step.decimal("budget", 0, 0, 1).value();
    // Snapped, so that 25 % of 4 is 1 and not 2.
    return static_cast<std::uint32_t>(std::ceil(share * prompt_tokens - 1e-6));
  }
  return std::min(prompt_tokens, step.number_within("budget", 0, 0, ~0U).value());
}

}  // namespace kvern
