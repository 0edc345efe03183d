#include "service/trace_exporter.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <utility>

#include "service/log.h"

namespace kvern {
namespace {

// The specification's: try again after these, and after a connection that failed. Others, 500 among them, are final.
constexpr int kTooMany = 429, kBadGateway = 502, kUnavailable = 503, kGatewayTimeout = 504;
constexpr int kMaxAttempts = 4;
constexpr std::int64_t kFirstBackoffNs = 500'000'000;  // then twice as long each time
constexpr std::int64_t kMaxBackoffNs = 30'000'000'000;
constexpr std::chrono::seconds kLastSend{2};
constexpr std::size_t kMaxToldBytes = 200;

bool asks_again(const Result<HttpResponse>& answer) {
  if (!answer) return true;
  const int status = answer->status;
  return status == kTooMany || status == kBadGateway || status == kUnavailable || status == kGatewayTimeout;
}

std::int64_t backoff_ns(const Result<HttpResponse>& answer, int attempts) {
  std::int64_t wait = kFirstBackoffNs << (attempts - 1);
  if (answer) {
    const std::string_view text = answer->header("retry-after");
    std::uint32_t seconds = 0;  // or a date, which is not read
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
    if (error == std::errc() && end == text.data() + text.size()) wait = std::int64_t{seconds} * 1'000'000'000;
  }
  return std::min(wait, kMaxBackoffNs);
}

std::string problem_of(const Result<HttpResponse>& answer) {
  if (!answer) return answer.error().message();
  return "it answers " + std::to_string(answer->status) + " " + answer->text.substr(0, kMaxToldBytes);
}

}  // namespace

TraceExporter::TraceExporter(Config config, const Counters& counters, const Clock& clock,
                             std::function<std::int64_t()> unix_ns)
    : config_(std::move(config)),
      counters_(counters),
      clock_(clock),
      unix_ns_(std::move(unix_ns)),
      loop_("kvern-traces", clock) {
  http_ = std::make_unique<HttpClient>(
      loop_,
      HttpSettings{
          .ca_file = config_.ca_file, .proxy = "", .max_connections = 1, .connect_timeout_ns = config_.timeout_ns});
  static_cast<void>(loop_.post([this] { arm_timer(); }));
}

TraceExporter::~TraceExporter() {
  if (loop_.post([this] { close(); })) {
    std::unique_lock lock(mutex_);
    idle_.wait_for(lock, kLastSend, [this] { return flushed_; });
  }
  loop_.stop([this] { http_.reset(); });
  counters_.not_taken.Increment(static_cast<double>(queue_.size()));
}

void TraceExporter::take(FinishedSpan span) {
  bool full_batch = false;
  {
    std::lock_guard lock(mutex_);
    if (queue_.size() >= config_.queue_spans) {
      counters_.queue_full.Increment();
      return;
    }
    queue_.push_back(std::move(span));
    full_batch = queue_.size() == std::min(kBatchSpans, config_.queue_spans);
  }
  if (full_batch) static_cast<void>(loop_.post([this] { send_more(); }));
}

void TraceExporter::arm_timer() {
  loop_.at(loop_.now_ns() + config_.interval_ns, [this] {
    send_more();
    arm_timer();
  });
}

/// Begins the next batch, unless one is under way.
void TraceExporter::send_more() {
  if (body_) return;
  std::vector<FinishedSpan> batch;
  {
    std::lock_guard lock(mutex_);
    const std::size_t count = std::min(queue_.size(), kBatchSpans);
    const auto end = queue_.begin() + static_cast<std::ptrdiff_t>(count);
    batch.assign(std::make_move_iterator(queue_.begin()), std::make_move_iterator(end));
    queue_.erase(queue_.begin(), end);
    if (batch.empty() && closing_) {
      flushed_ = true;
      idle_.notify_all();
    }
  }
  if (batch.empty()) return;
  batch_spans_ = batch.size();
  body_ = std::make_shared<const std::string>(otlp_json(batch, config_.resource, unix_ns_() - clock_.now_ns()));
  attempts_ = 0;
  send();
}

void TraceExporter::send() {
  retry_timer_ = 0;
  ++attempts_;
  HttpRequest request{.method = "POST", .url = config_.url, .headers = config_.headers};
  request.headers.emplace_back("Content-Type: application/json");
  request.body = {std::as_bytes(std::span(*body_))};
  request.hold = body_;
  request.timeout_ns = config_.timeout_ns;
  http_->execute(std::move(request), [this](const Result<HttpResponse>& answer) { answered(answer); });
}

void TraceExporter::answered(const Result<HttpResponse>& answer) {
  if (answer && answer->status / 100 == 2) {
    const std::uint64_t rejected = std::min(otlp_rejected_spans(answer->text), batch_spans_);
    return end_batch(batch_spans_ - rejected, rejected == 0 ? "" : "it rejects some: " + problem_of(answer));
  }
  if (asks_again(answer) && attempts_ < kMaxAttempts && !closing_) {
    retry_timer_ = loop_.at(loop_.now_ns() + backoff_ns(answer, attempts_), [this] { send(); });
    return;
  }
  end_batch(0, problem_of(answer));
}

void TraceExporter::end_batch(std::uint64_t taken, const std::string& problem) {
  counters_.exported.Increment(static_cast<double>(taken));
  counters_.not_taken.Increment(static_cast<double>(batch_spans_ - taken));
  if (!problem.empty() && !failing_ && http_) {
    log_warn("the tracing collector does not take spans; they are dropped", {{"url", config_.url}, {"why", problem}});
  } else if (problem.empty() && failing_) {
    log_info("the tracing collector takes spans again", {{"url", config_.url}});
  }
  failing_ = !problem.empty();
  body_.reset();
  std::size_t waiting = 0;
  {
    std::lock_guard lock(mutex_);
    waiting = queue_.size();
  }
  if (http_ && (closing_ || waiting >= kBatchSpans)) loop_.later([this] { send_more(); });
}

void TraceExporter::close() {
  closing_ = true;
  if (retry_timer_ != 0) {
    loop_.cancel(retry_timer_);
    return end_batch(0, "the daemon stops");
  }
  send_more();
}

}  // namespace kvern
