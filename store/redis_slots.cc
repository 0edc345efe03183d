#include "store/redis_slots.h"

#include <charconv>

namespace kvern {
namespace {

constexpr std::array<std::uint16_t, 256> make_crc_table() {
  std::array<std::uint16_t, 256> table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte << 8U;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 0x8000U) != 0 ? (crc << 1U) ^ 0x1021U : crc << 1U;
    table[byte] = static_cast<std::uint16_t>(crc);
  }
  return table;
}
constexpr auto kCrcTable = make_crc_table();

std::uint16_t crc16(std::string_view text) {
  std::uint32_t crc = 0;
  for (const char c : text)
    crc = ((crc << 8U) & 0xffffU) ^ kCrcTable[((crc >> 8U) ^ static_cast<std::uint8_t>(c)) & 0xffU];
  return static_cast<std::uint16_t>(crc);
}

template <typename T>
std::optional<T> number(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// An empty host means the one that was asked, "?" that the node does not know it.
std::optional<RedisEndpoint> announced(std::string host, std::int64_t port, const RedisEndpoint& asked) {
  if (host == "?" || port <= 0 || port > 65535) return std::nullopt;
  if (host.empty()) host = asked.host;
  return RedisEndpoint{std::move(host), static_cast<std::uint16_t>(port)};
}

}  // namespace

std::uint16_t redis_slot(std::string_view key) {
  const std::size_t open = key.find('{');
  if (open != std::string_view::npos) {
    const std::size_t close = key.find('}', open + 1);
    if (close != std::string_view::npos && close > open + 1) key = key.substr(open + 1, close - open - 1);
  }
  return static_cast<std::uint16_t>(crc16(key) % kRedisSlots);
}

Result<RedisEndpoint> parse_redis_endpoint(std::string_view text) {
  const std::size_t colon = text.rfind(':');
  const auto invalid = [&] {
    return failure(Code::kInvalid, "'" + std::string(text) + "' is not host:port (IPv6: [address]:port)");
  };
  if (colon == std::string_view::npos) return invalid();
  std::string_view host = text.substr(0, colon);
  const auto port = number<std::uint16_t>(text.substr(colon + 1));
  if (host.starts_with('[') && host.ends_with(']')) {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != std::string_view::npos) {
    return invalid();
  }
  if (host.empty() || !port || *port == 0) return invalid();
  return RedisEndpoint{std::string(host), *port};
}

Result<std::vector<RedisSlotRange>> parse_cluster_slots(const RespValue& reply, const RedisEndpoint& asked) {
  using Type = RespValue::Type;
  const auto corrupt = [] { return failure(Code::kCorrupt, "the reply to CLUSTER SLOTS is malformed"); };
  if (reply.type != Type::kArray) return corrupt();
  std::vector<RedisSlotRange> ranges;
  for (const auto& range : reply.elements) {
    if (range.type != Type::kArray || range.elements.size() < 3) return corrupt();
    const auto& first = range.elements[0];
    const auto& last = range.elements[1];
    const auto& master = range.elements[2];
    if (first.type != Type::kInteger || last.type != Type::kInteger || first.integer < 0 ||
        first.integer > last.integer || last.integer >= static_cast<std::int64_t>(kRedisSlots)) {
      return corrupt();
    }
    if (master.type != Type::kArray || master.elements.size() < 2 || master.elements[1].type != Type::kInteger) {
      return corrupt();
    }
    if (auto endpoint = announced(master.elements[0].text, master.elements[1].integer, asked)) {
      ranges.push_back(
          {static_cast<std::uint16_t>(first.integer), static_cast<std::uint16_t>(last.integer), std::move(*endpoint)});
    }
  }
  return ranges;
}

std::optional<RedisRedirect> parse_redis_redirect(std::string_view error, const RedisEndpoint& asked) {
  RedisRedirect redirect{};
  if (error.starts_with("MOVED ")) {
    redirect.kind = RedisRedirect::Kind::kMoved;
  } else if (error.starts_with("ASK ")) {
    redirect.kind = RedisRedirect::Kind::kAsk;
  } else {
    return std::nullopt;
  }
  error.remove_prefix(error.find(' ') + 1);
  const std::size_t space = error.find(' ');
  const std::size_t colon = error.rfind(':');
  if (space == std::string_view::npos || colon == std::string_view::npos || colon < space) return std::nullopt;
  const auto slot = number<std::uint16_t>(error.substr(0, space));
  const auto port = number<std::uint16_t>(error.substr(colon + 1));
  if (!slot || *slot >= kRedisSlots || !port) return std::nullopt;
  auto endpoint = announced(std::string(error.substr(space + 1, colon - space - 1)), *port, asked);
  if (!endpoint) return std::nullopt;
  redirect.slot = *slot;
  redirect.endpoint = std::move(*endpoint);
  return redirect;
}

}  // namespace kvern
