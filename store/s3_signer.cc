#include "store/s3_signer.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>

#include "base/keys.h"

namespace kvern {
namespace {

using Digest = std::array<std::uint8_t, 32>;

Digest hmac(std::span<const std::uint8_t> key, std::string_view text) {
  Digest digest{};
  unsigned int length = digest.size();
  ::HMAC(::EVP_sha256(), key.data(), static_cast<int>(key.size()), reinterpret_cast<const unsigned char*>(text.data()),
         text.size(), digest.data(), &length);
  return digest;
}

std::string sha256_hex(std::string_view text) {
  const std::span<const std::byte> part = std::as_bytes(std::span(text));
  return kvern::sha256_hex(std::span(&part, 1));
}

// Surrounding blanks go, runs of blanks become one.
std::string trimmed(std::string_view value) {
  std::string text;
  for (const char c : value) {
    if (c == ' ' && (text.empty() || text.back() == ' ')) continue;
    text += c;
  }
  if (text.ends_with(' ')) text.pop_back();
  return text;
}

}  // namespace

std::string sha256_hex(std::span<const std::span<const std::byte>> parts) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&::EVP_MD_CTX_free)> context(::EVP_MD_CTX_new(), &::EVP_MD_CTX_free);
  ::EVP_DigestInit_ex(context.get(), ::EVP_sha256(), nullptr);
  for (const auto& part : parts) ::EVP_DigestUpdate(context.get(), part.data(), part.size());
  Digest digest{};
  ::EVP_DigestFinal_ex(context.get(), digest.data(), nullptr);
  return to_hex(digest);
}

std::string amz_date(std::time_t time) {
  std::tm parts{};
  ::gmtime_r(&time, &parts);
  std::array<char, 32> text{};
  const std::size_t length = std::strftime(text.data(), text.size(), "%Y%m%dT%H%M%SZ", &parts);
  return {text.data(), length};
}

std::string uri_encode(std::string_view text, bool keep_slash) {
  constexpr std::string_view kHex = "0123456789ABCDEF";
  std::string encoded;
  for (const char c : text) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
                       c == '.' || c == '_' || c == '~' || (c == '/' && keep_slash);
    if (plain) {
      encoded += c;
      continue;
    }
    const auto byte = static_cast<std::uint8_t>(c);
    encoded += '%';
    encoded += kHex[byte >> 4U];
    encoded += kHex[byte & 15U];
  }
  return encoded;
}

std::string canonical_query(const HttpQuery& query) {
  std::vector<std::pair<std::string, std::string>> encoded;
  for (const auto& [name, value] : query) encoded.emplace_back(uri_encode(name, false), uri_encode(value, false));
  std::ranges::sort(encoded);
  std::string text;
  for (const auto& [name, value] : encoded) {
    if (!text.empty()) text += '&';
    text.append(name).append("=").append(value);
  }
  return text;
}

std::string sigv4_authorization(const SigV4Request& request, const S3Credentials& credentials, std::string_view region,
                                std::string_view service) {
  std::string headers;
  std::string signed_headers;
  for (const auto& [name, value] : request.headers) {
    headers.append(name).append(":").append(trimmed(value)).append("\n");
    if (!signed_headers.empty()) signed_headers += ';';
    signed_headers += name;
  }
  const std::string canonical = request.method + "\n" + uri_encode(request.path, true) + "\n" +
                                canonical_query(request.query) + "\n" + headers + "\n" + signed_headers + "\n" +
                                request.payload_hash;
  const std::string& date_time = request.headers.at("x-amz-date");
  const std::string date = date_time.substr(0, 8);
  const std::string scope = date + "/" + std::string(region) + "/" + std::string(service) + "/aws4_request";
  const std::string to_sign = "AWS4-HMAC-SHA256\n" + date_time + "\n" + scope + "\n" + sha256_hex(canonical);
  const std::string secret = "AWS4" + credentials.secret_access_key;
  Digest key = hmac({reinterpret_cast<const std::uint8_t*>(secret.data()), secret.size()}, date);
  for (const std::string_view part : {region, service, std::string_view("aws4_request")}) key = hmac(key, part);
  return "AWS4-HMAC-SHA256 Credential=" + credentials.access_key_id + "/" + scope +
         ", SignedHeaders=" + signed_headers + ", Signature=" + to_hex(hmac(key, to_sign));
}

}  // namespace kvern
