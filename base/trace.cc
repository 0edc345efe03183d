#include "base/trace.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <span>

namespace kvern {
namespace {

constexpr std::size_t kTraceAt = 3, kSpanAt = 36, kFlagsAt = 53, kTextBytes = 55;
constexpr std::uint8_t kSampledFlag = 1;

std::optional<std::uint8_t> digit(char c) {
  if (c >= '0' && c <= '9') return static_cast<std::uint8_t>(c - '0');
  if (c >= 'a' && c <= 'f') return static_cast<std::uint8_t>(c - 'a' + 10);
  return std::nullopt;
}

/// False when the text has other characters than lower-case hexadecimal digits.
bool parse_hex(std::string_view text, std::span<std::uint8_t> bytes) {
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const auto high = digit(text[2 * i]), low = digit(text[2 * i + 1]);
    if (!high || !low) return false;
    bytes[i] = static_cast<std::uint8_t>(*high << 4 | *low);
  }
  return true;
}

std::string hex(std::span<const std::uint8_t> bytes) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes.size());
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

bool is_zero(std::span<const std::uint8_t> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::uint8_t byte) { return byte == 0; });
}

/// Ids must be unlikely to meet, not hard to guess.
std::mt19937_64& random_numbers() {
  thread_local std::mt19937_64 numbers = [] {
    std::random_device device;
    std::seed_seq seed{device(), device(), device(), device()};
    return std::mt19937_64(seed);
  }();
  return numbers;
}

void fill_with_random(std::span<std::uint8_t> bytes) {
  do {
    for (std::size_t at = 0; at < bytes.size(); at += sizeof(std::uint64_t)) {
      const std::uint64_t number = random_numbers()();
      std::memcpy(bytes.data() + at, &number, std::min(bytes.size() - at, sizeof number));
    }
  } while (is_zero(bytes));
}

}  // namespace

std::optional<TraceContext> TraceContext::parse(std::string_view text) {
  if (text.size() < kTextBytes || text[2] != '-' || text[kSpanAt - 1] != '-' || text[kFlagsAt - 1] != '-') {
    return std::nullopt;
  }
  std::array<std::uint8_t, 1> version{}, flags{};
  TraceContext context;
  if (!parse_hex(text.substr(0, 2), version) || !parse_hex(text.substr(kTraceAt), context.trace_id) ||
      !parse_hex(text.substr(kSpanAt), context.span_id) || !parse_hex(text.substr(kFlagsAt), flags)) {
    return std::nullopt;
  }
  const bool longer = text.size() > kTextBytes;
  if (version[0] == 0xff || (longer && (version[0] == 0 || text[kTextBytes] != '-'))) return std::nullopt;
  if (is_zero(context.trace_id) || is_zero(context.span_id)) return std::nullopt;
  context.sampled = (flags[0] & kSampledFlag) != 0;
  return context;
}

std::string TraceContext::trace_id_hex() const { return hex(trace_id); }
std::string TraceContext::span_id_hex() const { return hex(span_id); }
std::string TraceContext::traceparent() const {
  return "00-" + trace_id_hex() + "-" + span_id_hex() + (sampled ? "-01" : "-00");
}

std::string trace_id_of(std::string_view traceparent) {
  const auto context = TraceContext::parse(traceparent);
  return context ? context->trace_id_hex() : "none";
}

Span::Span(SpanSink& sink, const Clock& clock, FinishedSpan begun)
    : sink_(sink), clock_(clock), span_(std::move(begun)) {
  span_.start_ns = clock_.now_ns();
  span_.context.sampled = true;
  fill_with_random(span_.context.span_id);
}

SpanPtr Span::child(const char* name, SpanKind kind) const {
  FinishedSpan begun;
  begun.context = span_.context;
  begun.parent_id = span_.context.span_id;
  begun.name = name;
  begun.kind = kind;
  return std::make_shared<Span>(sink_, clock_, std::move(begun));
}

void Span::set(const char* name, std::string text) {
  span_.attributes.push_back({.name = name, .text = std::move(text)});
}

void Span::set(const char* name, std::uint64_t number) { span_.attributes.push_back({.name = name, .number = number}); }

void Span::end(const Status& status) {
  if (ended_.exchange(true)) return;
  span_.end_ns = clock_.now_ns();
  span_.status = status;
  FinishedSpan finished;
  finished.context = span_.context;  // stays: others may still begin children
  finished.parent_id = span_.parent_id;
  finished.name = span_.name;
  finished.kind = span_.kind;
  finished.start_ns = span_.start_ns;
  finished.end_ns = span_.end_ns;
  finished.status = std::move(span_.status);
  finished.attributes = std::move(span_.attributes);
  sink_.take(std::move(finished));
}

SpanPtr Tracer::start(const char* name, SpanKind kind, std::string_view traceparent) const {
  FinishedSpan begun;
  begun.name = name;
  begun.kind = kind;
  if (const auto parent = TraceContext::parse(traceparent)) {
    if (!parent->sampled) return nullptr;
    begun.context = *parent;
    begun.parent_id = parent->span_id;
  } else {
    if (one_in_ == 0 || random_numbers()() % one_in_ != 0) return nullptr;
    fill_with_random(begun.context.trace_id);
  }
  return std::make_shared<Span>(sink_, clock_, std::move(begun));
}

}  // namespace kvern
