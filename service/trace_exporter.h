#pragma once

#include <prometheus/counter.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/trace.h"
#include "service/otlp.h"
#include "store/event_loop.h"
#include "store/http_client.h"

namespace kvern {

/// Sends spans to an OpenTelemetry collector, batch by batch, on a thread of its own. Whoever ends a span pays for
/// putting it into a queue and nothing else. A collector that is away, slow or out of order costs spans: a batch that
/// it asks to have again is sent again a few times, and what finds the queue full meanwhile is dropped and counted.
class TraceExporter final : public SpanSink {
 public:
  struct Config {
    std::string url;
    std::vector<std::string> headers;  ///< "Name: value", beside Content-Type
    std::string ca_file;               ///< PEM; empty: the system's certificates
    std::size_t queue_spans = 8192;
    std::int64_t interval_ns = 1'000'000'000;
    std::int64_t timeout_ns = 5'000'000'000;  ///< of one answer
    TraceResource resource;
  };
  /// Spans by what became of them; they outlive the exporter.
  struct Counters {
    prometheus::Counter& exported;
    prometheus::Counter& queue_full;
    prometheus::Counter& not_taken;
  };
  /// One request never carries more: about half a MiB, of which collectors take several.
  static constexpr std::size_t kBatchSpans = 512;

  /// unix_ns: the wall clock. Throws std::runtime_error when libcurl does not start.
  TraceExporter(Config config, const Counters& counters, const Clock& clock, std::function<std::int64_t()> unix_ns);
  /// Sends what is there, for two seconds at most.
  ~TraceExporter() override;

  void take(FinishedSpan span) override;

 private:
  void arm_timer();
  void send_more();
  void send();
  void answered(const Result<HttpResponse>& answer);
  void end_batch(std::uint64_t taken, const std::string& problem);
  void close();

  const Config config_;
  const Counters counters_;
  const Clock& clock_;
  const std::function<std::int64_t()> unix_ns_;

  std::mutex mutex_;
  std::condition_variable idle_;
  std::deque<FinishedSpan> queue_;
  bool flushed_ = false;  ///< the destructor waits for it

  // Belongs to the loop's thread:
  std::shared_ptr<const std::string> body_;  ///< of the batch that is under way; null: none
  std::uint64_t batch_spans_ = 0;
  int attempts_ = 0;
  std::uint64_t retry_timer_ = 0;  ///< 0: none
  bool closing_ = false;
  bool failing_ = false;  ///< said in the log

  std::unique_ptr<HttpClient> http_;
  EventLoop loop_;  ///< last: its thread uses all of the above
};

}  // namespace kvern
