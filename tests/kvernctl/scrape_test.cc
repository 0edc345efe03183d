#include "kvernctl/scrape.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace kvern {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

Scrape parse(const std::string& text) {
  auto scrape = Scrape::parse("# TYPE kvern_uptime_seconds gauge\n" + text);
  if (!scrape) throw std::runtime_error(scrape.error().message());
  return *scrape;
}

constexpr const char* kFirst = R"(kvern_uptime_seconds 100
# TYPE kvern_hit_tokens_total counter
kvern_hit_tokens_total{tier="dram"} 10
# TYPE kvern_form_bytes gauge
kvern_form_bytes{codec="int8",tier="dram"} 7
# TYPE kvern_fetch_seconds histogram
kvern_fetch_seconds_count 2
kvern_fetch_seconds_sum 3
kvern_fetch_seconds_bucket{le="1"} 1
kvern_fetch_seconds_bucket{le="2"} 2
kvern_fetch_seconds_bucket{le="+Inf"} 2
)";
constexpr const char* kSecond = R"(kvern_uptime_seconds 110
# TYPE kvern_hit_tokens_total counter
kvern_hit_tokens_total{tier="dram"} 15
kvern_hit_tokens_total{tier="nvme"} 4
# TYPE kvern_form_bytes gauge
kvern_form_bytes{codec="int8",tier="dram"} 5
kvern_form_bytes{codec="a \"b\"\\,}",tier="dram"} 3
# TYPE kvern_fetch_seconds histogram
kvern_fetch_seconds_count 6
kvern_fetch_seconds_sum 8
kvern_fetch_seconds_bucket{le="1"} 1
kvern_fetch_seconds_bucket{le="2"} 6
kvern_fetch_seconds_bucket{le="+Inf"} 6
)";

TEST(Scrape, SumsAndSplitsSeriesByTheirLabels) {
  const Scrape scrape = parse(kSecond);
  EXPECT_EQ(scrape.seconds(), 110);
  EXPECT_EQ(scrape.sum("kvern_hit_tokens_total"), 19);
  EXPECT_EQ(scrape.sum("kvern_hit_tokens_total", {{"tier", "nvme"}}), 4);
  EXPECT_EQ(scrape.sum("kvern_unknown"), 0);
  EXPECT_THAT(scrape.by("kvern_form_bytes", "codec"), ElementsAre(Pair("a \"b\"\\,}", 3), Pair("int8", 5)));
}

TEST(Scrape, BetweenTwoReadingsCountersGrowAndGaugesAre) {
  const Scrape change = parse(kSecond).since(parse(kFirst));
  EXPECT_EQ(change.seconds(), 10);
  EXPECT_FALSE(change.restarted());
  EXPECT_EQ(change.sum("kvern_hit_tokens_total", {{"tier", "dram"}}), 5);
  EXPECT_EQ(change.sum("kvern_hit_tokens_total", {{"tier", "nvme"}}), 4) << "a series that began in between";
  EXPECT_EQ(change.sum("kvern_form_bytes", {{"codec", "int8"}}), 5);
  EXPECT_EQ(change.sum("kvern_fetch_seconds_sum"), 5);
  EXPECT_THAT(change.buckets("kvern_fetch_seconds"), ElementsAre(Pair(1, 0), Pair(2, 4), Pair(HUGE_VAL, 4)));
  EXPECT_EQ(change.quantile(0.5, "kvern_fetch_seconds"), 1.5);
}

TEST(Scrape, AfterARestartWhatTheNewDaemonCountedIsTheChange) {
  const Scrape change = parse(kFirst).since(parse(kSecond));
  EXPECT_TRUE(change.restarted());
  EXPECT_EQ(change.seconds(), 100);
  EXPECT_EQ(change.sum("kvern_hit_tokens_total"), 10);
}

TEST(Scrape, TextOfSomethingElseIsRefusedWithItsLine) {
  EXPECT_THAT(Scrape::parse("kvern_uptime_seconds 1\n<html>\n").error().message(), HasSubstr("line 2"));
  EXPECT_THAT(Scrape::parse("kvern_uptime_seconds one\n").error().message(), HasSubstr("line 1"));
  EXPECT_THAT(Scrape::parse("x{y=\"z} 1\n").error().message(), HasSubstr("line 1"));
  EXPECT_THAT(Scrape::parse("node_uptime 1\n").error().message(), HasSubstr("kvern_uptime_seconds"));
}

TEST(Scrape, AnEmptyHistogramHasNoQuantile) {
  EXPECT_EQ(parse("kvern_uptime_seconds 1\n").quantile(0.5, "kvern_fetch_seconds"), 0);
}

}  // namespace
}  // namespace kvern
