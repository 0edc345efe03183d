#include <algorithm>
#include <array>
#include <charconv>

#include "kernels/codec.h"
#include "kernels/codec_step.h"
#include "kernels/plane_codec.h"

/// Every form of a plane that there is, one line each.
#define KVERN_FORMS(REGISTER) \
  REGISTER(raw)               \
  REGISTER(int8)

namespace kvern {

#define KVERN_DECLARE(name) MakeForm make_##name##_form;
KVERN_FORMS(KVERN_DECLARE)
#undef KVERN_DECLARE

namespace {

struct Entry {
  std::string_view name;
  MakeForm* make;
};

#define KVERN_ENTRY(name) Entry{#name, make_##name##_form},
constexpr auto kForms = std::to_array<Entry>({KVERN_FORMS(KVERN_ENTRY)});
#undef KVERN_ENTRY

/// Specs come from configuration files, requests and containers: longer ones are nobody's.
constexpr std::size_t kMaxSpecBytes = 512;

std::string quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

template <typename Names>
std::string joined(const Names& names) {
  std::string text;
  for (const auto& name : names) {
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

bool is_word(std::string_view text) {
  return !text.empty() && std::ranges::all_of(text, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' ||
           c == '%' || c == '-';
  });
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const std::size_t end = text.find(separator);
    parts.push_back(trimmed(text.substr(0, end)));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

Result<CodecStep> parse_step(std::string_view text) {
  const auto malformed = [&] {
    return failure(Code::kInvalid,
                   "codec step " + quoted(text) + " is not of the form name or name(parameter=value, ...)");
  };
  CodecStep step;
  const std::size_t open = text.find('(');
  step.name = std::string(trimmed(text.substr(0, open)));
  if (!is_word(step.name)) return malformed();
  if (open == std::string_view::npos) return step;
  if (text.back() != ')') return malformed();
  const std::string_view inside = trimmed(text.substr(open + 1, text.size() - open - 2));
  if (inside.empty()) return step;
  for (const std::string_view parameter : split(inside, ',')) {
    const std::size_t equals = parameter.find('=');
    if (equals == std::string_view::npos) return malformed();
    std::string name(trimmed(parameter.substr(0, equals)));
    std::string value(trimmed(parameter.substr(equals + 1)));
    if (!is_word(name) || !is_word(value)) return malformed();
    if (std::ranges::any_of(step.parameters, [&](const auto& seen) { return seen.first == name; })) {
      return failure(Code::kInvalid, "codec step " + quoted(text) + " sets " + name + " twice");
    }
    step.parameters.emplace_back(std::move(name), std::move(value));
  }
  return step;
}

}  // namespace

Status CodecStep::check_names(std::initializer_list<std::string_view> known) const {
  for (const auto& [parameter, value] : parameters) {
    if (std::ranges::find(known, parameter) != known.end()) continue;
    const std::string there = known.size() == 0 ? "it has none" : "it has: " + joined(known);
    return {Code::kInvalid, "codec " + name + " has no parameter " + quoted(parameter) + "; " + there};
  }
  return Status::ok();
}

Result<std::uint32_t> CodecStep::number(std::string_view parameter, std::uint32_t fallback,
                                        std::initializer_list<std::uint32_t> allowed) const {
  const auto given = std::ranges::find(parameters, parameter, &std::pair<std::string, std::string>::first);
  if (given == parameters.end()) return fallback;
  const std::string& text = given->second;
  std::uint32_t value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  if (parsed.ec == std::errc() && parsed.ptr == text.data() + text.size() &&
      std::ranges::find(allowed, value) != allowed.end()) {
    return value;
  }
  std::vector<std::string> values;
  for (const std::uint32_t number : allowed) values.push_back(std::to_string(number));
  return failure(Code::kInvalid, "codec " + name + ": " + std::string(parameter) + " must be " +
                                     (values.size() > 1 ? "one of " : "") + joined(values) + ", not " + quoted(text));
}

std::vector<std::string> codec_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kForms) names.emplace_back(entry.name);
  return names;
}

Result<std::shared_ptr<const Codec>> make_codec(std::string_view spec) {
  if (spec.size() > kMaxSpecBytes) {
    return failure(Code::kInvalid, "a codec spec has at most " + std::to_string(kMaxSpecBytes) + " characters");
  }
  std::vector<CodecStep> steps;
  for (const std::string_view text : split(spec, '|')) {
    Result<CodecStep> step = parse_step(text);
    if (!step) return failure(step.error());
    steps.push_back(std::move(*step));
  }
  std::vector<MakeForm*> makers;
  for (const CodecStep& step : steps) {
    const auto entry = std::ranges::find(kForms, step.name, &Entry::name);
    if (entry == kForms.end()) {
      return failure(Code::kInvalid,
                     "there is no codec " + quoted(step.name) + "; there are: " + joined(codec_names()));
    }
    makers.push_back(entry->make);
  }
  if (steps.size() > 1) {
    return failure(Code::kInvalid,
                   "the codecs of " + quoted(spec) + " cannot be chained; use one of: " + joined(codec_names()));
  }
  auto form = makers.front()(steps.front());
  if (!form) return failure(form.error());
  return std::make_shared<PlaneCodec>(*std::move(form));
}

}  // namespace kvern
