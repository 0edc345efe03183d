#include "service/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace kvern {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;
using ::testing::EndsWith;
using ::testing::MatchesRegex;

class LogTest : public ::testing::Test {
 protected:
  /// What was written since the last call.
  std::vector<std::string> lines() {
    std::vector<std::string> result;
    std::istringstream text(out_.str());
    for (std::string line; std::getline(text, line);) result.push_back(line);
    out_.str("");
    return result;
  }
  std::vector<json> objects() {
    std::vector<json> result;
    for (const auto& line : lines()) result.push_back(json::parse(line));
    return result;
  }

  ManualClock clock_;
  std::ostringstream out_;
  Log log_{{.level = LogLevel::kInfo, .json = true, .lines_per_second = 3}, clock_, out_};
};

TEST_F(LogTest, AJsonLineHasTimeLevelEventAndFactsWithTheirTypes) {
  log_.write(LogLevel::kWarn, "a session ended", {{"session", 7U}, {"why", "it said \"bye\"\n"}, {"seconds", 0.25}});
  const auto found = objects();
  ASSERT_EQ(found.size(), 1U);
  EXPECT_THAT(found[0].at("time").get<std::string>(),
              MatchesRegex("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}[.][0-9]{3}Z"));
  EXPECT_EQ(found[0].at("level"), "warn");
  EXPECT_EQ(found[0].at("event"), "a session ended");
  EXPECT_EQ(found[0].at("session"), 7U);
  EXPECT_EQ(found[0].at("why"), "it said \"bye\"\n");
  EXPECT_EQ(found[0].at("seconds"), 0.25);
}

TEST_F(LogTest, BytesThatAreNoTextAndNumbersThatAreNoneStillGiveJson) {
  log_.write(LogLevel::kInfo, "odd", {{"text", "\xff\xfe"}, {"number", std::numeric_limits<double>::quiet_NaN()}});
  const auto found = objects();
  ASSERT_EQ(found.size(), 1U);
  EXPECT_TRUE(found[0].at("number").is_null());
}

TEST_F(LogTest, TextQuotesWhatCouldBeTakenForAnotherFact) {
  log_.configure({.level = LogLevel::kInfo, .json = false, .lines_per_second = 0});
  log_.write(LogLevel::kInfo, "opened", {{"client", "a session=9\n"}, {"role", "worker"}, {"none", ""}, {"n", 3}});
  const auto found = lines();
  ASSERT_EQ(found.size(), 1U);
  EXPECT_THAT(found[0], EndsWith("Z info  opened client=\"a session=9\\n\" role=worker none=\"\" n=3"));
}

TEST_F(LogTest, OnlyWhatTheLevelAsksForIsWritten) {
  log_.write(LogLevel::kDebug, "small");
  EXPECT_TRUE(lines().empty());
  EXPECT_FALSE(log_.writes(LogLevel::kDebug));
  log_.configure({.level = LogLevel::kOff});
  log_.write(LogLevel::kError, "large");
  EXPECT_TRUE(lines().empty());
  EXPECT_EQ(log_level("debug"), LogLevel::kDebug);
  EXPECT_EQ(log_level("off"), LogLevel::kOff);
}

TEST_F(LogTest, OfOneEventSoManyLinesASecondAreWrittenAndTheRestIsCounted) {
  for (int i = 0; i < 10; ++i) log_.write(LogLevel::kInfo, "flood");
  log_.write(LogLevel::kInfo, "another");
  EXPECT_EQ(lines().size(), 4U);
  EXPECT_EQ(log_.left_out(), 7U);
  clock_.advance(1s);
  log_.write(LogLevel::kInfo, "flood");
  log_.write(LogLevel::kInfo, "flood");
  const auto found = objects();
  ASSERT_EQ(found.size(), 2U);
  EXPECT_EQ(found[0].at("left_out"), 7U);
  EXPECT_FALSE(found[1].contains("left_out")) << "they are told once";
}

TEST_F(LogTest, WhatWasLeftOutIsToldWhenTheFloodHasEnded) {
  for (int i = 0; i < 5; ++i) log_.write(LogLevel::kWarn, "flood");
  lines();
  log_.tell_left_out();
  EXPECT_TRUE(lines().empty()) << "the second has not passed";
  clock_.advance(1s);
  log_.tell_left_out();
  log_.tell_left_out();
  const auto found = objects();
  ASSERT_EQ(found.size(), 1U);
  EXPECT_EQ(found[0].at("event"), "lines were left out");
  EXPECT_EQ(found[0].at("of"), "flood");
  EXPECT_EQ(found[0].at("left_out"), 2U);
  EXPECT_EQ(found[0].at("level"), "warn");
}

TEST_F(LogTest, LinesOfManyThreadsAreWhole) {
  log_.configure({.json = true, .lines_per_second = 0});
  {
    std::vector<std::jthread> threads;
    for (unsigned thread = 0; thread < 4; ++thread) {
      threads.emplace_back([this, thread] {
        for (unsigned i = 0; i < 200; ++i) log_.write(LogLevel::kInfo, "step", {{"thread", thread}, {"i", i}});
      });
    }
  }
  EXPECT_EQ(objects().size(), 800U);
}

}  // namespace
}  // namespace kvern
