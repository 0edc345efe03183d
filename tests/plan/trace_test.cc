#include <gtest/gtest.h>

#include <sstream>
#include <string>

#include "plan/trace.h"

namespace kvern::plan {
namespace {

Result<Trace> parse(const std::string& text) {
  std::istringstream in(text);
  return read_trace(in);
}

std::string error_of(const std::string& line) {
  const std::string good = R"({"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]})";
  const auto trace = parse(good + "\n" + line + "\n");
  EXPECT_FALSE(trace) << line;
  EXPECT_TRUE(trace || trace.error().code() == Code::kInvalid);
  return trace ? "" : trace.error().message();
}

TEST(Trace, IsReadLineByLine) {
  const auto trace = parse(
      "{\"timestamp\": 3, \"input_length\": 1100, \"output_length\": 5, \"hash_ids\": [40, 7, 9]}\r\n"
      "\n"
      "{\"timestamp\": 27.5, \"input_length\": 512.0, \"output_length\": 0, \"hash_ids\": [40], \"more\": true}");
  ASSERT_TRUE(trace) << trace.error().message();
  ASSERT_EQ(trace->requests.size(), 2U);
  EXPECT_EQ(trace->requests[0].timestamp_ms, 3);
  EXPECT_EQ(trace->requests[0].input_tokens, 1100U);
  EXPECT_EQ(trace->requests[0].output_tokens, 5U);
  EXPECT_EQ(trace->requests[0].blocks, (std::vector<std::uint32_t>{0, 1, 2}));
  EXPECT_EQ(trace->requests[1].timestamp_ms, 27);
  EXPECT_EQ(trace->requests[1].blocks, (std::vector<std::uint32_t>{0}));
  EXPECT_EQ(trace->distinct_blocks, 3U);
  EXPECT_EQ(trace->input_tokens, 1612U);
}

TEST(Trace, SaysWhichLineIsMalformedAndHow) {
  EXPECT_EQ(error_of("{"), "line 2: expected one JSON object");
  EXPECT_EQ(error_of("[1]"), "line 2: expected one JSON object");
  EXPECT_EQ(error_of(R"({"input_length": 1, "output_length": 1, "hash_ids": []})"),
            "line 2: \"timestamp\" must be a number of milliseconds from 0 on");
  EXPECT_EQ(error_of(R"({"timestamp": -1, "input_length": 1, "output_length": 1, "hash_ids": []})"),
            "line 2: \"timestamp\" must be a number of milliseconds from 0 on");
  EXPECT_EQ(error_of(R"({"timestamp": 0, "input_length": "1", "output_length": 1, "hash_ids": []})"),
            "line 2: \"input_length\" must be a whole number of tokens");
  EXPECT_EQ(error_of(R"({"timestamp": 0, "input_length": 1e30, "output_length": 1, "hash_ids": []})"),
            "line 2: \"input_length\" must be a whole number of tokens");
  EXPECT_EQ(error_of(R"({"timestamp": 0, "input_length": 1, "hash_ids": []})"),
            "line 2: \"output_length\" must be a whole number of tokens");
  EXPECT_EQ(error_of(R"({"timestamp": 0, "input_length": 1, "output_length": 1})"),
            "line 2: \"hash_ids\" must be a list of whole numbers");
  EXPECT_EQ(error_of(R"({"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ["a"]})"),
            "line 2: \"hash_ids\" must be a list of whole numbers");
  EXPECT_EQ(error_of(R"({"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1, 2, 3]})"),
            "line 2: 3 hash_ids, but 513 tokens fill 2 blocks of 512");
  EXPECT_EQ(error_of(R"({"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 1]})"),
            "line 2: hash id 1 is there twice: an id names the whole prompt up to its end");
}

TEST(Trace, OfNothingIsRefused) {
  EXPECT_EQ(parse("\n\n").error().message(), "the trace holds no request");
  EXPECT_EQ(load_trace("/nowhere/trace.jsonl").error().code(), Code::kNotFound);
}

}  // namespace
}  // namespace kvern::plan
