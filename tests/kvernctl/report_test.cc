#include "kvernctl/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace kvern {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

Scrape scrape(double uptime, const std::string& samples) {
  auto parsed = Scrape::parse("kvern_uptime_seconds " + std::to_string(uptime) +
                              "\n# TYPE kvern_requested_tokens_total counter\n# TYPE kvern_hit_tokens_total counter\n"
                              "# TYPE kvern_evicted_chunks_total counter\n# TYPE kvern_refused_total counter\n"
                              "# TYPE kvern_unsaved_chunks_total counter\n# TYPE kvern_saved_chunks_total counter\n" +
                              samples);
  if (!parsed) throw std::runtime_error(parsed.error().message());
  return *parsed;
}

std::vector<std::string> advice_of(const std::string& samples) {
  const Scrape last = scrape(20, samples);
  return advice(last, last.since(scrape(10, "")));
}

constexpr const char* kHealthy = "kvern_requested_tokens_total 100\nkvern_hit_tokens_total{tier=\"dram\"} 60\n";

TEST(Report, AdvisesNothingWhereNothingStandsOut) { EXPECT_THAT(advice_of(kHealthy), IsEmpty()); }

TEST(Report, AdvisesOnWhatTheFiguresShow) {
  EXPECT_THAT(advice_of(""), ElementsAre(HasSubstr("No engine asked")));
  EXPECT_THAT(advice_of("kvern_requested_tokens_total 100\n"), ElementsAre(HasSubstr("kvernctl explain")));
  const std::string full = std::string(kHealthy) +
                           "kvern_tier_capacity_bytes{tier=\"dram\"} 100\nkvern_tier_used_bytes{tier=\"dram\"} 99\n"
                           "kvern_evicted_chunks_total{tier=\"dram\"} 7\n";
  EXPECT_THAT(advice_of(full + "kvern_form_bytes{codec=\"raw\"} 90\n"), ElementsAre(HasSubstr("balanced")));
  EXPECT_THAT(advice_of(full + "kvern_form_bytes{codec=\"int8\"} 90\n"), ElementsAre(Not(HasSubstr("balanced"))));
  EXPECT_THAT(advice_of(std::string(kHealthy) + "kvern_tier_breaker_state{tier=\"s3\"} 2\n"),
              ElementsAre(HasSubstr("The tier s3 failed")));
  EXPECT_THAT(advice_of(std::string(kHealthy) +
                        "kvern_unsaved_chunks_total{tier=\"nvme\"} 5\nkvern_saved_chunks_total{tier=\"nvme\"} 5\n"),
              ElementsAre(HasSubstr("50 % of the chunks")));
  EXPECT_THAT(advice_of(std::string(kHealthy) + "kvern_refused_total{reason=\"staging_full\"} 1\n"),
              ElementsAre(HasSubstr("staging_bytes_max")));
}

TEST(Report, ARestartInThePeriodIsToldAndNoFigureIsNegative) {
  const std::vector<Scrape> readings = {scrape(100, "kvern_requested_tokens_total 500\n"), scrape(5, kHealthy)};
  std::ostringstream page;
  write_report(readings, 1000, page);
  EXPECT_THAT(page.str(), HasSubstr("started anew"));
  EXPECT_THAT(page.str(), HasSubstr("60 %"));
  EXPECT_THAT(page.str(), Not(HasSubstr("-400")));
}

TEST(Report, NamesInTheMetricsCannotBecomeMarkup) {
  const std::vector<Scrape> readings = {
      scrape(1, ""), scrape(9, std::string(kHealthy) + "kvern_form_bytes{codec=\"<script>alert(1)</script>\"} 4\n")};
  std::ostringstream page;
  write_report(readings, 1000, page);
  EXPECT_THAT(page.str(), Not(HasSubstr("<script")));
  EXPECT_THAT(page.str(), HasSubstr("&lt;script&gt;"));
}

}  // namespace
}  // namespace kvern
