#pragma once

#include <string>
#include <tl/expected.hpp>
#include <utility>

namespace kvern {

/// Outcomes that callers are expected to handle. Exceptions are left to constructors.
enum class Code {
  kOk,
  kNotFound,     ///< a miss: never stored, evicted, or not complete yet
  kBusy,         ///< no room or in flight elsewhere at the moment; the same call may succeed later
  kRefused,      ///< understood and not allowed (quota, policy, mismatch of versions); do not repeat
  kInvalid,      ///< the caller's bytes or arguments are malformed
  kCorrupt,      ///< checksum or identity does not match
  kUnavailable,  ///< the peer is away
  kExpired,      ///< the session or lease is no longer valid; register again
  kInternal,     ///< a defect or an error of the operating system
};

const char* code_name(Code code);

/// A code and, unless it is kOk, one sentence that says what is wrong and why. Cheap to move; not thread-safe.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status ok() { return {}; }
  bool is_ok() const { return code_ == Code::kOk; }
  explicit operator bool() const { return is_ok(); }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }
  /// "refused: the namespace names dtype fp4" — for logs and exceptions.
  std::string to_string() const;

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

template <typename T>
using Result = tl::expected<T, Status>;

inline tl::unexpected<Status> failure(Code code, std::string message) {
  return tl::unexpected<Status>(Status(code, std::move(message)));
}
inline tl::unexpected<Status> failure(Status status) { return tl::unexpected<Status>(std::move(status)); }

/// The status of a Result: ok() when it holds a value.
template <typename T>
Status status_of(const Result<T>& result) {
  return result ? Status::ok() : result.error();
}

}  // namespace kvern
