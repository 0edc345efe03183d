#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "base/status.h"
#include "store/redis_resp.h"

namespace kvern {

/// How Redis Cluster spreads keys: 16,384 slots, each served by one master.

inline constexpr std::size_t kRedisSlots = 16384;

/// The slot of a key: CRC16 (XMODEM) over what stands between its first "{" and the next "}", or over all of it.
std::uint16_t redis_slot(std::string_view key);

struct RedisEndpoint {
  std::string host;
  std::uint16_t port = 0;
  bool operator==(const RedisEndpoint&) const = default;
  bool operator<(const RedisEndpoint& other) const { return std::tie(host, port) < std::tie(other.host, other.port); }
  std::string to_string() const { return host + ":" + std::to_string(port); }
};

/// Of "host:port" and "[address]:port". kInvalid says what is wrong.
Result<RedisEndpoint> parse_redis_endpoint(std::string_view text);

/// A range of slots and their master.
struct RedisSlotRange {
  std::uint16_t first = 0, last = 0;
  RedisEndpoint master;
};

/// Of the reply to CLUSTER SLOTS. Ranges without a known master are left out. asked: who answered; stands for a host
/// that a server leaves empty. kCorrupt when the reply is none.
Result<std::vector<RedisSlotRange>> parse_cluster_slots(const RespValue& reply, const RedisEndpoint& asked);

/// What an error reply says about where the key is served.
struct RedisRedirect {
  enum class Kind { kMoved, kAsk };
  Kind kind;
  std::uint16_t slot;
  RedisEndpoint endpoint;
};
/// Of "MOVED 3999 127.0.0.1:6381" and "ASK ...". nullopt: it is no redirection.
std::optional<RedisRedirect> parse_redis_redirect(std::string_view error, const RedisEndpoint& asked);

}  // namespace kvern
