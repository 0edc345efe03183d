#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace kvern {

/// A span's place in a trace, as W3C Trace Context names it.
struct TraceContext {
  std::array<std::uint8_t, 16> trace_id{};
  std::array<std::uint8_t, 8> span_id{};
  bool sampled = false;  ///< the trace is recorded

  /// "00-<trace id>-<span id>-<flags>". Of a later version what this one defines is read; nullopt when the text is no
  /// traceparent or an id is zero. The text may come from anybody.
  static std::optional<TraceContext> parse(std::string_view traceparent);
  std::string trace_id_hex() const;
  std::string span_id_hex() const;
  std::string traceparent() const;
};

/// The trace id of a traceparent, for logs; "none" where there is none.
std::string trace_id_of(std::string_view traceparent);

enum class SpanKind { kInternal, kServer, kClient };

/// A fact of a span: a number, or else a text. Names are constants.
struct SpanAttribute {
  const char* name;
  std::optional<std::uint64_t> number = {};
  std::string text = {};
};

/// A span that has ended. Names are constants, times the tracer's clock.
struct FinishedSpan {
  TraceContext context;
  std::optional<std::array<std::uint8_t, 8>> parent_id;  ///< nullopt: the root of its trace
  const char* name = "";
  SpanKind kind = SpanKind::kInternal;
  std::int64_t start_ns = 0;
  std::int64_t end_ns = 0;
  Status status;
  std::vector<SpanAttribute> attributes;
};

/// Where spans go.
class SpanSink {
 public:
  virtual ~SpanSink() = default;
  /// From any thread; never blocks and never fails: what it has no room for it drops.
  virtual void take(FinishedSpan span) = 0;
};

class Span;
/// nullptr where nothing is recorded: then there is nothing to pay but the question.
using SpanPtr = std::shared_ptr<Span>;

/// A piece of work that is being recorded. Goes to the sink when it ends, at the latest when nobody holds it any more.
/// set() is for one thread at a time; child() and end() are thread-safe.
class Span {
 public:
  Span(SpanSink& sink, const Clock& clock, FinishedSpan begun);
  ~Span() { end(Status::ok()); }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

  const TraceContext& context() const { return span_.context; }
  SpanPtr child(const char* name, SpanKind kind = SpanKind::kInternal) const;
  void set(const char* name, std::string text);
  void set(const char* name, std::uint64_t number);
  /// Ends it now; a second end does nothing.
  void end(const Status& status);
  /// It was not worth recording.
  void discard() { ended_.store(true); }

 private:
  SpanSink& sink_;
  const Clock& clock_;
  FinishedSpan span_;
  std::atomic<bool> ended_{false};
};

/// A child of what may not be recorded.
inline SpanPtr child_of(const SpanPtr& parent, const char* name, SpanKind kind = SpanKind::kInternal) {
  return parent ? parent->child(name, kind) : nullptr;
}

/// Begins spans. Work that belongs to somebody's trace is recorded when that one is; of the rest, one in so many.
/// Thread-safe. Sink and clock outlive all spans.
class Tracer {
 public:
  /// one_in: 0: only what belongs to a recorded trace.
  Tracer(SpanSink& sink, const Clock& clock, std::uint64_t one_in) : sink_(sink), clock_(clock), one_in_(one_in) {}

  /// traceparent: who asks for the work, in the W3C form; one that is no such text counts as none.
  SpanPtr start(const char* name, SpanKind kind, std::string_view traceparent) const;

 private:
  SpanSink& sink_;
  const Clock& clock_;
  const std::uint64_t one_in_;
};

}  // namespace kvern
