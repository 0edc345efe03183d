#include "kernels/codec_step.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>

namespace kvern {
namespace {

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

template <typename Number>
std::optional<Number> parsed(std::string_view text) {
  Number value{};
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ec != std::errc() || result.ptr != text.data() + text.size()) return std::nullopt;
  return value;
}

tl::unexpected<Status> unfit(const CodecStep& step, std::string_view parameter, std::string_view text,
                             const std::string& expected) {
  return failure(Code::kInvalid, "codec " + step.name + ": " + std::string(parameter) + " must be " + expected +
                                     ", not " + quoted(text));
}

}  // namespace

Result<CodecStep> CodecStep::parse(std::string_view text) {
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

Result<std::vector<CodecStep>> CodecStep::parse_all(std::string_view spec) {
  if (spec.size() > kMaxSpecBytes) {
    return failure(Code::kInvalid, "a codec spec has at most " + std::to_string(kMaxSpecBytes) + " characters");
  }
  std::vector<CodecStep> steps;
  for (const std::string_view text : split(spec, '|')) {
    Result<CodecStep> step = parse(text);
    if (!step) return failure(step.error());
    steps.push_back(std::move(*step));
  }
  return steps;
}

std::string CodecStep::to_string() const {
  std::string text;
  for (const auto& [parameter, value] : parameters) {
    text.append(text.empty() ? "(" : ",").append(parameter).append("=").append(value);
  }
  return name + text + (text.empty() ? "" : ")");
}

const std::string* CodecStep::find(std::string_view parameter) const {
  const auto given = std::ranges::find(parameters, parameter, &std::pair<std::string, std::string>::first);
  return given == parameters.end() ? nullptr : &given->second;
}

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
  const std::string* text = find(parameter);
  if (text == nullptr) return fallback;
  const auto value = parsed<std::uint32_t>(*text);
  if (value && std::ranges::find(allowed, *value) != allowed.end()) return *value;
  std::vector<std::string> values;
  for (const std::uint32_t number : allowed) values.push_back(std::to_string(number));
  return unfit(*this, parameter, *text, (values.size() > 1 ? "one of " : "") + joined(values));
}

Result<std::uint32_t> CodecStep::number_within(std::string_view parameter, std::uint32_t fallback, std::uint32_t least,
                                               std::uint32_t most) const {
  const std::string* text = find(parameter);
  if (text == nullptr) return fallback;
  const auto value = parsed<std::uint32_t>(*text);
  if (value && *value >= least && *value <= most) return *value;
  return unfit(*this, parameter, *text, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
}

Result<double> CodecStep::decimal(std::string_view parameter, double fallback, double least, double most) const {
  const std::string* text = find(parameter);
  if (text == nullptr) return fallback;
  const bool percent = text->ends_with('%');
  auto value = parsed<double>(std::string_view(*text).substr(0, text->size() - (percent ? 1 : 0)));
  if (value && percent) *value /= 100;
  if (value && *value >= least && *value <= most) return *value;
  return unfit(*this, parameter, *text, "a number from " + decimal_text(least) + " to " + decimal_text(most));
}

Result<std::string_view> CodecStep::word(std::string_view parameter, std::string_view fallback,
                                         std::initializer_list<std::string_view> allowed) const {
  const std::string* text = find(parameter);
  if (text == nullptr) return fallback;
  const auto value = std::ranges::find(allowed, *text);
  if (value != allowed.end()) return *value;
  return unfit(*this, parameter, *text, "one of " + joined(allowed));
}

Result<bool> CodecStep::flag(std::string_view parameter, bool fallback) const {
  const auto value = word(parameter, fallback ? "true" : "false", {"true", "false"});
  if (!value) return failure(value.error());
  return *value == "true";
}

std::string decimal_text(double value) {
  std::array<char, 400> text;  // the smallest double has 325 places
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed).ptr;
  return {text.data(), end};
}

}  // namespace kvern
