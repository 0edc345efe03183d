#include "service/trace_exporter.h"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "service/metrics.h"
#include "tests/store/fake_server.h"

namespace kvern {
namespace {

using nlohmann::json;

/// A collector that answers as the test wants it to.
class FakeCollector {
 public:
  struct Request {
    std::vector<std::string> head;
    json body;
  };
  /// The status line and headers of the n-th answer (from 0) and its body; may block.
  using Answer = std::function<std::pair<std::string, std::string>(std::size_t number)>;

  explicit FakeCollector(Answer answer) : answer_(std::move(answer)), server_([this](auto& c) { serve(c); }) {}

  std::string url() const { return "http://" + server_.address() + "/v1/traces"; }
  void wait_for(std::size_t requests) {
    std::unique_lock lock(mutex_);
    const bool came = come_.wait_for(lock, std::chrono::seconds(30), [&] { return requests_.size() >= requests; });
    EXPECT_TRUE(came) << requests_.size() << " of " << requests << " requests came";
  }
  std::vector<Request> requests() {
    std::lock_guard lock(mutex_);
    return requests_;
  }
  static std::size_t spans_of(const Request& request) {
    return request.body.at("resourceSpans").at(0).at("scopeSpans").at(0).at("spans").size();
  }

 private:
  void serve(testing::FakeConnection& connection) {
    while (true) {
      Request request;
      std::size_t length = 0;
      while (true) {
        const auto line = connection.read_line();
        if (!line) return;
        if (line->empty()) break;
        if (line->starts_with("Content-Length: ")) length = std::stoul(line->substr(16));
        request.head.push_back(*line);
      }
      const auto body = connection.read_exact(length);
      if (!body) return;
      request.body = json::parse(*body);
      std::size_t number = 0;
      {
        std::lock_guard lock(mutex_);
        number = requests_.size();
        requests_.push_back(std::move(request));
      }
      come_.notify_all();
      const auto [head, text] = answer_(number);
      connection.send("HTTP/1.1 " + head + "\r\nContent-Length: " + std::to_string(text.size()) + "\r\n\r\n" + text);
    }
  }

  const Answer answer_;
  std::mutex mutex_;
  std::condition_variable come_;
  std::vector<Request> requests_;
  testing::FakeServer server_;
};

std::pair<std::string, std::string> good(std::size_t) { return {"200 OK", "{}"}; }

struct TraceExporterTest : ::testing::Test {
  Metrics metrics;

  std::unique_ptr<TraceExporter> make(const std::string& url, std::size_t queue_spans = 10'000,
                                      std::int64_t interval_ns = 10'000'000) {
    return std::make_unique<TraceExporter>(
        TraceExporter::Config{
            .url = url,
            .headers = {"X-Key: secret"},
            .ca_file = "",
            .queue_spans = queue_spans,
            .interval_ns = interval_ns,
            .timeout_ns = 100'000'000,
            .resource = {.service_name = "kvernd", .service_version = "1", .instance = "i", .host = "h"}},
        TraceExporter::Counters{metrics.spans_exported, metrics.spans_queue_full, metrics.spans_not_taken},
        Clock::system(), [] { return std::int64_t{1'800'000'000'000'000'000}; });
  }
  static void record(TraceExporter& exporter, std::size_t spans) {
    const Tracer tracer(exporter, Clock::system(), 1);
    for (std::size_t i = 0; i < spans; ++i) tracer.start("kvern.match", SpanKind::kServer, "")->end(Status::ok());
  }
  double exported() const { return metrics.spans_exported.Value(); }
  double queue_full() const { return metrics.spans_queue_full.Value(); }
  double not_taken() const { return metrics.spans_not_taken.Value(); }
};

constexpr std::int64_t kHour = 3'600'000'000'000;

TEST_F(TraceExporterTest, SpansArriveWithTheirTimesAndHeaders) {
  FakeCollector collector(good);
  auto exporter = make(collector.url());
  record(*exporter, 3);
  collector.wait_for(1);  // by the interval
  exporter.reset();
  std::size_t spans = 0;
  for (const auto& request : collector.requests()) {
    spans += FakeCollector::spans_of(request);
    EXPECT_EQ(request.head.at(0), "POST /v1/traces HTTP/1.1");
    EXPECT_NE(std::ranges::find(request.head, "Content-Type: application/json"), request.head.end());
    EXPECT_NE(std::ranges::find(request.head, "X-Key: secret"), request.head.end());
  }
  EXPECT_EQ(spans, 3U);
  const json span = collector.requests()[0].body["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
  const auto begin = std::stoll(span["startTimeUnixNano"].get<std::string>());
  const auto end = std::stoll(span["endTimeUnixNano"].get<std::string>());
  EXPECT_LE(begin, end);
  EXPECT_GT(begin, 1'799'999'000'000'000'000);
  EXPECT_LE(end, 1'800'000'000'000'000'000);
  EXPECT_EQ(exported(), 3);
  EXPECT_EQ(queue_full() + not_taken(), 0);
}

TEST_F(TraceExporterTest, WhatIsLeftIsSentAtTheEndInBatches) {
  FakeCollector collector(good);
  auto exporter = make(collector.url(), 10'000, kHour);
  record(*exporter, 1200);
  exporter.reset();
  std::size_t spans = 0;
  for (const auto& request : collector.requests()) {
    EXPECT_LE(FakeCollector::spans_of(request), TraceExporter::kBatchSpans);
    spans += FakeCollector::spans_of(request);
  }
  EXPECT_EQ(spans, 1200U);
  EXPECT_EQ(exported(), 1200);
}

TEST_F(TraceExporterTest, AFullBatchDoesNotWaitForTheInterval) {
  FakeCollector collector(good);
  const auto exporter = make(collector.url(), 10'000, kHour);
  record(*exporter, TraceExporter::kBatchSpans);
  collector.wait_for(1);
}

TEST_F(TraceExporterTest, ABusyCollectorGetsTheSameBatchAgain) {
  FakeCollector collector([](std::size_t number) {
    return number == 0   ? std::pair<std::string, std::string>("429 Too Many Requests\r\nRetry-After: 0", "")
           : number == 1 ? std::pair<std::string, std::string>("503 Service Unavailable\r\nRetry-After: 0", "")
                         : good(number);
  });
  auto exporter = make(collector.url());
  record(*exporter, 1);
  collector.wait_for(3);
  exporter.reset();
  const auto requests = collector.requests();
  ASSERT_EQ(requests.size(), 3U);
  EXPECT_EQ(requests[0].body, requests[1].body);
  EXPECT_EQ(requests[0].body, requests[2].body);
  EXPECT_EQ(exported(), 1);
  EXPECT_EQ(not_taken(), 0);
}

TEST_F(TraceExporterTest, WhatTheCollectorRefusesIsDroppedAndTheNextBatchIsTriedAnew) {
  FakeCollector collector([](std::size_t number) {
    return number == 0 ? std::pair<std::string, std::string>("500 Internal Server Error", "no") : good(number);
  });
  auto exporter = make(collector.url());
  record(*exporter, 1);
  collector.wait_for(1);
  record(*exporter, 1);
  collector.wait_for(2);
  exporter.reset();
  EXPECT_EQ(collector.requests().size(), 2U);
  EXPECT_EQ(not_taken(), 1);
  EXPECT_EQ(exported(), 1);
}

TEST_F(TraceExporterTest, RejectedSpansOfATakenBatchAreCounted) {
  FakeCollector collector([](std::size_t) {
    return std::pair<std::string, std::string>("200 OK", R"({"partialSuccess": {"rejectedSpans": "2"}})");
  });
  auto exporter = make(collector.url(), 10'000, kHour);
  record(*exporter, 5);
  exporter.reset();
  EXPECT_EQ(exported(), 3);
  EXPECT_EQ(not_taken(), 2);
}

TEST_F(TraceExporterTest, ASlowCollectorCostsSpansAndNobodysTime) {
  std::mutex gate;
  std::unique_lock closed(gate);
  FakeCollector collector([&gate](std::size_t number) {
    const std::lock_guard pass(gate);
    return good(number);
  });
  auto exporter = make(collector.url(), 4);
  record(*exporter, 1);
  collector.wait_for(1);
  record(*exporter, 4 + 3);  // returns although nothing is answered
  EXPECT_EQ(queue_full(), 3);
  collector.wait_for(2);  // the answer came too late, and the batch is sent again
  closed.unlock();
  exporter.reset();
  EXPECT_EQ(exported() + not_taken(), 5);
}

TEST_F(TraceExporterTest, ACollectorThatIsAwayCostsSpansAndNothingElse) {
  std::string url;
  {
    const FakeCollector gone(good);
    url = gone.url();
  }
  auto exporter = make(url, 100);
  record(*exporter, 5000);
  exporter.reset();
  EXPECT_EQ(exported(), 0);
  EXPECT_EQ(queue_full() + not_taken(), 5000);
}

}  // namespace
}  // namespace kvern
