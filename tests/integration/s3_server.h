#pragma once

#include <sstream>
#include <string>

#include "store/s3_tier.h"
#include "tests/integration/certificate.h"
#include "tests/integration/child_process.h"

namespace kvern::testing {

/// moto (s3_server.py) with one bucket, with and without TLS.
class S3Server {
 public:
  enum class Signatures { kChecked, kIgnored };

  explicit S3Server(Signatures signatures = Signatures::kChecked)
      : process_({TEST_PYTHON_PATH, S3_SERVER_PATH, kBucket, certificate_.file(), certificate_.key_file(),
                  signatures == Signatures::kIgnored ? "unchecked" : ""}) {
    ready_ = process_.says("ready ") && process_.says("\n");
    std::istringstream line(process_.text().substr(process_.text().find("ready ") + 6));
    line >> port_ >> key_ >> secret_ >> session_key_ >> session_secret_ >> session_token_ >> tls_port_;
  }
  bool ready() const { return certificate_.ready() && ready_ && !tls_port_.empty(); }
  const std::string& text() const { return process_.text(); }
  ChildProcess& process() { return process_; }

  S3TierConfig config() const {
    S3TierConfig config;
    config.bucket.endpoint = "http://127.0.0.1:" + port_;
    config.bucket.bucket = kBucket;
    config.bucket.path_style = true;
    config.bucket.access_key_id = {.value = key_};
    config.bucket.secret_access_key = {.value = secret_};
    return config;
  }
  S3TierConfig tls_config() const {
    S3TierConfig config = this->config();
    config.bucket.endpoint = "https://127.0.0.1:" + tls_port_;
    config.ca_file = certificate_.file();
    return config;
  }
  S3TierConfig session_config() const {
    S3TierConfig config = this->config();
    config.bucket.access_key_id = {.value = session_key_};
    config.bucket.secret_access_key = {.value = session_secret_};
    config.bucket.session_token = {.value = session_token_};
    return config;
  }

 private:
  static constexpr const char* kBucket = "kvern-test";
  const Certificate certificate_;
  ChildProcess process_;
  bool ready_ = false;
  std::string port_, key_, secret_, session_key_, session_secret_, session_token_, tls_port_;
};

}  // namespace kvern::testing
