#pragma once

#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "base/trace.h"

namespace kvern::testing {

/// Keeps the spans that ended, in that order.
class CollectedSpans final : public SpanSink {
 public:
  void take(FinishedSpan span) override {
    std::lock_guard lock(mutex_);
    spans.push_back(std::move(span));
  }
  std::vector<FinishedSpan> named(std::string_view name) const {
    std::vector<FinishedSpan> found;
    for (const FinishedSpan& span : spans) {
      if (span.name == name) found.push_back(span);
    }
    return found;
  }

  std::vector<FinishedSpan> spans;

 private:
  std::mutex mutex_;
};

/// What a span says of a fact; nullptr when it says nothing.
inline const SpanAttribute* attribute_of(const FinishedSpan& span, std::string_view name) {
  for (const SpanAttribute& each : span.attributes) {
    if (each.name == name) return &each;
  }
  return nullptr;
}

}  // namespace kvern::testing
