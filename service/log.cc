#include "service/log.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <iostream>
#include <nlohmann/json.hpp>

namespace kvern {
namespace {

constexpr std::int64_t kSecondNs = 1'000'000'000;
constexpr std::array<std::string_view, 6> kLevels = {"trace", "debug", "info", "warn", "error", "off"};

/// UTC, in milliseconds: "2026-11-26T08:30:00.250Z".
std::string wall_time() {
  using namespace std::chrono;
  const auto now = time_point_cast<milliseconds>(system_clock::now());
  const std::time_t seconds = system_clock::to_time_t(now);
  std::tm parts{};
  ::gmtime_r(&seconds, &parts);
  char text[32];
  const std::size_t length = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &parts);
  const auto left = static_cast<int>(now.time_since_epoch().count() % 1000);
  std::snprintf(text + length, sizeof text - length, ".%03dZ", left);
  return text;
}

/// Bytes that are no UTF-8 are replaced: names come from clients.
std::string json_text(const nlohmann::json& value) {
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

nlohmann::json json_value(const LogField& fact) {
  return std::visit([](const auto& value) { return nlohmann::json(value); }, fact.value);
}

/// Text as it is where nobody could take it for two facts, else as JSON has it.
std::string text_value(const LogField& fact) {
  const auto* text = std::get_if<std::string_view>(&fact.value);
  const auto plain = [](char c) { return c > ' ' && c <= '~' && c != '"' && c != '=' && c != '\\'; };
  if (text != nullptr && !text->empty() && std::ranges::all_of(*text, plain)) return std::string(*text);
  return json_text(json_value(fact));
}

}  // namespace

LogLevel log_level(std::string_view name) {
  const auto* found = std::ranges::find(kLevels, name);
  return found == kLevels.end() ? LogLevel::kInfo : static_cast<LogLevel>(found - kLevels.begin());
}

void Log::configure(const Config& config) {
  std::lock_guard lock(mutex_);
  config_ = config;
}

bool Log::writes(LogLevel level) const {
  std::lock_guard lock(mutex_);
  return level >= config_.level && level != LogLevel::kOff;
}

std::uint64_t Log::left_out() const {
  std::lock_guard lock(mutex_);
  return left_out_;
}

void Log::write(LogLevel level, std::string_view event, std::initializer_list<LogField> facts) {
  std::lock_guard lock(mutex_);
  if (level < config_.level || level == LogLevel::kOff) return;
  auto found = events_.find(event);
  if (found == events_.end()) found = events_.emplace(event, Event{}).first;
  Event& of = found->second;
  const std::int64_t now = clock_.now_ns();
  if (of.lines == 0 || now - of.second_begins_ns >= kSecondNs) {
    of.second_begins_ns = now;
    of.lines = 0;
  }
  of.level = level;
  if (config_.lines_per_second != 0 && of.lines >= config_.lines_per_second) {
    ++of.left_out;
    ++left_out_;
    return;
  }
  ++of.lines;
  put(level, event, facts, of.left_out);
  of.left_out = 0;
}

void Log::tell_left_out(bool all) {
  std::lock_guard lock(mutex_);
  const std::int64_t now = clock_.now_ns();
  for (auto& [name, event] : events_) {
    if (event.left_out == 0 || (!all && now - event.second_begins_ns < kSecondNs)) continue;
    put(event.level, "lines were left out", {{"of", name}}, event.left_out);
    event.left_out = 0;
  }
}

void Log::put(LogLevel level, std::string_view event, std::initializer_list<LogField> facts, std::uint64_t left_out) {
  const std::string_view level_name = kLevels[static_cast<std::size_t>(level)];
  std::string line;
  if (config_.json) {
    line = R"({"time":")" + wall_time() + R"(","level":")" + std::string(level_name) + R"(","event":)" +
           json_text(nlohmann::json(event));
    const auto add = [&](const LogField& fact) {
      line += "," + json_text(nlohmann::json(fact.name)) + ":" + json_text(json_value(fact));
    };
    for (const LogField& fact : facts) add(fact);
    if (left_out > 0) add({"left_out", left_out});
    line += "}";
  } else {
    line = wall_time() + " " + std::string(level_name) + std::string(6 - level_name.size(), ' ') + std::string(event);
    const auto add = [&](const LogField& fact) { line += " " + std::string(fact.name) + "=" + text_value(fact); };
    for (const LogField& fact : facts) add(fact);
    if (left_out > 0) add({"left_out", left_out});
  }
  line += "\n";
  out_.write(line.data(), static_cast<std::streamsize>(line.size()));
  out_.flush();
}

Log& process_log() {
  static Log log({}, Clock::system(), std::cerr);
  return log;
}

}  // namespace kvern
