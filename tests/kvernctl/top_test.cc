#include "kvernctl/top.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace kvern {
namespace {

using ::testing::Contains;
using ::testing::Field;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using ::testing::StartsWith;

Reading reading(double uptime, double hits, int sessions) {
  std::string status = R"({"version":"1.2.3","state":"running","uptime_seconds":)" + std::to_string(uptime) +
                       R"(,"lower_tiers":[{"name":"nvme","breaker":"open"}],"sessions":[)";
  for (int i = 0; i < sessions; ++i) {
    status +=
        std::string(i == 0 ? "" : ",") + R"({"id":)" + std::to_string(i) +
        R"(,"role":"worker","data_plane":"shm","client_name":"a host with a name that is long, and \u001b[31mred",)" +
        R"("tenant":"default","leases":3,"silent_seconds":0.25})";
  }
  const std::string metrics =
      "kvern_uptime_seconds " + std::to_string(uptime) +
      "\n# TYPE kvern_requested_tokens_total counter\nkvern_requested_tokens_total " + std::to_string(2 * hits) +
      "\n# TYPE kvern_hit_tokens_total counter\nkvern_hit_tokens_total{tier=\"dram\"} " + std::to_string(hits) + "\n";
  return {.status_json = status + "]}", .metrics = *Scrape::parse(metrics)};
}

TEST(Top, FitsTheScreenHoweverMuchThereIs) {
  for (const int sessions : {0, 3, 200}) {
    for (const std::size_t height : {10U, 24U, 60U}) {
      const auto lines = top_screen(reading(10, 0, sessions), reading(12, 100, sessions), 80, height);
      EXPECT_LE(lines.size(), height);
      for (const TopLine& line : lines) {
        EXPECT_LE(line.text.size(), 80U);
        EXPECT_TRUE(std::ranges::all_of(line.text, [](char c) { return c >= ' ' && c <= '~'; })) << line.text;
      }
    }
  }
}

TEST(Top, ShowsRatesOfTheIntervalAndWhatIsCutOff) {
  const auto lines = top_screen(reading(10, 0, 1), reading(12, 100, 1), 80, 24);
  EXPECT_THAT(lines.front().text, StartsWith("kvernd 1.2.3, running, up 12 s; rates of the last 2 s"));
  EXPECT_THAT(lines, Contains(Field(&TopLine::text, StartsWith("tokens  found 50 % of 100/s"))));
  EXPECT_THAT(lines, Contains(Field(&TopLine::text, HasSubstr("CUT OFF"))));
}

TEST(Top, SaysHowManyRowsAreLeftOut) {
  const auto lines = top_screen(reading(10, 0, 200), reading(12, 100, 200), 80, 24);
  EXPECT_THAT(lines, SizeIs(24));
  EXPECT_THAT(lines, Contains(Field(&TopLine::text, HasSubstr("more"))));
}

TEST(Top, SaysThatTheDaemonWasRestarted) {
  EXPECT_THAT(top_screen(reading(100, 50, 1), reading(3, 9, 1), 80, 24).front().text, HasSubstr("RESTARTED"));
}

TEST(Figures, HaveFewDigitsAndTheirUnit) {
  EXPECT_EQ(short_bytes(0), "0 B");
  EXPECT_EQ(short_bytes(1536), "1.50 KiB");
  EXPECT_EQ(short_bytes(150.4 * (1 << 20)), "150 MiB");
  EXPECT_EQ(short_number(12'345), "12.3k");
  EXPECT_EQ(short_seconds(0.0000025), "2.50 us");
  EXPECT_EQ(short_seconds(0.0421), "42.1 ms");
  EXPECT_EQ(short_percent(0.6214), "62.1 %");
  EXPECT_EQ(short_duration(3 * 3600 + 12 * 60 + 5), "3 h 12 min");
}

}  // namespace
}  // namespace kvern
