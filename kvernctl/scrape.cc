#include "kvernctl/scrape.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>

namespace kvern {
namespace {

constexpr std::string_view kUptime = "kvern_uptime_seconds";

/// "1.5", "+Inf", "NaN"; nullopt for anything else.
std::optional<double> parse_value(std::string_view text) {
  const std::string copy(text);
  char* end = nullptr;
  const double value = std::strtod(copy.c_str(), &end);
  if (copy.empty() || end != copy.c_str() + copy.size()) return std::nullopt;
  return value;
}

/// name{label="value",…}: false when it is none.
bool parse_labels(std::string_view text, Scrape::Labels* labels) {
  while (!text.empty()) {
    const auto equals = text.find("=\"");
    if (equals == std::string_view::npos || equals == 0) return false;
    const std::string name(text.substr(0, equals));
    text.remove_prefix(equals + 2);
    std::string value;
    while (true) {
      if (text.empty()) return false;
      const char c = text.front();
      text.remove_prefix(1);
      if (c == '"') break;
      if (c != '\\') {
        value += c;
        continue;
      }
      if (text.empty()) return false;
      value += text.front() == 'n' ? '\n' : text.front();
      text.remove_prefix(1);
    }
    (*labels)[name] = value;
    if (!text.empty()) {
      if (text.front() != ',') return false;
      text.remove_prefix(1);
    }
  }
  return true;
}

/// The family of a histogram's or summary's series.
std::string_view family_of(std::string_view name) {
  for (const std::string_view suffix : {"_bucket", "_sum", "_count"}) {
    if (name.ends_with(suffix)) return name.substr(0, name.size() - suffix.size());
  }
  return name;
}

bool fits(const Scrape::Labels& labels, const Scrape::Labels& where) {
  return std::ranges::all_of(where, [&](const auto& wanted) {
    const auto found = labels.find(wanted.first);
    return found != labels.end() && found->second == wanted.second;
  });
}

}  // namespace

Result<Scrape> Scrape::parse(std::string_view text) {
  Scrape scrape;
  std::map<std::string, std::string, std::less<>> types;
  std::size_t number = 0;
  while (!text.empty()) {
    ++number;
    const auto end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.starts_with("# TYPE ")) {
      line.remove_prefix(7);
      const auto space = line.find(' ');
      if (space != std::string_view::npos) types.emplace(line.substr(0, space), line.substr(space + 1));
      continue;
    }
    if (line.empty() || line.front() == '#') continue;
    const auto wrong = [&] {
      return failure(Code::kInvalid, "line " + std::to_string(number) + " is no sample of a metric");
    };
    const auto name_end = line.find_first_of("{ ");
    if (name_end == std::string_view::npos || name_end == 0) return wrong();
    Series series{.name = std::string(line.substr(0, name_end)), .labels = {}, .is_counter = false, .value = 0};
    line.remove_prefix(name_end);
    if (line.front() == '{') {
      const auto close = line.rfind("} ");
      if (close == std::string_view::npos) return wrong();
      if (!parse_labels(line.substr(1, close - 1), &series.labels)) return wrong();
      line.remove_prefix(close + 1);
    }
    line.remove_prefix(1);
    const auto value = parse_value(line.substr(0, line.find(' ')));
    if (!value) return wrong();
    series.value = *value;
    const auto own = types.find(series.name);
    const auto family = types.find(family_of(series.name));
    series.is_counter =
        (own != types.end() && own->second == "counter") || (family != types.end() && family->second == "histogram");
    scrape.series_.push_back(std::move(series));
  }
  if (scrape.by(kUptime, "").empty()) {
    return failure(Code::kInvalid, "there is no " + std::string(kUptime) + " in it: is it of kvernd's /metrics?");
  }
  scrape.seconds_ = scrape.sum(kUptime);
  return scrape;
}

Scrape Scrape::since(const Scrape& earlier) const {
  Scrape result = *this;
  result.restarted_ = sum(kUptime) < earlier.sum(kUptime);
  if (result.restarted_) return result;
  result.seconds_ = sum(kUptime) - earlier.sum(kUptime);
  std::map<std::pair<std::string, Labels>, double> before;
  for (const Series& series : earlier.series_) before[{series.name, series.labels}] = series.value;
  for (Series& series : result.series_) {
    if (!series.is_counter) continue;
    if (const auto found = before.find({series.name, series.labels}); found != before.end()) {
      series.value -= found->second;
    }
  }
  return result;
}

double Scrape::sum(std::string_view name, const Labels& where) const {
  double total = 0;
  for (const Series& series : series_) {
    if (series.name == name && fits(series.labels, where)) total += series.value;
  }
  return total;
}

std::map<std::string, double> Scrape::by(std::string_view name, std::string_view label, const Labels& where) const {
  std::map<std::string, double> result;
  for (const Series& series : series_) {
    if (series.name != name || !fits(series.labels, where)) continue;
    const auto found = series.labels.find(label);
    result[found == series.labels.end() ? "" : found->second] += series.value;
  }
  return result;
}

std::vector<std::pair<double, double>> Scrape::buckets(const std::string& name, const Labels& where) const {
  std::map<double, double> sums;
  for (const auto& [bound, count] : by(name + "_bucket", "le", where)) {
    sums[parse_value(bound).value_or(std::numeric_limits<double>::infinity())] += count;
  }
  return {sums.begin(), sums.end()};
}

double Scrape::quantile(double q, const std::string& name, const Labels& where) const {
  const auto all = buckets(name, where);
  if (all.empty() || all.back().second <= 0) return 0;
  const double rank = q * all.back().second;
  double lower = 0;
  double below = 0;
  for (const auto& [bound, count] : all) {
    if (count >= rank && count > below) {
      if (!std::isfinite(bound)) return lower;
      return lower + (bound - lower) * (rank - below) / (count - below);
    }
    lower = std::isfinite(bound) ? bound : lower;
    below = count;
  }
  return lower;
}

}  // namespace kvern
