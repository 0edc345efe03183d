#include <sys/statvfs.h>

#include <nlohmann/json.hpp>
#include <ostream>
#include <string>

#include "connector/probe_engine.h"
#include "kvernctl/commands.h"

namespace kvern {
namespace {

constexpr std::uint32_t kProbeTimeoutMs = 10'000;
// What lies beside the DRAM tier in its folder, its index above all, takes less than this part of it.
constexpr std::uint64_t kIndexShare = 20;

/// Findings, a sentence each. A fault makes the exit code 1, advice does not.
class Findings {
 public:
  explicit Findings(std::ostream& out) : out_(out) {}
  void good(const std::string& sentence) { out_ << "good    " << sentence << "\n"; }
  void advice(const std::string& sentence) { out_ << "advice  " << sentence << "\n"; }
  void fault(const std::string& sentence) {
    out_ << "fault   " << sentence << "\n";
    ++faults_;
  }
  int exit_code() const { return faults_ == 0 ? 0 : 1; }

 private:
  std::ostream& out_;
  int faults_ = 0;
};

std::string mib(std::uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

/// Stores a block as a worker would, finds it as a scheduler would, loads it, compares every bit.
void check_path(const DaemonAddress& address, Findings& findings) {
  ProbeShape shape = ProbeShape::of_chunk_bytes(256U << 10, PagePacking::kRows);
  shape.chunks = 1;
  auto engine = ProbeEngine::start(address.client_config("kvernctl doctor"), shape, address.timeout_ms);
  if (!engine) {
    findings.fault("a worker cannot open a session: " + engine.error().to_string());
    return;
  }
  auto& probe = **engine;
  constexpr std::uint64_t kSeed = 7;
  constexpr std::uint64_t kPrompt = 7;
  const std::string plane(probe.worker_client().session()->data_plane->name());
  findings.good("sessions open; the data plane is " + plane);
  if (address.address.starts_with("unix://") && plane != "shm") {
    findings.advice("bytes travel over " + plane + " although the daemon is on this host: remove data_plane = ucx");
  }
  probe.fill_pages(kSeed);
  const auto stored = probe.store(kPrompt, 0, 1, "raw", kProbeTimeoutMs);
  if (stored.stored_chunks != 1) {
    findings.fault("a probe chunk could not be stored: " + stored.reason);
    return;
  }
  const auto answer = probe.match(kPrompt, 1);
  if (answer.tokens != shape.block_tokens * shape.chunk_blocks) {
    findings.fault("the probe chunk was stored but is not found: " + answer.reason);
    return;
  }
  probe.clear_pages();
  const auto loaded = probe.load(kPrompt, 0, 1, kProbeTimeoutMs);
  probe.release(kPrompt);
  if (!loaded.loaded) {
    findings.fault("the probe chunk could not be loaded: " + loaded.reason);
  } else if (!probe.pages_equal(0, kSeed)) {
    findings.fault("the probe chunk came back with other bytes: do not use this daemon, and report this");
  } else {
    findings.good("a probe chunk was stored, found and loaded, bit for bit");
  }
}

void check_memory(const nlohmann::json& status, Findings& findings) {
  const auto store = status.value("store", nlohmann::json::object());
  const std::string directory = status.value("shm_dir", std::string("/dev/shm"));
  struct statvfs about {};
  if (statvfs(directory.c_str(), &about) != 0) return;  // the daemon runs in another mount namespace
  const std::uint64_t size_bytes = std::uint64_t{about.f_blocks} * about.f_frsize;
  const std::uint64_t slab_bytes = store.value("capacity_bytes", std::uint64_t{0});
  const std::string sizes = directory + " has " + mib(size_bytes) + ", the DRAM tier takes " + mib(slab_bytes);
  if (slab_bytes > size_bytes) {
    findings.fault(sizes + ": enlarge it (emptyDir sizeLimit, --shm-size) or lower [store] dram_bytes");
  } else if (slab_bytes + slab_bytes / kIndexShare > size_bytes) {
    findings.advice(sizes + ": its index lies beside it; leave a twentieth free");
  } else {
    findings.good(sizes);
  }
}

/// What an engine's worker found out of itself at its start.
void tell_self_tests(const nlohmann::json& session, Findings& findings) {
  const std::string name = session.value("client_name", std::string("an engine"));
  const auto attributes = session.value("attributes", nlohmann::json::object());
  const auto tell = [&](const char* attribute, const std::string& works, const std::string& otherwise) {
    const std::string result = attributes.value(attribute, std::string());
    if (result.empty()) return;
    const bool passed = result.ends_with("self-test passed") || result.ends_with("trusted");
    findings.good(passed ? name + works + " (" + result + ")" : name + otherwise + ": " + result);
  };
  tell("key_rotation", " makes compact caches", " makes no compact caches");
  tell("query_capture", " makes compact caches by methods that read queries",
       " makes compact caches by methods without queries only");
  tell("layer_budgets", " reads compact caches with a budget for each layer",
       " gives all layers of a compact cache the same budget");
}

void check_engines(const nlohmann::json& status, Findings& findings) {
  int engines = 0;
  for (const auto& session : status.value("sessions", nlohmann::json::array())) {
    if (session.value("role", std::string()) == "worker") tell_self_tests(session, findings);
    if (session.value("role", std::string()) != "scheduler") continue;
    const auto attributes = session.value("attributes", nlohmann::json::object());
    if (!attributes.contains("vllm")) continue;
    ++engines;
    const std::string name = session.value("client_name", std::string("an engine"));
    const std::string policy = attributes.value("kv_load_failure_policy", std::string("unknown"));
    if (policy == "recompute") {
      findings.good(name + " (vLLM " + attributes.value("vllm", std::string("?")) +
                    ") recomputes what cannot be loaded");
    } else {
      findings.advice(
          std::string(name).append(" runs kv_load_failure_policy=").append(policy) +
          ": a corrupt or lost chunk fails its request there; set \"recompute\" unless the engine decodes on "
          "compact caches");
    }
  }
  if (engines == 0) {
    findings.advice(
        "no vLLM engine is connected: start one with --kv-transfer-config (README), or look at its log for "
        "lines that begin with kvern");
  }
}

}  // namespace

int run_doctor(const DaemonAddress& address, std::ostream& out) {
  Findings findings(out);
  auto session = ToolSession::open(address);
  if (!session) {
    findings.fault(session.error().message());
    return findings.exit_code();
  }
  const auto& versions = session->welcome().versions();
  findings.good("kvernd " + versions.software() + " answers; protocol " + std::to_string(versions.protocol()) +
                ", container " + std::to_string(versions.container()) +
                (versions.ucx().empty() ? ", UCX not in use" : ", UCX " + versions.ucx()));
  wire::ControlRequest request;
  request.mutable_status();
  wire::ControlReply reply;
  if (const Status asked = session->call(request, &reply); !asked) {
    findings.fault("the daemon does not report its status: " + asked.to_string());
  } else {
    const auto status = nlohmann::json::parse(reply.status_report().json(), nullptr, false);
    if (status.is_object()) {
      if (address.address.starts_with("unix://")) check_memory(status, findings);
      check_engines(status, findings);
    } else {
      findings.fault("the daemon's status report cannot be read: kvernctl and kvernd are of different builds");
    }
  }
  check_path(address, findings);
  return findings.exit_code();
}

}  // namespace kvern
