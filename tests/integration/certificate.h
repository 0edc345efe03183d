#pragma once

#include <string>

#include "tests/integration/child_process.h"
#include "tests/integration/temporary_folder.h"

namespace kvern::testing {

/// A server's certificate that only who is told of it trusts, for 127.0.0.1. The files go with their owner.
class Certificate {
 public:
  Certificate()
      : make_({OPENSSL_PATH, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=kvern",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key_file(), "-out", file()}),
        ready_(make_.wait() == 0) {}
  bool ready() const { return ready_; }
  const std::string& text() const { return make_.text(); }
  std::string file() const { return folder_.path() + "/certificate.pem"; }
  std::string key_file() const { return folder_.path() + "/key.pem"; }

 private:
  TemporaryFolder folder_;
  ChildProcess make_;
  const bool ready_;
};

}  // namespace kvern::testing
