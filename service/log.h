#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <iosfwd>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <variant>

#include "base/clock.h"

namespace kvern {

enum class LogLevel { kTrace, kDebug, kInfo, kWarn, kError, kOff };
/// "warn", as the key log.level has it. A word that is none of them: kInfo.
LogLevel log_level(std::string_view name);

/// A fact of a log line. Holds a view of its text: for the arguments of one call. Names in use: session (its id),
/// request (what the client numbered it), trace (of the engine's request), tenant, tier, chunk, why.
struct LogField {
  std::string_view name;
  std::variant<std::string_view, std::uint64_t, double> value;

  LogField(std::string_view name_in, std::string_view text) : name(name_in), value(text) {}
  LogField(std::string_view name_in, const std::string& text) : name(name_in), value(std::string_view(text)) {}
  LogField(std::string_view name_in, const char* text) : name(name_in), value(std::string_view(text)) {}
  LogField(std::string_view name_in, std::integral auto number)
      : name(name_in), value(static_cast<std::uint64_t>(number)) {}
  LogField(std::string_view name_in, std::floating_point auto number)
      : name(name_in), value(static_cast<double>(number)) {}
};

/// Writes lines of an event and its facts, as JSON objects or as text "time level event name=value …". The event is a
/// constant: what varies goes into facts. Of each event at most so many lines a second are written, so that no client
/// fills a disk; the next one says in left_out how many are missing. A line is one write, never torn between threads.
/// Thread-safe; waits when nobody takes what is written.
class Log {
 public:
  struct Config {
    LogLevel level = LogLevel::kInfo;
    bool json = false;
    std::uint64_t lines_per_second = 10;  ///< of each event; 0: no limit
  };
  Log(const Config& config, const Clock& clock, std::ostream& out) : config_(config), clock_(clock), out_(out) {}

  void configure(const Config& config);
  bool writes(LogLevel level) const;
  void write(LogLevel level, std::string_view event, std::initializer_list<LogField> facts = {});
  /// A line for each event of which lines were left out more than a second ago, and none came since. `all`: those of
  /// this second too.
  void tell_left_out(bool all = false);
  std::uint64_t left_out() const;  ///< lines, since the start

 private:
  struct Event {
    std::int64_t second_begins_ns = 0;
    std::uint64_t lines = 0;     ///< in this second
    std::uint64_t left_out = 0;  ///< since a line was written
    LogLevel level = LogLevel::kInfo;
  };
  void put(LogLevel level, std::string_view event, std::initializer_list<LogField> facts, std::uint64_t left_out);

  mutable std::mutex mutex_;
  Config config_;
  const Clock& clock_;
  std::ostream& out_;
  std::uint64_t left_out_ = 0;
  std::map<std::string, Event, std::less<>> events_;  ///< as many as the sources have
};

/// The log of this process, on standard error.
Log& process_log();

inline void log_debug(std::string_view event, std::initializer_list<LogField> facts = {}) {
  process_log().write(LogLevel::kDebug, event, facts);
}
inline void log_info(std::string_view event, std::initializer_list<LogField> facts = {}) {
  process_log().write(LogLevel::kInfo, event, facts);
}
inline void log_warn(std::string_view event, std::initializer_list<LogField> facts = {}) {
  process_log().write(LogLevel::kWarn, event, facts);
}
inline void log_error(std::string_view event, std::initializer_list<LogField> facts = {}) {
  process_log().write(LogLevel::kError, event, facts);
}

}  // namespace kvern
