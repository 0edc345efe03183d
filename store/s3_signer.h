#pragma once

#include <ctime>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvern {

/// AWS Signature Version 4.

struct S3Credentials {
  std::string access_key_id;
  std::string secret_access_key;
  std::string session_token;  ///< empty: none
};

using HttpQuery = std::vector<std::pair<std::string, std::string>>;

struct SigV4Request {
  std::string method;
  std::string path;  ///< not encoded; "/" at least
  HttpQuery query;   ///< not encoded, in any order
  /// All that are signed, with "host" and "x-amz-date"; names in lower case.
  std::map<std::string, std::string> headers;
  std::string payload_hash;  ///< hexadecimal SHA-256, or kUnsignedPayload
};

inline constexpr std::string_view kUnsignedPayload = "UNSIGNED-PAYLOAD";

/// "20130524T000000Z": what belongs into x-amz-date.
std::string amz_date(std::time_t time);

/// The value of the header "authorization". The date is taken from the x-amz-date that is signed.
std::string sigv4_authorization(const SigV4Request& request, const S3Credentials& credentials, std::string_view region,
                                std::string_view service);

/// Percent-encoding as AWS defines it: all but letters, digits and "-._~", and "/" where it is kept.
std::string uri_encode(std::string_view text, bool keep_slash);
/// "a=1&b=": encoded, and sorted as it is signed.
std::string canonical_query(const HttpQuery& query);

std::string sha256_hex(std::span<const std::span<const std::byte>> parts);

}  // namespace kvern
