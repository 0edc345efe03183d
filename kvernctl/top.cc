#include "kvernctl/top.h"

#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <set>
#include <thread>

#include "base/clock.h"

namespace kvern {
namespace {

using nlohmann::json;

constexpr std::size_t kWidth = 80;
constexpr std::size_t kHeight = 24;

/// A table of a title and rows, of which some may have to be left out.
struct Table {
  std::string title;
  std::vector<std::string> rows;
};

struct Column {
  std::size_t width;
  bool left = false;
};

std::string printable(std::string text) {
  std::ranges::replace_if(
      text, [](char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

/// Cells in their columns, cut where they are too long.
template <std::size_t N>
std::string row(const std::array<Column, N>& columns, const std::array<std::string, N>& cells) {
  std::string line;
  for (std::size_t i = 0; i < N; ++i) {
    std::string cell = printable(cells[i]).substr(0, columns[i].width);
    const std::string space(columns[i].width - cell.size(), ' ');
    line += (i == 0 ? "" : " ") + (columns[i].left ? cell + space : space + cell);
  }
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

std::string text_of(const json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) return "-";
  return found->is_string() ? found->get<std::string>() : found->dump();
}

double at(const std::map<std::string, double>& values, const std::string& key) {
  const auto found = values.find(key);
  return found == values.end() ? 0 : found->second;
}

Table tier_table(const json& status, const Scrape& now, const Scrape& change) {
  constexpr std::array<Column, 8> kColumns = {Column{8, true}, Column{8}, Column{9}, Column{7},
                                              Column{7},       Column{9}, Column{9}, Column{16}};
  Table table{.title = row(kColumns, {"TIER", "USED", "OF", "FULL", "CHUNKS", "IN/S", "OUT/S", "STATE"}), .rows = {}};
  const double seconds = change.seconds();
  const auto used = now.by("kvern_tier_used_bytes", "tier");
  const auto add = [&](const std::string& tier, double in, double out, const std::string& state) {
    const double of = now.sum("kvern_tier_capacity_bytes", {{"tier", tier}});
    table.rows.push_back(row(kColumns, {tier, short_bytes(at(used, tier)), of > 0 ? short_bytes(of) : "-",
                                        of > 0 ? short_percent(at(used, tier) / of) : "-",
                                        short_number(now.sum("kvern_tier_chunks", {{"tier", tier}})),
                                        short_bytes(in / seconds), short_bytes(out / seconds), state}));
  };
  const double evicted = change.sum("kvern_evicted_chunks_total") / seconds;
  add("dram", change.sum("kvern_stored_encoded_bytes_total"), change.sum("kvern_loaded_encoded_bytes_total"),
      evicted > 0 ? "evicts " + short_number(evicted) + "/s" : "");
  for (const auto& tier : status.value("lower_tiers", json::array())) {
    const std::string name = text_of(tier, "name");
    const std::string breaker = text_of(tier, "breaker");
    const double queued = tier.value("queued_bytes", 0.0);
    add(name, change.sum("kvern_tier_bytes_total", {{"tier", name}, {"operation", "write"}}),
        change.sum("kvern_tier_bytes_total", {{"tier", name}, {"operation", "read"}}),
        breaker != "closed" ? "CUT OFF"
        : queued > 0        ? "queued " + short_bytes(queued)
                            : "");
  }
  return table;
}

Table form_table(const Scrape& now, const Scrape& change) {
  constexpr std::array<Column, 7> kColumns = {Column{28, true}, Column{7}, Column{9}, Column{7},
                                              Column{7},        Column{8}, Column{8}};
  Table table{.title = row(kColumns, {"CODEC", "CHUNKS", "BYTES", "SHARE", "RATIO", "STORED/S", "LOADED/S"}),
              .rows = {}};
  const double seconds = change.seconds();
  const auto chunks = now.by("kvern_form_chunks", "codec");
  const auto bytes = now.by("kvern_form_bytes", "codec");
  const auto raw = now.by("kvern_stored_raw_bytes_total", "codec");
  const auto encoded = now.by("kvern_stored_encoded_bytes_total", "codec");
  const auto stored = change.by("kvern_stored_raw_bytes_total", "codec");
  const auto loaded = change.by("kvern_loaded_raw_bytes_total", "codec");
  std::set<std::string> names;
  for (const auto& [name, value] : bytes) names.insert(name);
  for (const auto& [name, value] : raw) names.insert(name);
  std::vector<std::string> order(names.begin(), names.end());
  std::ranges::stable_sort(order, std::greater<>(), [&](const std::string& name) { return at(bytes, name); });
  const double total = now.sum("kvern_form_bytes");
  for (const auto& name : order) {
    const double ratio = at(encoded, name) > 0 ? at(raw, name) / at(encoded, name) : 0;
    table.rows.push_back(
        row(kColumns, {name, short_number(at(chunks, name)), short_bytes(at(bytes, name)),
                       total > 0 ? short_percent(at(bytes, name) / total) : "-", ratio > 0 ? short_number(ratio) : "-",
                       short_bytes(at(stored, name) / seconds), short_bytes(at(loaded, name) / seconds)}));
  }
  return table;
}

Table session_table(const json& status) {
  constexpr std::array<Column, 7> kColumns = {Column{5, true}, Column{9, true}, Column{5, true}, Column{29, true},
                                              Column{7},       Column{11},      Column{8}};
  Table table{.title = row(kColumns, {"ID", "SESSION", "PLANE", "CLIENT, TENANT", "LEASES", "STAGING", "SILENT"}),
              .rows = {}};
  std::vector<json> sessions;
  for (const auto& session : status.value("sessions", json::array())) {
    if (text_of(session, "role") != "tool") sessions.push_back(session);
  }
  std::ranges::stable_sort(sessions, std::greater<>(),
                           [](const json& session) { return session.value("staging_used_bytes", 0.0); });
  for (const auto& session : sessions) {
    table.rows.push_back(row(
        kColumns,
        {text_of(session, "id"), text_of(session, "role"), text_of(session, "data_plane"),
         text_of(session, "client_name") + ", " + text_of(session, "tenant"), text_of(session, "leases"),
         short_bytes(session.value("staging_used_bytes", 0.0)), short_seconds(session.value("silent_seconds", 0.0))}));
  }
  return table;
}

/// The slowest kinds of operations of the interval, by their 99th percentile.
Table operation_table(const Scrape& change) {
  constexpr std::array<Column, 5> kColumns = {Column{38, true}, Column{9}, Column{9}, Column{9}, Column{9}};
  Table table{.title = row(kColumns, {"SLOWEST OPERATIONS", "PER S", "P50", "P99", "BUSY"}), .rows = {}};
  struct Operation {
    std::string name;
    std::string metric;
    Scrape::Labels labels;
    double p99 = 0;
  };
  std::vector<Operation> operations = {{"match, at the engine", "kvern_match_seconds", {}},
                                       {"reserve", "kvern_reserve_seconds", {}},
                                       {"commit, encoding included", "kvern_commit_seconds", {}},
                                       {"fetch", "kvern_fetch_seconds", {}}};
  const auto of_codecs = [&](const char* what, const char* metric) {
    for (const auto& [codec, count] : change.by(std::string(metric) + "_count", "codec")) {
      operations.push_back({std::string(what) + " " + codec, metric, {{"codec", codec}}});
    }
  };
  of_codecs("encode", "kvern_encode_seconds");
  of_codecs("load, at the engine, of", "kvern_decode_seconds");
  of_codecs("step down to", "kvern_demotion_seconds");
  for (const auto& [tier, count] : change.by("kvern_tier_operation_seconds_count", "tier")) {
    for (const auto& [kind, number] : change.by("kvern_tier_operation_seconds_count", "operation", {{"tier", tier}})) {
      operations.push_back({tier + " " + kind, "kvern_tier_operation_seconds", {{"tier", tier}, {"operation", kind}}});
    }
  }
  const auto count = [&](const Operation& of) { return change.sum(of.metric + "_count", of.labels); };
  std::erase_if(operations, [&](const Operation& of) { return count(of) <= 0; });
  for (Operation& of : operations) of.p99 = change.quantile(0.99, of.metric, of.labels);
  std::ranges::stable_sort(operations, std::greater<>(), &Operation::p99);
  for (const Operation& of : operations) {
    table.rows.push_back(row(
        kColumns,
        {of.name, short_number(count(of) / change.seconds()), short_seconds(change.quantile(0.5, of.metric, of.labels)),
         short_seconds(of.p99), short_percent(change.sum(of.metric + "_sum", of.labels) / change.seconds())}));
  }
  return table;
}

std::vector<std::string> head(const json& status, const Scrape& now, const Scrape& change) {
  const double seconds = change.seconds();
  const auto per_second = [&](const char* name) { return change.sum(name) / seconds; };
  const double asked = per_second("kvern_requested_tokens_total");
  const double found = per_second("kvern_hit_tokens_total");
  return {
      "kvernd " + text_of(status, "version") + ", " + text_of(status, "state") + ", up " +
          short_duration(status.value("uptime_seconds", 0.0)) + "; rates of the last " + short_seconds(seconds) +
          (change.restarted() ? "; RESTARTED" : ""),
      "tokens  found " + (asked > 0 ? short_percent(found / asked) : std::string("- ")) + " of " + short_number(asked) +
          "/s, loaded " + short_number(per_second("kvern_loaded_tokens_total")) + "/s, failed loads " +
          short_number(per_second("kvern_failed_loads_total")) + "/s",
      "bytes   stored " + short_bytes(per_second("kvern_stored_raw_bytes_total")) + "/s as " +
          short_bytes(per_second("kvern_stored_encoded_bytes_total")) + "/s, loaded " +
          short_bytes(per_second("kvern_loaded_raw_bytes_total")) + "/s, " +
          short_number(now.sum("kvern_encode_queue_length")) + " queued, refused " +
          short_number(per_second("kvern_refused_total")) + "/s",
  };
}

/// How many rows each table may have so that all fit, taken from the longest first.
std::vector<std::size_t> fit(const std::vector<Table>& tables, std::size_t rows) {
  std::vector<std::size_t> result;
  std::size_t total = 0;
  for (const Table& table : tables) {
    result.push_back(std::max<std::size_t>(1, table.rows.size()));
    total += result.back();
  }
  while (total > rows) {
    auto longest = std::ranges::max_element(result);
    if (*longest <= 1) break;
    --*longest;
    --total;
  }
  return result;
}

/// The terminal without echo and lines, and another screen; as it was when this goes.
class RawTerminal {
 public:
  explicit RawTerminal(std::ostream& out) : out_(out) {
    ::tcgetattr(STDIN_FILENO, &before_);
    termios raw = before_;
    raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
    ::tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    out_ << "\x1b[?1049h\x1b[?25l" << std::flush;
  }
  ~RawTerminal() {
    out_ << "\x1b[?25h\x1b[?1049l" << std::flush;
    ::tcsetattr(STDIN_FILENO, TCSANOW, &before_);
  }
  RawTerminal(const RawTerminal&) = delete;
  RawTerminal& operator=(const RawTerminal&) = delete;

 private:
  std::ostream& out_;
  termios before_{};
};

volatile sig_atomic_t stop_asked = 0;

/// Signals that end it do so by way of its destructors; a new size of the window wakes it.
void listen_to_signals() {
  struct sigaction stop {};
  stop.sa_handler = [](int) { stop_asked = 1; };
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(signal, &stop, nullptr);
  struct sigaction wake {};
  wake.sa_handler = [](int) {};
  ::sigaction(SIGWINCH, &wake, nullptr);
}

enum class Woken { kTime, kKey, kWindow, kEnd };
Woken wait_for_key(std::int64_t nanoseconds) {
  pollfd keys{.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
  const int ready = ::poll(&keys, 1, static_cast<int>(std::max<std::int64_t>(0, nanoseconds) / 1'000'000));
  if (stop_asked != 0) return Woken::kEnd;
  if (ready < 0) return errno == EINTR ? Woken::kWindow : Woken::kEnd;
  if (ready == 0) return Woken::kTime;
  char key = 0;
  const auto got = ::read(STDIN_FILENO, &key, 1);
  return got <= 0 || key == 'q' || key == 'Q' ? Woken::kEnd : Woken::kKey;
}

/// Readings of a daemon that may go and come back.
class Source {
 public:
  explicit Source(const DaemonAddress& address) : address_(address) {}
  Result<Reading> read() {
    if (!session_) {
      auto opened = ToolSession::open(address_);
      if (!opened) return failure(opened.error());
      session_.emplace(std::move(*opened));
    }
    auto reading = read_daemon(*session_);
    if (!reading) session_.reset();
    return reading;
  }

 private:
  const DaemonAddress& address_;
  std::optional<ToolSession> session_;
};

void draw(const std::vector<TopLine>& lines, std::ostream& out) {
  std::string frame = "\x1b[H";
  for (std::size_t i = 0; i < lines.size(); ++i) {
    frame += (lines[i].is_title ? "\x1b[7m" : "") + lines[i].text + "\x1b[0m\x1b[K";
    if (i + 1 < lines.size()) frame += "\r\n";
  }
  out << frame << "\x1b[J" << std::flush;
}

int run_live(const DaemonAddress& address, const TopOptions& options, std::ostream& out) {
  Source source(address);
  auto earlier = source.read();
  if (!earlier) {
    out << earlier.error().to_string() << "\n";
    return 2;
  }
  listen_to_signals();
  const RawTerminal terminal(out);
  Reading first = std::move(*earlier);
  Reading last = first;
  std::string problem;
  const auto interval = static_cast<std::int64_t>(options.interval_seconds * 1e9);
  std::int64_t next = Clock::system().now_ns() + std::min<std::int64_t>(interval, 500'000'000);
  while (true) {
    winsize size{};
    const bool known = ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row > 0 && size.ws_col > 0;
    auto lines = top_screen(first, last, known ? size.ws_col : kWidth, known ? size.ws_row : kHeight);
    if (!problem.empty() && !lines.empty()) lines.front() = {printable(problem).substr(0, size.ws_col), true};
    draw(lines, out);
    const Woken woken = wait_for_key(next - Clock::system().now_ns());
    if (woken == Woken::kEnd) return 0;
    if (woken != Woken::kTime) continue;
    next = Clock::system().now_ns() + interval;
    auto reading = source.read();
    problem = reading ? "" : "no answer, trying again: " + reading.error().message();
    if (!reading) continue;
    first = std::exchange(last, std::move(*reading));
  }
}

}  // namespace

std::vector<TopLine> top_screen(const Reading& earlier, const Reading& now, std::size_t width, std::size_t height) {
  const json status = json::parse(now.status_json, nullptr, false);
  const Scrape change = now.metrics.since(earlier.metrics);
  if (!status.is_object()) return {{"the daemon's status cannot be read: kvernctl and kvernd are of different builds"}};
  std::vector<TopLine> lines;
  if (change.seconds() <= 0) {
    lines.push_back({"kvernd " + text_of(status, "version") + ": waiting for a second reading"});
    return lines;
  }
  for (const auto& line : head(status, now.metrics, change)) lines.push_back({printable(line)});
  const std::vector<Table> tables = {tier_table(status, now.metrics, change), form_table(now.metrics, change),
                                     session_table(status), operation_table(change)};
  const std::size_t fixed = lines.size() + tables.size() * 2;  // a blank line and a title each
  const auto rows = fit(tables, height > fixed ? height - fixed : 0);
  for (std::size_t i = 0; i < tables.size(); ++i) {
    const Table& table = tables[i];
    lines.push_back({});
    lines.push_back({table.title, true});
    const std::size_t shown = table.rows.size() <= rows[i] ? table.rows.size() : rows[i] - 1;
    for (std::size_t j = 0; j < shown; ++j) lines.push_back({table.rows[j]});
    if (table.rows.empty()) lines.push_back({"none"});
    if (shown < table.rows.size()) lines.push_back({"... and " + std::to_string(table.rows.size() - shown) + " more"});
  }
  if (lines.size() > height) lines.resize(height);
  for (TopLine& line : lines) line.text = line.text.substr(0, width);
  return lines;
}

int run_top(const DaemonAddress& address, const TopOptions& options, std::ostream& out) {
  if (!options.once) {
    if (::isatty(STDIN_FILENO) == 1 && ::isatty(STDOUT_FILENO) == 1) return run_live(address, options, out);
    out << "kvernctl top needs a terminal; use --once for one screen of text\n";
    return 2;
  }
  Source source(address);
  const auto earlier = source.read();
  if (earlier) std::this_thread::sleep_for(std::chrono::duration<double>(options.interval_seconds));
  const auto now = earlier ? source.read() : earlier;
  if (!now) {
    out << now.error().to_string() << "\n";
    return 2;
  }
  for (const auto& line : top_screen(*earlier, *now, kWidth, kHeight)) out << line.text << "\n";
  return 0;
}

}  // namespace kvern
