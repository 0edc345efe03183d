#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "base/status.h"
#include "store/byte_parts.h"
#include "store/event_loop.h"
#include "store/http_client.h"
#include "store/s3_signer.h"

namespace kvern {

/// A secret: at most one of the three. Never logged, and never part of an error.
struct SecretSource {
  std::string value = {};
  std::string environment = {};  ///< a variable's name
  std::string file = {};         ///< read again now and then, since session tokens change; trailing white space is cut
  bool is_set() const { return !value.empty() || !environment.empty() || !file.empty(); }
};

struct S3Bucket {
  /// "https://host[:port]" or "http://…"; empty: that of AWS for the region.
  std::string endpoint;
  std::string region = "us-east-1";
  std::string bucket;
  /// The bucket in the path, as most servers other than AWS want it, and not in the host name.
  bool path_style = false;
  SecretSource access_key_id, secret_access_key, session_token;

  /// kInvalid says what is wrong. Does not read variables or files.
  Status validate() const;
};

struct S3Retries {
  /// An attempt that fails for a reason that may pass (500, 502, 503, 504, 429, a broken connection) is followed by
  /// another one after a random while below first_pause_ns, doubled with each, at most max_pause_ns.
  std::int64_t first_pause_ns = 50'000'000;
  std::int64_t max_pause_ns = 2'000'000'000;
};

struct S3Call {
  using Done = std::function<void(Result<HttpResponse>)>;

  std::string method = {};
  std::string key = {};  ///< empty: the bucket itself
  HttpQuery query = {};
  std::map<std::string, std::string> headers = {};  ///< names in lower case
  ByteParts body = {};
  std::shared_ptr<const void> hold = {};
  std::span<std::byte> into = {};
  std::int64_t attempt_timeout_ns = 0;
  std::int64_t deadline_ns = 0;  ///< of all attempts
  /// Called once, and not from within call() before the client is closed: an answer of status 2xx, 404, 412 or 416; or
  /// kUnavailable, with what the server said.
  Done done = {};

  // Of S3Client:
  int attempts = 0;
  Status said = {};        ///< the last trouble that tells something
  bool cut_short = false;  ///< the last attempt, by the deadline
  std::optional<std::uint64_t> exchange = {}, timer = {};
  bool ended = false;
};

/// Signed requests to one bucket, with retries. Belongs to the loop's thread.
class S3Client {
 public:
  /// All outlive the client. Throws std::invalid_argument when a secret cannot be had.
  S3Client(EventLoop& loop, HttpClient& http, const S3Bucket& bucket, const S3Retries& retries);

  void call(const std::shared_ptr<S3Call>& call);
  /// done is not called any more.
  void cancel(const std::shared_ptr<S3Call>& call);
  /// Ends all calls, and every later one at once, with kUnavailable.
  void close();

 private:
  void attempt(const std::shared_ptr<S3Call>& call);
  void answered(const std::shared_ptr<S3Call>& call, Result<HttpResponse> response);
  void finish(const std::shared_ptr<S3Call>& call, Result<HttpResponse> response);
  Status read_credentials();
  HttpRequest signed_request(const S3Call& call) const;

  EventLoop& loop_;
  HttpClient& http_;
  S3Bucket bucket_;
  const S3Retries retries_;
  std::string scheme_, host_, path_prefix_;
  S3Credentials credentials_;
  std::int64_t credentials_read_ns_ = 0;
  std::minstd_rand random_{std::random_device{}()};
  std::unordered_set<std::shared_ptr<S3Call>> calls_;  ///< that have not ended
  bool closed_ = false;
};

/// The texts of all elements of that name, wherever they are. For the few, flat answers of S3; safe on any input.
std::vector<std::string> xml_texts(std::string_view xml, std::string_view element);
/// For text in XML.
std::string xml_escape(std::string_view text);

}  // namespace kvern
