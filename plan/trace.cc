#include "plan/trace.h"

#include <cmath>
#include <fstream>
#include <istream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace kvern::plan {
namespace {

using nlohmann::json;

// A prompt of 2^28 tokens is longer than any model takes; it bounds what a damaged line can ask for.
constexpr double kTokensMost = 1U << 28U;
constexpr double kTimestampMost = 1e15;

Status malformed(std::size_t line, const std::string& what) {
  return {Code::kInvalid, "line " + std::to_string(line) + ": " + what};
}

// A whole number from 0 to most, also when it is written as 12.0.
std::optional<double> whole_number(const json& value, double most) {
  if (!value.is_number()) return std::nullopt;
  const double number = value.get<double>();
  if (!(number >= 0 && number <= most) || number != std::floor(number)) return std::nullopt;
  return number;
}

class Reader {
 public:
  explicit Reader(std::uint32_t block_tokens) { trace_.block_tokens = block_tokens; }

  Status add(std::size_t line, const std::string& text) {
    const json request = json::parse(text, nullptr, false);
    if (!request.is_object()) return malformed(line, "expected one JSON object");
    TraceRequest parsed;
    const auto number = [&](const char* field, double most) -> std::optional<double> {
      const auto found = request.find(field);
      return found == request.end() ? std::nullopt : whole_number(*found, most);
    };
    // Fractions of a millisecond are of no use here.
    const auto timestamp = request.find("timestamp");
    if (timestamp == request.end() || !timestamp->is_number() ||
        !(timestamp->get<double>() >= 0 && timestamp->get<double>() <= kTimestampMost)) {
      return malformed(line, "\"timestamp\" must be a number of milliseconds from 0 on");
    }
    parsed.timestamp_ms = static_cast<std::int64_t>(timestamp->get<double>());
    const auto input = number("input_length", kTokensMost);
    if (!input) return malformed(line, "\"input_length\" must be a whole number of tokens");
    parsed.input_tokens = static_cast<std::uint32_t>(*input);
    const auto output = number("output_length", kTokensMost);
    if (!output) return malformed(line, "\"output_length\" must be a whole number of tokens");
    parsed.output_tokens = static_cast<std::uint32_t>(*output);
    if (const Status status = add_blocks(line, request, parsed); !status) return status;
    trace_.input_tokens += parsed.input_tokens;
    trace_.requests.push_back(std::move(parsed));
    return Status::ok();
  }

  Result<Trace> finish() {
    if (trace_.requests.empty()) return failure(Code::kInvalid, "the trace holds no request");
    trace_.distinct_blocks = static_cast<std::uint32_t>(numbers_.size());
    return std::move(trace_);
  }

 private:
  Status add_blocks(std::size_t line, const json& request, TraceRequest& parsed) {
    const auto ids = request.find("hash_ids");
    if (ids == request.end() || !ids->is_array())
      return malformed(line, "\"hash_ids\" must be a list of whole numbers");
    const std::size_t most = (std::size_t{parsed.input_tokens} + trace_.block_tokens - 1) / trace_.block_tokens;
    if (ids->size() > most) {
      return malformed(line, std::to_string(ids->size()) + " hash_ids, but " + std::to_string(parsed.input_tokens) +
                                 " tokens fill " + std::to_string(most) + " blocks of " +
                                 std::to_string(trace_.block_tokens));
    }
    std::unordered_set<std::uint32_t> own;
    parsed.blocks.reserve(ids->size());
    for (const json& id : *ids) {
      if (!id.is_number_integer()) return malformed(line, "\"hash_ids\" must be a list of whole numbers");
      const auto next = static_cast<std::uint32_t>(numbers_.size());
      if (next == std::numeric_limits<std::uint32_t>::max()) return malformed(line, "too many different blocks");
      const std::uint32_t block = numbers_.try_emplace(id.get<std::int64_t>(), next).first->second;
      if (!own.insert(block).second) {
        return malformed(line, "hash id " + id.dump() + " is there twice: an id names the whole prompt up to its end");
      }
      parsed.blocks.push_back(block);
    }
    return Status::ok();
  }

  Trace trace_;
  std::unordered_map<std::int64_t, std::uint32_t> numbers_;
};

}  // namespace

Result<Trace> read_trace(std::istream& in, std::uint32_t block_tokens) {
  if (block_tokens == 0) return failure(Code::kInvalid, "a block must have at least one token");
  Reader reader(block_tokens);
  std::string text;
  for (std::size_t line = 1; std::getline(in, text); ++line) {
    if (text.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (const Status status = reader.add(line, text); !status) return failure(status);
  }
  return reader.finish();
}

Result<Trace> load_trace(const std::string& path, std::uint32_t block_tokens) {
  std::ifstream in(path);
  if (!in) return failure(Code::kNotFound, path + " cannot be read");
  auto trace = read_trace(in, block_tokens);
  if (!trace) return failure(trace.error().code(), path + ": " + trace.error().message());
  return trace;
}

}  // namespace kvern::plan
