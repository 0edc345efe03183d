#pragma once

#include <string>

#include "kvernctl/commands.h"
#include "kvernctl/scrape.h"

namespace kvern {

/// What the daemon says of itself at one moment.
struct Reading {
  std::string status_json;  ///< docs/protocol.md
  Scrape metrics;
};
Result<Reading> read_daemon(ToolSession& session);

/// Figures in few characters, with three digits at most before the point: "1.5 GiB", "12.3k", "1.20 ms".
std::string short_bytes(double bytes);
std::string short_number(double number);
std::string short_seconds(double seconds);
std::string short_percent(double share);
/// "3 h 12 min", "45 s".
std::string short_duration(double seconds);

}  // namespace kvern
