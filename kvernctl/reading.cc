#include "kvernctl/reading.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>

namespace kvern {
namespace {

/// As many digits as fit into four characters.
std::string digits(double number) {
  char text[32];
  const double size = std::fabs(number);
  const int decimals = number == std::floor(number) && size < 1000 ? 0 : size < 10 ? 2 : size < 100 ? 1 : 0;
  std::snprintf(text, sizeof text, "%.*f", decimals, number);
  return text;
}

template <std::size_t N>
std::string scaled(double number, double step, const std::array<const char*, N>& units) {
  std::size_t unit = 0;
  while (unit + 1 < units.size() && std::fabs(number) >= step) {
    number /= step;
    ++unit;
  }
  return digits(number) + units[unit];
}

}  // namespace

Result<Reading> read_daemon(ToolSession& session) {
  wire::ControlRequest request;
  request.mutable_status()->set_with_metrics(true);
  wire::ControlReply reply;
  if (const Status asked = session.call(request, &reply); !asked) return failure(asked);
  auto metrics = Scrape::parse(reply.status_report().metrics());
  if (!metrics) {
    return failure(Code::kUnavailable, "the daemon gives no metrics yet, or is of another build than kvernctl");
  }
  return Reading{.status_json = reply.status_report().json(), .metrics = std::move(*metrics)};
}

std::string short_bytes(double bytes) {
  return scaled(bytes, 1024, std::array{" B", " KiB", " MiB", " GiB", " TiB", " PiB"});
}
std::string short_number(double number) { return scaled(number, 1000, std::array{"", "k", "M", "G", "T"}); }
std::string short_seconds(double seconds) {
  if (seconds == 0) return "0 s";
  if (std::fabs(seconds) >= 1) return digits(seconds) + " s";
  return scaled(seconds * 1e6, 1000, std::array{" us", " ms", " s"});
}
std::string short_percent(double share) { return digits(std::round(share * 1000) / 10) + " %"; }

std::string short_duration(double seconds) {
  const auto whole = static_cast<std::uint64_t>(std::max(0.0, seconds));
  const auto text = [](std::uint64_t number, const char* unit) { return std::to_string(number) + unit; };
  if (whole < 60) return text(whole, " s");
  if (whole < 3600) return text(whole / 60, " min ") + text(whole % 60, " s");
  if (whole < 86'400) return text(whole / 3600, " h ") + text(whole / 60 % 60, " min");
  return text(whole / 86'400, " d ") + text(whole / 3600 % 24, " h");
}

}  // namespace kvern
