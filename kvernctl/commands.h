#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <string>

#include "base/status.h"
#include "connector/client.h"
#include "plan/planner.h"
#include "transport/control.h"

namespace kvern {

/// What all commands need: how to reach the daemon.
struct DaemonAddress {
  std::string address;  ///< unix:///… or tcp://host:port
  std::string server_key_file;
  std::string client_key_file;
  bool insecure = false;
  std::uint32_t timeout_ms = 5000;

  ClientConfig client_config(const std::string& name) const;
};

/// A control connection of role ROLE_TOOL: says hello, numbers its requests and carries the token.
class ToolSession {
 public:
  /// kUnavailable with a sentence that says what to check when nobody answers.
  static Result<ToolSession> open(const DaemonAddress& address);
  Status call(wire::ControlRequest& request, wire::ControlReply* reply);
  const wire::Welcome& welcome() const { return welcome_; }

 private:
  std::shared_ptr<ControlClient> control_;
  wire::Welcome welcome_;
  std::uint32_t timeout_ms_ = 0;
};

/// Commands print to out and return the exit code: 0 good, 1 the command found something wrong, 2 it could not run.
int run_status(const DaemonAddress& address, bool json, std::ostream& out);
int run_explain(const DaemonAddress& address, const std::string& block_hash_hex, std::ostream& out);
int run_inspect(const DaemonAddress& address, const std::string& namespace_hex, std::uint64_t limit, std::ostream& out);
int run_inspect_file(const std::string& path, std::ostream& out);
/// What to drop: all, or what is named.
struct FlushOptions {
  std::string namespace_hex, tenant, prefix_hex;
  bool all = false;  ///< excludes the others
};
int run_flush(const DaemonAddress& address, const FlushOptions& what, std::ostream& out);
int run_compact_list(const DaemonAddress& address, std::ostream& out);
/// Waits while it is pending; 1 when it has failed or there is none.
int run_compact_show(const DaemonAddress& address, const std::string& handle, std::uint32_t wait_seconds,
                     std::ostream& out);
int run_compact_delete(const DaemonAddress& address, const std::string& handle, std::ostream& out);
int run_keygen(const std::string& directory, const std::string& name, std::ostream& out);
int run_doctor(const DaemonAddress& address, std::ostream& out);

struct BenchOptions {
  std::uint64_t chunk_bytes = 2U << 20;
  std::uint64_t total_bytes = 256U << 20;
  std::uint32_t batch = 8;
  std::string codec = "raw";
};
/// Needs no daemon. model: see plan::kv_bytes_per_token(). options without bytes_per_token; chart_path may be empty.
int run_plan(const std::string& trace_path, const std::string& model, plan::PlanOptions options,
             const std::string& chart_path, std::ostream& out);
int run_bench(const DaemonAddress& address, const BenchOptions& options, std::ostream& out);

}  // namespace kvern
