#pragma once

#include <iosfwd>
#include <span>
#include <string>
#include <vector>

#include "kvernctl/commands.h"
#include "kvernctl/scrape.h"

namespace kvern {

/// What to do about what the readings show, a sentence each; empty: nothing. change is the last since the first.
std::vector<std::string> advice(const Scrape& last, const Scrape& change);

/// One HTML page about what happened between the first and the last reading, with tables and charts in SVG. It needs
/// nothing from elsewhere, runs no script, and is light or dark as its reader has it. readings: two or more of one
/// daemon, the oldest first. A token that was loaded is counted as 1/prefill_tokens_per_second of time saved.
void write_report(std::span<const Scrape> readings, double prefill_tokens_per_second, std::ostream& out);

struct ReportOptions {
  std::vector<std::string> since;  ///< files with the text of /metrics, the oldest first; the daemon is read once more
  double for_seconds = 60;         ///< without files: reads the daemon for so long
  std::string output = "kvern-report.html";
  double prefill_tokens_per_second = 10'000;
};
int run_report(const DaemonAddress& address, const ReportOptions& options, std::ostream& out);

}  // namespace kvern
