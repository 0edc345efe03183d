#include "store/redis_resp.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>

namespace kvern {
namespace {

// Lists of keys and of slots are the largest replies that are not received in place.
constexpr std::size_t kMaxReply = 16U << 20;
constexpr std::size_t kMaxBody = 512U << 20;  // Redis allows no longer string
constexpr std::size_t kMaxElements = 1U << 20;
constexpr int kMaxDepth = 8;
constexpr std::size_t kBuffer = 64U << 10;
constexpr std::size_t kMinRoom = 16U << 10;
constexpr std::string_view kEnd = "\r\n";

tl::unexpected<Status> not_resp(const char* what) {
  return failure(Code::kCorrupt, std::string("the server does not speak RESP: ") + what);
}

std::optional<std::int64_t> number(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// The line at position, without its end, and moves position behind it. nullopt: it has not ended yet.
std::optional<std::string_view> take_line(std::string_view bytes, std::size_t& position) {
  const std::size_t end = bytes.find(kEnd, position);
  if (end == std::string_view::npos) return std::nullopt;
  const auto line = bytes.substr(position, end - position);
  position = end + kEnd.size();
  return line;
}

Result<std::optional<RespValue>> parse(std::string_view bytes, std::size_t& position, int depth) {
  const auto line = take_line(bytes, position);
  if (!line) return std::nullopt;
  if (line->empty()) return not_resp("an empty line");
  const std::string_view rest = line->substr(1);
  RespValue value;
  switch (line->front()) {
    case '+':
      value.type = RespValue::Type::kSimple;
      value.text = rest;
      return value;
    case '-':
      value.type = RespValue::Type::kError;
      value.text = rest;
      return value;
    case ':':
    case '$':
    case '*':
      break;
    default:
      return not_resp("a reply of an unknown type");
  }
  const auto count = number(rest);
  if (!count) return not_resp("a length that is not a number");
  if (line->front() == ':') {
    value.type = RespValue::Type::kInteger;
    value.integer = *count;
    return value;
  }
  if (*count == -1) return value;
  if (*count < 0) return not_resp("a negative length");
  const auto length = static_cast<std::size_t>(*count);
  if (line->front() == '$') {
    if (length > kMaxReply) return not_resp("a string longer than any that was asked for");
    if (bytes.size() - position < length + kEnd.size()) return std::nullopt;
    if (bytes.substr(position + length, kEnd.size()) != kEnd) return not_resp("a string without its end");
    value.type = RespValue::Type::kBulk;
    value.integer = *count;
    value.text = bytes.substr(position, length);
    position += length + kEnd.size();
    return value;
  }
  if (depth == kMaxDepth || length > kMaxElements) return not_resp("an array larger than any that was asked for");
  value.type = RespValue::Type::kArray;
  for (std::size_t i = 0; i < length; ++i) {
    auto element = parse(bytes, position, depth + 1);
    if (!element || !*element) return element;
    value.elements.push_back(std::move(**element));
  }
  return value;
}

void append_count(std::string& head, char type, std::size_t count) {
  head += type;
  head += std::to_string(count);
  head += kEnd;
}

std::string head_of(std::span<const std::string_view> arguments, std::size_t count) {
  std::string head;
  append_count(head, '*', count);
  for (const auto argument : arguments) {
    append_count(head, '$', argument.size());
    head += argument;
    head += kEnd;
  }
  return head;
}

}  // namespace

RedisRequest redis_command(std::span<const std::string_view> arguments) {
  return {.head = head_of(arguments, arguments.size())};
}

RedisRequest redis_command(std::initializer_list<std::string_view> arguments) {
  return redis_command(std::span(arguments.begin(), arguments.size()));
}

RedisRequest redis_command(std::initializer_list<std::string_view> arguments, ByteParts body) {
  RedisRequest request{.head = head_of(std::span(arguments.begin(), arguments.size()), arguments.size() + 1)};
  append_count(request.head, '$', bytes_of(body));
  request.body = std::move(body);
  return request;
}

RespReader::RespReader() : buffer_(kBuffer) {}

std::string_view RespReader::waiting() const {
  return {reinterpret_cast<const char*>(buffer_.data()) + begin_, end_ - begin_};
}

Result<std::optional<RespValue>> RespReader::next(std::span<std::byte> into) {
  if (body_) return next_body(into);
  const std::string_view bytes = waiting();
  if (bytes.empty()) return std::nullopt;
  std::size_t position = 0;
  if (!into.empty() && bytes.front() == '$') {
    const auto line = take_line(bytes, position);
    if (!line)
      return bytes.size() < kMinRoom ? Result<std::optional<RespValue>>(std::nullopt) : not_resp("a long line");
    const auto length = number(line->substr(1));
    if (!length || *length < -1 || *length > static_cast<std::int64_t>(kMaxBody)) return not_resp("a bad length");
    begin_ += position;
    if (*length == -1) return RespValue{};
    body_ = Body{.bytes = static_cast<std::size_t>(*length)};
    return next_body(into);
  }
  auto value = parse(bytes, position, 0);
  if (!value) return value;
  if (*value) {
    begin_ += position;
  } else if (bytes.size() > kMaxReply + kMinRoom) {
    return not_resp("a reply larger than any that was asked for");
  }
  return value;
}

Result<std::optional<RespValue>> RespReader::next_body(std::span<std::byte> into) {
  const bool in_place = into.size() == body_->bytes;
  const std::size_t held = std::min(end_ - begin_, body_->bytes - body_->received);
  if (in_place && held > 0) std::memcpy(into.data() + body_->received, buffer_.data() + begin_, held);
  begin_ += held;
  body_->received += held;
  if (body_->received < body_->bytes || end_ - begin_ < kEnd.size()) return std::nullopt;
  if (!waiting().starts_with(kEnd)) return not_resp("a string without its end");
  begin_ += kEnd.size();
  RespValue value;
  value.type = RespValue::Type::kBulk;
  value.integer = static_cast<std::int64_t>(body_->bytes);
  value.received_in_place = in_place;
  body_.reset();
  return value;
}

std::span<std::byte> RespReader::room(std::span<std::byte> into) {
  room_was_in_place_ = body_ && into.size() == body_->bytes && begin_ == end_ && body_->received < body_->bytes;
  if (room_was_in_place_) return into.subspan(body_->received);
  if (begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  if (end_ == 0 && buffer_.size() > kBuffer) buffer_ = std::vector<std::byte>(kBuffer);
  if (buffer_.size() - end_ < kMinRoom) buffer_.resize(buffer_.size() * 2);
  return std::span(buffer_).subspan(end_);
}

std::size_t RespReader::expected_in_place(std::span<std::byte> into) const {
  return body_ && into.size() == body_->bytes && begin_ == end_ ? body_->bytes - body_->received : 0;
}

void RespReader::received(std::size_t bytes) {
  if (room_was_in_place_) {
    body_->received += bytes;
  } else {
    end_ += bytes;
  }
}

}  // namespace kvern
