#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "store/byte_parts.h"

namespace kvern {

/// RESP2, the protocol of Redis and Valkey: requests whose large arguments stay where they lie, and a reader that
/// receives large replies where they belong (docs/decisions/0008-remote-tiers.md says why that is our own code).

struct RespValue {
  enum class Type { kSimple, kError, kInteger, kBulk, kNull, kArray };
  Type type = Type::kNull;
  std::string text;          ///< of a simple string, an error, and a bulk string that was not received in place
  std::int64_t integer = 0;  ///< of an integer; of a bulk string its length
  bool received_in_place = false;
  std::vector<RespValue> elements;

  bool is_error() const { return type == Type::kError; }
};

/// One command and where its reply goes. Its bytes are head, then, where there is a body, the body and CRLF.
struct RedisRequest {
  std::string head;
  ByteParts body = {};
  /// A bulk reply of exactly this size is received here; one of another size is dropped but for its length.
  std::span<std::byte> into = {};
};

/// A command of short arguments.
RedisRequest redis_command(std::span<const std::string_view> arguments);
RedisRequest redis_command(std::initializer_list<std::string_view> arguments);
/// A command whose last argument is the body.
RedisRequest redis_command(std::initializer_list<std::string_view> arguments, ByteParts body);

/// Cuts a stream of bytes into replies. Safe on any input; not thread-safe.
class RespReader {
 public:
  RespReader();

  /// The next reply, or nullopt when more bytes are needed. into: the destination of that reply as in RedisRequest; may
  /// turn empty between two calls, which drops what is still to come of a body. kCorrupt: this is not RESP, or larger
  /// than anything that was asked for; the stream is useless from there on.
  Result<std::optional<RespValue>> next(std::span<std::byte> into);

  /// Where to receive bytes, never empty; within `into` as soon as nothing else can come.
  std::span<std::byte> room(std::span<std::byte> into);
  /// So many bytes at least are still to come of the body that room() receives in place.
  std::size_t expected_in_place(std::span<std::byte> into) const;
  /// So many bytes were received where the last room() said.
  void received(std::size_t bytes);

 private:
  Result<std::optional<RespValue>> next_body(std::span<std::byte> into);
  std::string_view waiting() const;

  std::vector<std::byte> buffer_;
  std::size_t begin_ = 0, end_ = 0;  ///< of buffer_: received and not consumed
  struct Body {
    std::size_t bytes = 0;
    std::size_t received = 0;
  };
  std::optional<Body> body_;  ///< of the bulk string that is being received in place or dropped
  bool room_was_in_place_ = false;
};

}  // namespace kvern
