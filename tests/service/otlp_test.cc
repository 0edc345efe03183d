#include "service/otlp.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace kvern {
namespace {

using nlohmann::json;

FinishedSpan sample() {
  FinishedSpan span;
  span.context = *TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
  span.parent_id = TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000abcdef-01")->span_id;
  span.name = "kvern.match";
  span.kind = SpanKind::kServer;
  span.start_ns = 5;
  span.end_ns = 12;
  span.attributes = {{.name = "kvern.tokens", .number = UINT64_MAX / 2}, {.name = "kvern.tier", .text = "nvme"}};
  return span;
}

json encode(const std::vector<FinishedSpan>& spans) {
  return json::parse(
      otlp_json(spans, {.service_name = "kvernd", .service_version = "1", .instance = "i", .host = "h"}, 1'000));
}

TEST(OtlpTest, ASpanIsWrittenAsTheJsonMappingWantsIt) {
  const json written = encode({sample()});
  const json& resource = written["resourceSpans"].at(0);
  EXPECT_EQ(resource["resource"]["attributes"].at(0),
            json::parse(R"({"key": "service.name", "value": {"stringValue": "kvernd"}})"));
  const json& scope = resource["scopeSpans"].at(0);
  EXPECT_EQ(scope["scope"]["name"], "kvern");
  EXPECT_EQ(scope["spans"].at(0), json::parse(R"({
    "traceId": "4bf92f3577b34da6a3ce929d0e0e4736",
    "spanId": "00f067aa0ba902b7",
    "parentSpanId": "0000000000abcdef",
    "name": "kvern.match",
    "kind": 2,
    "startTimeUnixNano": "1005",
    "endTimeUnixNano": "1012",
    "attributes": [
      {"key": "kvern.tokens", "value": {"intValue": "9223372036854775807"}},
      {"key": "kvern.tier", "value": {"stringValue": "nvme"}},
      {"key": "kvern.outcome", "value": {"stringValue": "ok"}}
    ]
  })"));
}

TEST(OtlpTest, TheRootOfATraceHasNoParent) {
  FinishedSpan root = sample();
  root.parent_id.reset();
  EXPECT_FALSE(encode({root})["resourceSpans"][0]["scopeSpans"][0]["spans"][0].contains("parentSpanId"));
}

TEST(OtlpTest, AMissIsNoErrorAndAFailureIsOne) {
  FinishedSpan missed = sample(), failed = sample();
  missed.status = Status(Code::kNotFound, "not stored");
  failed.status = Status(Code::kCorrupt, "the checksum is wrong");
  const json spans = encode({missed, failed})["resourceSpans"][0]["scopeSpans"][0]["spans"];
  EXPECT_FALSE(spans[0].contains("status"));
  EXPECT_EQ(spans[1]["status"], json::parse(R"({"code": 2, "message": "the checksum is wrong"})"));
}

TEST(OtlpTest, BytesThatAreNoTextAreReplaced) {
  FinishedSpan odd = sample();
  odd.attributes[1].text = "a\xff\"\n";
  EXPECT_EQ(encode({odd})["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["attributes"][1]["value"]["stringValue"],
            "a\xef\xbf\xbd\"\n");
}

TEST(OtlpTest, AnAnswerTellsWhatWasRejected) {
  EXPECT_EQ(otlp_rejected_spans(R"({"partialSuccess": {"rejectedSpans": "3", "errorMessage": "full"}})"), 3U);
  EXPECT_EQ(otlp_rejected_spans(R"({"partialSuccess": {"rejectedSpans": 4}})"), 4U);
  for (const char* nothing : {"", "{}", "[]", "{", "\xff", R"({"partialSuccess": 1})", R"({"partialSuccess": {}})",
                              R"({"partialSuccess": {"rejectedSpans": -1}})",
                              R"({"partialSuccess": {"rejectedSpans": "99999999999999999999"}})",
                              R"({"partialSuccess": {"rejectedSpans": "x"}})"}) {
    EXPECT_EQ(otlp_rejected_spans(nothing), 0U) << nothing;
  }
}

}  // namespace
}  // namespace kvern
