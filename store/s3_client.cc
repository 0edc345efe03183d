#include "store/s3_client.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <stdexcept>
#include <utility>

namespace kvern {
namespace {

constexpr std::int64_t kReadCredentialsAgainNs = 60'000'000'000;
constexpr std::size_t kMaxSecret = 16U << 10;

bool may_pass(int status) { return status == 429 || status == 500 || status == 502 || status == 503 || status == 504; }

Result<std::string> secret_of(const SecretSource& source, const char* name) {
  if (!source.value.empty()) return source.value;
  if (source.file.empty()) return std::string();
  std::ifstream file(source.file);
  std::string text(kMaxSecret, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(std::max<std::streamsize>(0, file.gcount())));
  text.erase(text.find_last_not_of(" \t\r\n") + 1);
  if (text.empty()) return failure(Code::kInvalid, std::string(name) + ": cannot read " + source.file);
  return text;
}

/// Variables are read once: they do not change, and reading them later races with whoever sets one.
void take_from_environment(SecretSource& source, const char* name) {
  if (source.environment.empty()) return;
  const char* value = std::getenv(source.environment.c_str());
  if (value == nullptr || *value == '\0') {
    throw std::invalid_argument("s3: " + std::string(name) + ": the environment has no " + source.environment);
  }
  source = {.value = value};
}

struct Endpoint {
  std::string scheme, host, path;
};

Result<Endpoint> parse_endpoint(const std::string& url) {
  const auto invalid = [&](const char* what) {
    return failure(Code::kInvalid, "endpoint '" + url + "' " + what + ": write https://host[:port]");
  };
  const std::size_t colon = url.find("://");
  if (colon == std::string::npos) return invalid("has no scheme");
  Endpoint endpoint{.scheme = url.substr(0, colon), .host = url.substr(colon + 3), .path = ""};
  if (endpoint.scheme != "http" && endpoint.scheme != "https") return invalid("is neither http nor https");
  if (const std::size_t slash = endpoint.host.find('/'); slash != std::string::npos) {
    endpoint.path = endpoint.host.substr(slash);
    endpoint.host.resize(slash);
  }
  while (endpoint.path.ends_with('/')) endpoint.path.pop_back();
  if (endpoint.host.empty() || endpoint.host.find_first_of(" @?#") != std::string::npos) {
    return invalid("has no plain host");
  }
  // The signed host must be the one that libcurl sends, which leaves the scheme's own port out.
  const std::string default_port = endpoint.scheme == "https" ? ":443" : ":80";
  if (endpoint.host.ends_with(default_port)) endpoint.host.resize(endpoint.host.size() - default_port.size());
  return endpoint;
}

std::string endpoint_of(const S3Bucket& bucket) {
  return bucket.endpoint.empty() ? "https://s3." + bucket.region + ".amazonaws.com" : bucket.endpoint;
}

Status status_of(const S3Call& call, const HttpResponse& response) {
  const auto codes = xml_texts(response.text, "Code");
  const auto messages = xml_texts(response.text, "Message");
  const std::string code = codes.empty() ? "" : " " + codes.front();
  std::string said = "S3 answers " + call.method + " with " + std::to_string(response.status) + code;
  if (!messages.empty()) said += " (" + messages.front().substr(0, 200) + ")";
  if (response.status == 403) {
    said +=
        ": check the access key and its secret, the region, this machine's clock, and that the policy allows "
        "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket (without the last one, what is missing looks "
        "forbidden)";
  }
  if (response.status == 301 || response.status == 307) said += ": check the region and the endpoint";
  return {Code::kUnavailable, said};
}

}  // namespace

Status S3Bucket::validate() const {
  if (bucket.empty() || bucket.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789.-_") != std::string::npos) {
    return {Code::kInvalid, "bucket must be the name of a bucket (lower-case letters, digits, '.', '-')"};
  }
  if (region.empty()) return {Code::kInvalid, "region must not be empty (us-east-1 where the server knows none)"};
  if (const auto parsed = parse_endpoint(endpoint_of(*this)); !parsed) return parsed.error();
  const auto count = [](const SecretSource& source) {
    return int{!source.value.empty()} + int{!source.environment.empty()} + int{!source.file.empty()};
  };
  if (count(access_key_id) != 1 || count(secret_access_key) != 1) {
    return {Code::kInvalid,
            "access_key_id and secret_access_key must each come from one of value, environment and file"};
  }
  if (count(session_token) > 1)
    return {Code::kInvalid, "session_token must come from one of value, environment and file"};
  return Status::ok();
}

S3Client::S3Client(EventLoop& loop, HttpClient& http, const S3Bucket& bucket, const S3Retries& retries)
    : loop_(loop), http_(http), bucket_(bucket), retries_(retries) {
  take_from_environment(bucket_.access_key_id, "access_key_id");
  take_from_environment(bucket_.secret_access_key, "secret_access_key");
  take_from_environment(bucket_.session_token, "session_token");
  auto endpoint = parse_endpoint(endpoint_of(bucket_));
  if (!endpoint) throw std::invalid_argument("s3: " + endpoint.error().message());
  scheme_ = endpoint->scheme;
  host_ = bucket_.path_style ? endpoint->host : bucket_.bucket + "." + endpoint->host;
  path_prefix_ = endpoint->path + (bucket_.path_style ? "/" + bucket_.bucket : "");
  if (const auto status = read_credentials(); !status) throw std::invalid_argument("s3: " + status.message());
}

Status S3Client::read_credentials() {
  const auto id = secret_of(bucket_.access_key_id, "access_key_id");
  const auto secret = secret_of(bucket_.secret_access_key, "secret_access_key");
  const auto token = secret_of(bucket_.session_token, "session_token");
  for (const auto* part : {&id, &secret, &token}) {
    if (!*part) return part->error();
  }
  credentials_ = {*id, *secret, *token};
  credentials_read_ns_ = loop_.now_ns();
  return Status::ok();
}

HttpRequest S3Client::signed_request(const S3Call& call) const {
  SigV4Request to_sign{.method = call.method,
                       .path = call.key.empty() && !path_prefix_.empty() ? path_prefix_ : path_prefix_ + "/" + call.key,
                       .query = call.query,
                       .headers = call.headers,
                       .payload_hash = ""};
  // TLS protects the payload on its way; without it the signature must.
  to_sign.payload_hash = scheme_ == "https" ? std::string(kUnsignedPayload) : sha256_hex(call.body);
  to_sign.headers["host"] = host_;
  // The wall clock, since the server compares it with its own. The project's clock is monotonic.
  to_sign.headers["x-amz-date"] = amz_date(std::time(nullptr));
  to_sign.headers["x-amz-content-sha256"] = to_sign.payload_hash;
  if (!credentials_.session_token.empty()) to_sign.headers["x-amz-security-token"] = credentials_.session_token;
  HttpRequest request{.method = call.method,
                      .url = scheme_ + "://" + host_ + uri_encode(to_sign.path, true),
                      .headers = {},
                      .body = call.body,
                      .hold = call.hold,
                      .into = call.into};
  if (const auto query = canonical_query(call.query); !query.empty()) request.url += "?" + query;
  for (const auto& [name, value] : to_sign.headers) {
    if (name == "host") continue;  // libcurl sends it
    request.headers.push_back(name);
    request.headers.back().append(": ").append(value);
  }
  request.headers.push_back("authorization: " + sigv4_authorization(to_sign, credentials_, bucket_.region, "s3"));
  return request;
}

void S3Client::call(const std::shared_ptr<S3Call>& call) {
  calls_.insert(call);
  if (closed_) return finish(call, failure(Code::kUnavailable, "the s3 tier is closing"));
  if (loop_.now_ns() - credentials_read_ns_ > kReadCredentialsAgainNs) {
    static_cast<void>(read_credentials());  // on failure the old ones may still be good
  }
  attempt(call);
}

void S3Client::attempt(const std::shared_ptr<S3Call>& call) {
  ++call->attempts;
  auto request = signed_request(*call);
  request.timeout_ns = std::min(call->attempt_timeout_ns, call->deadline_ns - loop_.now_ns());
  call->cut_short = request.timeout_ns < call->attempt_timeout_ns;
  call->exchange = http_.execute(std::move(request), [this, call](Result<HttpResponse> response) {
    call->exchange.reset();
    answered(call, std::move(response));
  });
}

void S3Client::answered(const std::shared_ptr<S3Call>& call, Result<HttpResponse> response) {
  if (call->ended) return;
  if (response) {
    const int status = response->status;
    if (status / 100 == 2 || status == 404 || status == 412 || status == 416) {
      return finish(call, std::move(response));
    }
  }
  // A last attempt that has no time left says less than what was heard before it.
  if (response) {
    call->said = status_of(*call, *response);
  } else if (call->said || !call->cut_short) {
    call->said = Status(Code::kUnavailable, "S3: " + response.error().message());
  }
  Status why = call->said;
  if (!response && response.error().code() == Code::kRefused) return finish(call, failure(std::move(why)));
  if (response && !may_pass(response->status)) {
    // A key that was just replaced is worth a look; the next call gets it.
    if (response->status == 403) static_cast<void>(read_credentials());
    return finish(call, failure(std::move(why)));
  }
  const std::int64_t limit =
      std::min(retries_.max_pause_ns, retries_.first_pause_ns << std::min(call->attempts - 1, 20));
  const std::int64_t pause = std::uniform_int_distribution<std::int64_t>(0, limit)(random_);
  if (loop_.now_ns() + pause >= call->deadline_ns) return finish(call, failure(std::move(why)));
  call->timer = loop_.at(loop_.now_ns() + pause, [this, call] {
    call->timer.reset();
    attempt(call);
  });
}

void S3Client::finish(const std::shared_ptr<S3Call>& call, Result<HttpResponse> response) {
  if (call->ended) return;
  const auto done = std::exchange(call->done, nullptr);
  cancel(call);
  done(std::move(response));
}

void S3Client::cancel(const std::shared_ptr<S3Call>& call) {
  call->ended = true;
  call->done = nullptr;
  if (call->exchange) http_.cancel(*std::exchange(call->exchange, std::nullopt));
  if (call->timer) loop_.cancel(*std::exchange(call->timer, std::nullopt));
  calls_.erase(call);  // last: the caller's may be the one in the set
}

void S3Client::close() {
  closed_ = true;
  const auto calls = std::exchange(calls_, {});
  for (const auto& call : calls) finish(call, failure(Code::kUnavailable, "the s3 tier is closing"));
}

std::vector<std::string> xml_texts(std::string_view xml, std::string_view element) {
  constexpr std::array<std::pair<std::string_view, char>, 5> kEntities{
      {{"&amp;", '&'}, {"&lt;", '<'}, {"&gt;", '>'}, {"&quot;", '"'}, {"&apos;", '\''}}};
  const std::string open = "<" + std::string(element) + ">";
  const std::string close = "</" + std::string(element) + ">";
  std::vector<std::string> texts;
  for (std::size_t at = xml.find(open); at != std::string_view::npos; at = xml.find(open, at)) {
    at += open.size();
    const std::size_t end = xml.find(close, at);
    if (end == std::string_view::npos) break;
    std::string text;
    for (std::string_view raw = xml.substr(at, end - at); !raw.empty();) {
      const auto entity =
          std::ranges::find_if(kEntities, [&](const auto& each) { return raw.starts_with(each.first); });
      text += entity == kEntities.end() ? raw.front() : entity->second;
      raw.remove_prefix(entity == kEntities.end() ? 1 : entity->first.size());
    }
    texts.push_back(std::move(text));
    at = end + close.size();
  }
  return texts;
}

std::string xml_escape(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '&') {
      escaped += "&amp;";
    } else if (c == '<') {
      escaped += "&lt;";
    } else if (c == '>') {
      escaped += "&gt;";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

}  // namespace kvern
