#include "kvernctl/report.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <ostream>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "kvernctl/reading.h"

namespace kvern {
namespace {

// A chart of sixty points is smooth. Engines report once a second: readings that lie closer would show teeth.
constexpr double kReadings = 60;
constexpr double kShortestSeconds = 2;
// Above these a figure is worth a sentence.
constexpr double kFull = 0.95;
constexpr double kManyGivenUp = 0.1;
constexpr double kManyFailed = 0.01;
constexpr double kFewFound = 0.05;

constexpr const char* kStyle = R"(
:root { color-scheme: light dark; --text: #1c2430; --dim: #5b6675; --back: #ffffff; --card: #f3f5f8; --line: #d5dae1;
  --one: #2b6cb0; --two: #c05f10; --three: #4a8a33; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaf0; --dim: #9aa6b5; --back: #12161c; --card: #1c222b;
  --line: #333c48; --one: #6cabe8; --two: #eda35c; --three: #8cc473; --bad: #f2877f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 3rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } .dim { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; } .tile span { color: var(--dim); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--dim); } th:first-child, td:first-child { text-align: left; }
ul { margin: .3rem 0; padding-left: 1.2rem; } .scroll { overflow-x: auto; }
svg { width: 100%; height: auto; display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
svg .dim { fill: var(--dim); } svg .axis { stroke: var(--line); }
.one { fill: var(--one); } .two { fill: var(--two); } .three { fill: var(--three); }
.line { fill: none; stroke-width: 2; } .line.one { stroke: var(--one); fill: none; }
.line.two { stroke: var(--two); fill: none; }
)";

std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

double at(const std::map<std::string, double>& values, const std::string& key) {
  const auto found = values.find(key);
  return found == values.end() ? 0 : found->second;
}

double share(double part, double whole) { return whole > 0 ? part / whole : 0; }

/// The labels of what is there, as a set of rows.
std::set<std::string> keys_of(std::initializer_list<std::map<std::string, double>> all) {
  std::set<std::string> keys;
  for (const auto& values : all) {
    for (const auto& [key, value] : values) {
      if (value > 0) keys.insert(key);
    }
  }
  return keys;
}

class Page {
 public:
  explicit Page(std::ostream& out) : out_(out) {}

  void section(const std::string& title) { out_ << "<h2>" << escaped(title) << "</h2>\n"; }
  void note(const std::string& text) { out_ << "<p class=\"dim\">" << escaped(text) << "</p>\n"; }
  void tile(const std::string& figure, const std::string& about) {
    out_ << "<div class=\"tile\"><b>" << escaped(figure) << "</b><span>" << escaped(about) << "</span></div>\n";
  }
  void table(const std::vector<std::string>& titles, const std::vector<std::vector<std::string>>& rows) {
    out_ << "<div class=\"scroll\"><table><thead><tr>";
    for (const auto& title : titles) out_ << "<th scope=\"col\">" << escaped(title) << "</th>";
    out_ << "</tr></thead><tbody>\n";
    for (const auto& row : rows) {
      out_ << "<tr>";
      for (const auto& cell : row) out_ << "<td>" << escaped(cell) << "</td>";
      out_ << "</tr>\n";
    }
    out_ << "</tbody></table></div>\n";
  }

  struct Bar {
    std::string label;
    double value;
    std::string text;
  };
  /// Bars that lie, one below the other.
  void bars(const std::string& about, const std::vector<Bar>& bars) {
    constexpr int kRow = 24;
    constexpr double kLabel = 210;
    constexpr double kLength = 520;
    double largest = 0;
    for (const Bar& bar : bars) largest = std::max(largest, bar.value);
    begin_chart(about, 900, kRow * static_cast<int>(bars.size()) + 4);
    for (std::size_t i = 0; i < bars.size(); ++i) {
      const int y = kRow * static_cast<int>(i);
      const double length = kLength * share(bars[i].value, largest);
      out_ << "<text x=\"" << kLabel - 10 << "\" y=\"" << y + 16 << "\" text-anchor=\"end\">" << escaped(bars[i].label)
           << "</text><rect class=\"one\" x=\"" << kLabel << "\" y=\"" << y + 3 << "\" width=\"" << number(length)
           << "\" height=\"17\" rx=\"2\"/><text class=\"dim\" x=\"" << number(kLabel + length + 8) << "\" y=\""
           << y + 16 << "\">" << escaped(bars[i].text) << "</text>\n";
    }
    out_ << "</svg>\n";
  }

  /// Two lines over time. points: (seconds, first, second).
  void lines(const std::string& about, const std::array<std::string, 2>& names,
             const std::vector<std::array<double, 3>>& points) {
    constexpr double kLeft = 60;
    constexpr double kWide = 820;
    constexpr double kHigh = 180;
    constexpr double kTop = 30;
    double largest = 0;
    for (const auto& point : points) largest = std::max({largest, point[1], point[2]});
    const double until = points.back()[0];
    begin_chart(about, 900, 250);
    const std::array<const char*, 2> classes = {"one", "two"};
    for (std::size_t line = 0; line < 2; ++line) {
      const double x = kLeft + 220 * static_cast<double>(line);
      out_ << "<rect class=\"" << classes[line] << "\" x=\"" << x << "\" y=\"6\" width=\"12\" height=\"12\"/><text x=\""
           << x + 18 << "\" y=\"16\">" << escaped(names[line]) << "</text>\n";
    }
    for (const double part : {0.0, 0.5, 1.0}) {
      const double y = kTop + kHigh * (1 - part);
      out_ << "<line class=\"axis\" x1=\"" << kLeft << "\" x2=\"" << kLeft + kWide << "\" y1=\"" << y << "\" y2=\"" << y
           << "\"/><text class=\"dim\" x=\"" << kLeft - 8 << "\" y=\"" << y + 4 << "\" text-anchor=\"end\">"
           << short_number(largest * part) << "</text>\n";
    }
    out_ << "<text class=\"dim\" x=\"" << kLeft << "\" y=\"" << kTop + kHigh + 20
         << "\">0 s</text><text class=\"dim\" x=\"" << kLeft + kWide << "\" y=\"" << kTop + kHigh + 20
         << "\" text-anchor=\"end\">" << short_duration(until) << "</text>\n";
    for (std::size_t line = 0; line < 2; ++line) {
      out_ << "<polyline class=\"line " << classes[line] << "\" points=\"";
      for (const auto& point : points) {
        out_ << number(kLeft + kWide * share(point[0], until)) << ","
             << number(kTop + kHigh * (1 - share(point[line + 1], largest))) << " ";
      }
      out_ << "\"/>\n";
    }
    out_ << "</svg>\n";
  }

 private:
  void begin_chart(const std::string& about, int width, int height) {
    out_ << "<svg role=\"img\" aria-label=\"" << escaped(about) << "\" viewBox=\"0 0 " << width << " " << height
         << "\">\n";
  }
  std::ostream& out_;
};

void write_tiles(Page& page, std::ostream& out, const Scrape& last, const Scrape& change, double prefill) {
  const double asked = change.sum("kvern_requested_tokens_total");
  const double found = change.sum("kvern_hit_tokens_total");
  const double loaded = change.sum("kvern_loaded_tokens_total");
  const double spent = change.sum("kvern_decode_seconds_sum");
  const double raw = last.sum("kvern_tier_raw_bytes");
  const double encoded = last.sum("kvern_tier_encoded_bytes");
  out << "<div class=\"tiles\">\n";
  page.tile(asked > 0 ? short_percent(found / asked) : "-", "of " + short_number(asked) + " prompt tokens were found");
  page.tile(short_number(loaded), "tokens were loaded and not computed again");
  page.tile(short_seconds(loaded / prefill - spent),
            "of computing saved, less " + short_seconds(spent) + " of loading");
  page.tile(raw > 0 ? short_percent(1 - encoded / raw) : "-",
            "of DRAM saved by compression: " + short_bytes(raw) + " lie in " + short_bytes(encoded));
  out << "</div>\n";
}

void write_time(Page& page, std::span<const Scrape> readings) {
  if (readings.size() < 3) return;
  std::vector<std::array<double, 3>> points;
  double seconds = 0;
  for (std::size_t i = 1; i < readings.size(); ++i) {
    const Scrape step = readings[i].since(readings[i - 1]);
    if (step.seconds() <= 0) continue;
    seconds += step.seconds();
    points.push_back({seconds, step.sum("kvern_requested_tokens_total") / step.seconds(),
                      step.sum("kvern_hit_tokens_total") / step.seconds()});
  }
  if (points.size() < 2) return;
  page.section("Prompt tokens a second");
  page.lines("Prompt tokens asked for and found, over time", {"asked for", "found"}, points);
}

void write_forms(Page& page, const Scrape& last, const Scrape& change) {
  page.section("Bytes by quality step");
  const auto bytes = last.by("kvern_form_bytes", "codec");
  const auto chunks = last.by("kvern_form_chunks", "codec");
  const auto raw = change.by("kvern_stored_raw_bytes_total", "codec");
  const auto encoded = change.by("kvern_stored_encoded_bytes_total", "codec");
  const auto steps = change.by("kvern_demotions_total", "codec");
  std::vector<Page::Bar> bars;
  std::vector<std::vector<std::string>> rows;
  for (const auto& codec : keys_of({bytes, raw, steps})) {
    if (at(bytes, codec) > 0) bars.push_back({codec, at(bytes, codec), short_bytes(at(bytes, codec))});
    rows.push_back({codec, short_number(at(chunks, codec)), short_bytes(at(bytes, codec)), short_bytes(at(raw, codec)),
                    short_bytes(at(encoded, codec)),
                    at(encoded, codec) > 0 ? short_number(at(raw, codec) / at(encoded, codec)) : "-",
                    short_number(at(steps, codec))});
  }
  if (rows.empty()) return page.note("Nothing was stored.");
  std::ranges::stable_sort(bars, std::greater<>(), &Page::Bar::value);
  if (!bars.empty()) page.bars("Bytes of the DRAM tier by codec, at the end", bars);
  page.table({"Codec", "Chunks at the end", "Bytes", "Stored, before", "Stored, after", "Ratio", "Steps down to it"},
             rows);
}

void write_errors(Page& page, const Scrape& change) {
  page.section("Distribution of errors");
  page.note("Relative error of the attention output over the forms that steps down the ladder made.");
  std::vector<std::vector<std::string>> rows;
  for (const auto& entry : change.by("kvern_demotion_error_count", "codec")) {
    const auto& codec = entry.first;
    const auto& count = entry.second;
    if (count <= 0) continue;
    const auto at_most = [&](double q) {
      char text[32];
      std::snprintf(text, sizeof text, "%.3f", change.quantile(q, "kvern_demotion_error", {{"codec", codec}}));
      return std::string(text);
    };
    rows.push_back({codec, short_number(count), at_most(0.5), at_most(0.9), at_most(0.99)});
  }
  if (rows.empty()) return page.note("No chunk stepped down.");
  std::vector<Page::Bar> bars;
  double below = 0;
  double lower = 0;
  for (const auto& [bound, count] : change.buckets("kvern_demotion_error")) {
    char label[48];
    std::snprintf(label, sizeof label, std::isfinite(bound) ? "%g to %g" : "above %g", lower, bound);
    if (count > below) bars.push_back({label, count - below, short_number(count - below) + " steps"});
    below = count;
    lower = bound;
  }
  page.bars("Steps by their error", bars);
  page.table({"Form", "Steps", "Half below", "90 % below", "99 % below"}, rows);
}

void write_tiers(Page& page, const Scrape& last, const Scrape& change) {
  page.section("Tiers");
  const auto used = last.by("kvern_tier_used_bytes", "tier");
  std::vector<std::vector<std::string>> rows;
  for (const auto& [tier, bytes] : used) {
    const Scrape::Labels of = {{"tier", tier}};
    const double capacity = last.sum("kvern_tier_capacity_bytes", of);
    const bool dram = tier == "dram";
    const double in = dram ? change.sum("kvern_stored_encoded_bytes_total")
                           : change.sum("kvern_tier_bytes_total", {{"tier", tier}, {"operation", "write"}});
    const double out = dram ? change.sum("kvern_loaded_encoded_bytes_total")
                            : change.sum("kvern_tier_bytes_total", {{"tier", tier}, {"operation", "read"}});
    rows.push_back({tier, short_bytes(bytes), capacity > 0 ? short_percent(bytes / capacity) : "-",
                    short_number(last.sum("kvern_tier_chunks", of)), short_bytes(in), short_bytes(out),
                    short_number(change.sum("kvern_evicted_chunks_total", of)),
                    short_number(change.sum("kvern_promoted_chunks_total", of)),
                    short_number(change.sum("kvern_unsaved_chunks_total", of))});
  }
  page.table({"Tier", "Used", "Full", "Chunks", "Written", "Read", "Evicted", "Came up", "Given up"}, rows);
}

void write_reasons(Page& page, const Scrape& change) {
  page.section("What was not served, and not taken");
  std::vector<std::vector<std::string>> rows;
  for (const auto& [what, metric, label] :
       {std::tuple("prompt tokens not served", "kvern_miss_tokens_total", "reason"),
        std::tuple("chunks not taken", "kvern_refused_total", "reason"),
        std::tuple("steps down not made", "kvern_demotions_refused_total", "reason"),
        std::tuple("messages no client should send", "kvern_protocol_errors_total", "kind"),
        std::tuple("sessions ended", "kvern_sessions_ended_total", "reason")}) {
    for (const auto& [reason, count] : change.by(metric, label)) {
      if (count > 0) rows.push_back({what, reason, short_number(count)});
    }
  }
  if (const double failed = change.sum("kvern_failed_loads_total"); failed > 0) {
    rows.push_back({"loads failed", "", short_number(failed)});
  }
  if (rows.empty()) return page.note("Nothing.");
  page.table({"What", "Why", "How many"}, rows);
}

void write_operations(Page& page, const Scrape& change) {
  page.section("How long it took");
  std::vector<std::vector<std::string>> rows;
  const auto add = [&](const std::string& what, const std::string& metric, const Scrape::Labels& of) {
    const double count = change.sum(metric + "_count", of);
    if (count <= 0) return;
    rows.push_back({what, short_number(count), short_seconds(change.quantile(0.5, metric, of)),
                    short_seconds(change.quantile(0.99, metric, of)), short_seconds(change.sum(metric + "_sum", of))});
  };
  add("match, at the engine", "kvern_match_seconds", {});
  add("reserve", "kvern_reserve_seconds", {});
  add("commit, with encoding", "kvern_commit_seconds", {});
  add("fetch", "kvern_fetch_seconds", {});
  for (const auto& [codec, count] : change.by("kvern_encode_seconds_count", "codec")) {
    add("encode " + codec, "kvern_encode_seconds", {{"codec", codec}});
  }
  add("load, at the engine", "kvern_decode_seconds", {});
  add("step down a ladder", "kvern_demotion_seconds", {});
  for (const auto& [tier, count] : change.by("kvern_tier_operation_seconds_count", "tier")) {
    for (const std::string kind : {"find", "read", "write"}) {
      add(tier + " " + kind, "kvern_tier_operation_seconds", {{"tier", tier}, {"operation", kind}});
    }
  }
  if (rows.empty()) return page.note("Nothing was asked.");
  page.table({"Operation", "How many", "Half below", "99 % below", "Together"}, rows);
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M UTC", &parts);
  return text;
}

Result<Scrape> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return failure(Code::kNotFound, path + " cannot be read");
  auto scrape = Scrape::parse(text.str());
  if (!scrape) return failure(scrape.error().code(), path + ": " + scrape.error().message());
  return scrape;
}

/// The readings that the report is made of.
Result<std::vector<Scrape>> collect(const DaemonAddress& address, const ReportOptions& options) {
  std::vector<Scrape> readings;
  for (const auto& path : options.since) {
    auto scrape = read_file(path);
    if (!scrape) return failure(scrape.error());
    readings.push_back(std::move(*scrape));
  }
  auto session = ToolSession::open(address);
  if (!session) return failure(session.error());
  const auto deadline = Clock::system().now_ns() + static_cast<std::int64_t>(options.for_seconds * 1e9);
  const double step = std::max(kShortestSeconds, options.for_seconds / kReadings);
  while (true) {
    auto reading = read_daemon(*session);
    if (!reading) return failure(reading.error());
    readings.push_back(std::move(reading->metrics));
    if (!options.since.empty()) return readings;
    const double left = static_cast<double>(deadline - Clock::system().now_ns()) * 1e-9;
    if (left <= 0 && readings.size() >= 2) return readings;
    std::this_thread::sleep_for(std::chrono::duration<double>(left > 0 ? std::min(step, left) : 1.0));
  }
}

}  // namespace

std::vector<std::string> advice(const Scrape& last, const Scrape& change) {
  std::vector<std::string> result;
  const double asked = change.sum("kvern_requested_tokens_total");
  const double found = change.sum("kvern_hit_tokens_total");
  const double capacity = last.sum("kvern_tier_capacity_bytes", {{"tier", "dram"}});
  const double used = last.sum("kvern_tier_used_bytes", {{"tier", "dram"}});
  const double evicted = change.sum("kvern_evicted_chunks_total", {{"tier", "dram"}});
  const bool full = capacity > 0 && used / capacity >= kFull && evicted > 0;
  if (change.restarted()) {
    result.emplace_back("The daemon was started anew in this period: the figures are those since then.");
  }
  if (asked == 0) {
    result.emplace_back(
        "No engine asked for anything: is one connected (kvernctl status), and does its log have lines that begin with "
        "kvern?");
  } else if (found / asked < kFewFound && !full) {
    result.emplace_back(
        "Almost nothing was found although there is room: either prompts share no beginnings, or engines do not share "
        "a namespace. Take a block hash of a prompt that was sent twice to kvernctl explain.");
  }
  if (full) {
    const auto forms = last.by("kvern_form_bytes", "codec");
    const bool has_lower = last.by("kvern_tier_used_bytes", "tier").size() > 1;
    const bool raw = share(at(forms, "raw"), last.sum("kvern_form_bytes")) > 0.5;
    result.push_back(
        "The DRAM tier is full and " + short_number(evicted) + " chunks had to leave. " +
        (raw ? "They are stored raw: ladder.default = \"balanced\" makes room for about twice as many. " : "") +
        "A larger store.dram_bytes " + std::string(has_lower ? "" : "or an NVMe tier ") +
        "keeps more there; kvernctl plan says what pays.");
  }
  for (const auto& [tier, state] : last.by("kvern_tier_breaker_state", "tier")) {
    if (state > 0)
      result.push_back("The tier " + tier + " failed so often that it is cut off: see its server or device.");
  }
  for (const auto& [tier, given_up] : change.by("kvern_unsaved_chunks_total", "tier")) {
    const double saved = change.sum("kvern_saved_chunks_total", {{"tier", tier}});
    if (share(given_up, given_up + saved) > kManyGivenUp) {
      result.push_back("The tier " + tier +
                       " is slower than what engines store: " + short_percent(given_up / (given_up + saved)) +
                       " of the chunks for it were given up. A larger write_queue_bytes bridges bursts; write = "
                       "\"back\" writes only what leaves DRAM.");
    }
  }
  const auto refused = change.by("kvern_refused_total", "reason");
  if (at(refused, "staging_full") > 0) {
    result.emplace_back("Staging memory was full: raise sessions.staging_bytes_max and the connector's staging_bytes.");
  }
  if (at(refused, "queue_full") > 0) {
    result.emplace_back("Encoding did not keep up: raise pipeline.encode_threads, or choose a faster codec.");
  }
  for (const char* reason : {"codec", "invalid", "too_large"}) {
    if (at(refused, reason) > 0) {
      result.push_back("Chunks were refused for what they are (" + std::string(reason) +
                       "): see KvernStoresRefused in docs/operations.md.");
    }
  }
  const double failed = change.sum("kvern_failed_loads_total");
  const double loads = change.sum("kvern_decode_seconds_count");
  if (share(failed, failed + loads) > kManyFailed) {
    result.push_back(short_percent(failed / (failed + loads)) +
                     " of the loads failed: see KvernLoadsFailing in docs/operations.md.");
  }
  if (change.sum("kvern_quarantined_chunks_total") > 0) {
    result.emplace_back(
        "Chunks in memory were damaged and not served: see KvernMemoryCorruption in docs/operations.md.");
  }
  return result;
}

void write_report(std::span<const Scrape> readings, double prefill_tokens_per_second, std::ostream& out) {
  const Scrape& last = readings.back();
  const Scrape change = last.since(readings.front());
  const auto versions = last.by("kvern_build_info", "version");
  out << "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
         "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
         "<meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n"
         "<title>What Kvern did</title>\n<style>"
      << kStyle << "</style>\n</head>\n<body>\n<h1>What Kvern did</h1>\n";
  Page page(out);
  page.note(short_duration(change.seconds()) + " until " + utc_now() + "; kvernd " +
            (versions.empty() ? std::string("of an unknown version") : versions.begin()->first) + ", up " +
            short_duration(last.sum("kvern_uptime_seconds")));
  write_tiles(page, out, last, change, prefill_tokens_per_second);
  page.note("Time saved takes it that the engine computes " + short_number(prefill_tokens_per_second) +
            " prompt tokens a second (--prefill).");
  page.section("Advice");
  const auto sentences = advice(last, change);
  if (sentences.empty()) {
    page.note("None: nothing stands out.");
  } else {
    out << "<ul>\n";
    for (const auto& sentence : sentences) out << "<li>" << escaped(sentence) << "</li>\n";
    out << "</ul>\n";
  }
  write_time(page, readings);
  write_forms(page, last, change);
  write_errors(page, change);
  write_tiers(page, last, change);
  write_reasons(page, change);
  write_operations(page, change);
  out << "</body>\n</html>\n";
}

int run_report(const DaemonAddress& address, const ReportOptions& options, std::ostream& out) {
  std::error_code ignored;
  const bool was_there = std::filesystem::exists(options.output, ignored);
  std::ofstream file(options.output, std::ios::app);  // before the period, and without touching what is there
  if (!file) {
    out << options.output << " cannot be written (" << std::strerror(errno) << "): name another file with --output\n";
    return 2;
  }
  file.close();
  const auto readings = collect(address, options);
  if (!readings) {
    if (!was_there) std::filesystem::remove(options.output, ignored);
    out << readings.error().to_string() << "\n";
    return 2;
  }
  file.open(options.output);
  write_report(*readings, options.prefill_tokens_per_second, file);
  file.close();
  if (!file) {
    out << options.output << " cannot be written\n";
    return 2;
  }
  out << options.output << ": " << readings->size() << " readings over "
      << short_duration(readings->back().since(readings->front()).seconds()) << "\n";
  return 0;
}

}  // namespace kvern
