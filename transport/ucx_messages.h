#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace kvern::ucx {

/// The active messages of the data plane (docs/protocol.md, "UCX data plane"). Headers are these structs as they are in
/// memory; both hosts are little-endian, like the container format.

enum MessageId : unsigned {
  kHello = 1,   ///< client: RequestHeader. Answered when the token's server is ready
  kPush = 2,    ///< client: RequestHeader, payload = the staged bytes
  kPull = 3,    ///< client: RequestHeader
  kAnswer = 4,  ///< server: AnswerHeader, payload = the status' message
  kData = 5,    ///< server: AnswerHeader, payload = the bytes that a pull asked for
  kLastMessage = kData,
};

constexpr std::uint32_t kDataPlaneVersion = 1;
constexpr std::size_t kMaxTokenBytes = 64;
/// Longer status messages are cut.
constexpr std::size_t kMaxTextBytes = 1024;

struct RequestHeader {
  std::uint32_t version = kDataPlaneVersion;  ///< version and request_id keep their places in all versions
  std::uint32_t token_bytes = 0;
  std::uint64_t request_id = 0;  ///< the answer carries it
  std::uint64_t object_id = 0;   ///< reservation of a push, lease of a pull
  std::uint64_t offset = 0;      ///< in staging or in the slab
  std::uint64_t bytes = 0;
  std::array<char, kMaxTokenBytes> token{};

  std::string session_token() const { return {token.data(), token_bytes}; }
};
static_assert(sizeof(RequestHeader) == 104);

struct AnswerHeader {
  std::uint32_t version = kDataPlaneVersion;
  std::uint32_t code = 0;  ///< kvern::Code
  std::uint64_t request_id = 0;
  std::uint64_t bytes = 0;  ///< of the payload
};
static_assert(sizeof(AnswerHeader) == 24);

/// False when the bytes are no header of this version.
inline bool parse(const void* bytes, std::size_t count, RequestHeader* header) {
  if (count != sizeof *header) return false;
  std::memcpy(header, bytes, sizeof *header);
  return header->version == kDataPlaneVersion && header->token_bytes <= kMaxTokenBytes;
}
inline bool parse(const void* bytes, std::size_t count, AnswerHeader* header) {
  if (count != sizeof *header) return false;
  std::memcpy(header, bytes, sizeof *header);
  return header->version == kDataPlaneVersion;
}

}  // namespace kvern::ucx
